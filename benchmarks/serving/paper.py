"""The points of S-LoRA's paper and of the burst that other servers were measured with, in one process.

    python -m benchmarks.serving.paper --budget 520 --json FILE      # on the GPU; again to go on
    python -m benchmarks.serving.paper --report --json FILE          # anywhere: floors and a table

`slora-jax bench` starts an engine for each point of another kind. Here points of one model use one pool and the same
compiled steps, one after another, each with an engine of its own: scheduler, books and adapters are new, and every
point begins with empty pages. The file is written after every point, and those it has are not measured again. After
`--budget` seconds of the process nothing new begins.
"""

import argparse
from collections.abc import Mapping
import contextlib
import dataclasses
import gc
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from benchmarks.ceilings import measure_ceilings
from benchmarks.serving.baselines.fixed_slots import split_engine
from benchmarks.serving.idle import Profile
from benchmarks.serving.paper_parts import FAMILIES, PARTS, Family, Part
from benchmarks.serving.paper_report import report
from benchmarks.serving.paper_steps import show_steps
from benchmarks.serving.paper_twin import compare, forecast
from benchmarks.serving.probe import engine_runner
from benchmarks.serving.session import SHARED, Session, make_adapters, random_model
from benchmarks.serving.window import window_figures
from benchmarks.tensor_parallel_report import OutOfTime, Report
from slora_jax import Engine
from slora_jax.cli.parser import parse_arguments
from slora_jax.loading import LoadedModel
from slora_jax.memory import device_memory
from slora_jax.model_config import param_specs
from slora_jax.runner import Runner
from slora_jax.shapes import named_shape
from slora_jax.traces import Setting

_SPARE = 3 << 30  # bytes for steps' temporaries, logits, and the adapters' copies
_COMPILE_SECONDS = 60.0  # that are left at least when a family begins


def process_seconds() -> float:
    """Since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100


def pool_bytes(family: Family, limit: int | None) -> int | None:
    """Page pool of a family, known before anything is compiled, so that the number of pages is compiled once: what the
    device has beside weights, XLA's room to try matrix products (one stacked weight) and some spare.
    """
    memory = device_memory()
    if memory is None or limit or family.pool_bytes:
        return limit or family.pool_bytes
    specs = param_specs(named_shape(family.shape))
    largest = max(int(np.prod(spec.shape)) for spec in specs.values()) * 2
    return int(memory[0] * 0.97) - memory[1] - largest - _SPARE


class Bench:
    """Measures parts on what is compiled for their family: for the longest of them."""

    def __init__(self, args: argparse.Namespace, results: Report, parts: Mapping[str, Part]):
        self.args = args
        self.results = results
        self.parts = parts
        self.started: dict[str, Any] = {}
        self._family: str | None = None
        self._model: LoadedModel | None = None
        self._runner: Runner | None = None

    def options(self, setting: Setting, **changes: Any) -> argparse.Namespace:
        """Those of `slora-jax bench` for a session."""
        names = [f"--rank={rank}" for rank in setting.ranks] + [f"--target={target}" for target in setting.targets]
        args = parse_arguments(["bench", "--quiet", f"--shape={setting.shape}", *names])
        return argparse.Namespace(**vars(args) | changes | dict(dtype=self.args.dtype))

    def run(self, name: str) -> None:
        part = self.parts[name]
        if not self.results.missing(name):
            return
        if part.family != self._family:
            self.results.check(_COMPILE_SECONDS + part.seconds)
            self._open(part.family, max(p.longest for p in self.parts.values() if p.family == part.family))
        self.results.run(name, lambda: self._measure(part), part.seconds)

    def _open(self, name: str, longest: int) -> None:
        """Makes a family's model, compiles its steps and makes its pool."""
        family, began = FAMILIES[name], time.monotonic()
        if self._runner is not None:
            self._runner.state = None
        self._runner = None
        setting = Setting(self.args.shape or family.shape, family.ranks)
        if self._family is None or FAMILIES[self._family].shape != family.shape:
            self._model = None
            gc.collect()
            self._model = random_model(self.options(setting), setting)
        self._family = name
        model = self._model
        assert model is not None
        made = time.monotonic()
        dtype = str(model.params["embed"].dtype)
        ceilings = dataclasses.asdict(measure_ceilings(dtype))
        measured = time.monotonic()
        seqs, tokens = self.args.seqs or family.seqs, self.args.tokens or family.tokens

        def make(model, config, adapters, stack) -> Engine:
            return Engine(model, dataclasses.replace(config, seq_buckets=seqs, token_buckets=tokens), adapters)

        options = self.options(
            setting, max_seqs=seqs[-1], max_step_tokens=tokens[-1], page_pool=pool_bytes(family, self.args.page_pool)
        )
        count = len(family.ranks)
        with Session(options, setting, adapters=count, longest=longest, make=make, model=model) as session:
            self._runner = engine_runner(session.engine)
        self.started[name] = dict(
            model_seconds=made - began,
            ceilings_seconds=measured - made,
            compile_seconds=time.monotonic() - measured,
            process_seconds_at_first_token=process_seconds(),
            device=jax.devices()[0].device_kind,
            ceilings=ceilings,
            programs=len(self._runner.programs.compiled_steps()),
        )
        print(f"{name}: {self.started[name]}", flush=True)

    def _measure(self, part: Part) -> dict[str, Any]:
        began, model, runner = time.monotonic(), self._model, self._runner
        assert model is not None and runner is not None
        setting = dataclasses.replace(part.setting, shape=self.args.shape or part.setting.shape)
        limit = min(self.args.running or part.max_seqs, runner.builder.buckets.max_seqs)
        options = self.options(
            setting,
            max_seqs=limit,
            max_step_tokens=runner.builder.buckets.tokens[-1],
            policy=part.policy,
            policy_option=list(part.options.items()),
            prompt_gap=part.prompt_gap,
            slo=part.slo,
        )

        def make(model, config, adapters, stack) -> Engine:
            if not part.slots:
                return Engine(model, config, adapters, runner=runner)
            pages = max(a.num_pages(model.config.geometry) for a in adapters.values())
            return split_engine(model, config, adapters, slots=part.slots, slot_pages=pages, runner=runner)

        def prepare(model, adapters):
            padded = Setting(setting.shape, (max(setting.ranks),), setting.targets)
            return model, make_adapters(model, padded, len(adapters)) if part.slots else adapters

        kind = dict(adapters=part.adapters, longest=part.longest, base=not part.adapters)
        profile = Profile(0.84 * part.until, 0.1 * part.until) if part.kind == "profile" and part.until else None
        with Session(options, setting, **kind, make=make, prepare=prepare, model=model) as session:
            ready = time.monotonic()
            during = profile or contextlib.nullcontext()
            point, run = session.measure(part.trace(), {}, until=part.until, floor=False, during=lambda: during)
            point |= session.describe() | dict(limits=session.limits())
        if part.window:
            point["window"] = window_figures(run.records, run.steps, *part.window)
        if profile:
            point["profile"] = profile.figures
        point |= dict(started=self.started[part.family], adapters=SHARED, slots=part.slots, most_seqs=limit)
        return point | dict(setup_seconds=ready - began)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the results, or with them")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds after which nothing new begins")
    parser.add_argument("--only", default="", help="parts whose names hold one of these words, separated by commas")
    parser.add_argument(
        "--part", action="append", choices=PARTS, metavar="NAME", help="this one; repeat for more, in your order"
    )
    parser.add_argument("--list", action="store_true", help="show the parts")
    parser.add_argument(
        "--report", action="store_true", help="add floors to the results and show them; measures nothing"
    )
    parser.add_argument("--twin", action="store_true", help="show what the twin predicts of each part from the others")
    parser.add_argument("--forecast", action="store_true", help="show what the twin expects of parts, measured or not")
    parser.add_argument("--ideal", action="store_true", help="--forecast on the ideal device")
    parser.add_argument("--slots", type=_numbers, default=(), help="--forecast also with N,N,... fixed slots")
    parser.add_argument("--steps", action="store_true", help="show steps by size, beside their floor")
    parser.add_argument(
        "--running", type=int, help="sequences at most, instead of each part's own number; a file of its own, please"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    small = parser.add_argument_group("to try it out", "These make other measurements of all parts.")
    small.add_argument("--shape", help="of the base model")
    small.add_argument("--requests", type=int, help="of each part, at most")
    small.add_argument("--lengths", type=_numbers, help="of prompts and answers: least, limit")
    small.add_argument("--speed", type=float, default=1.0, help="divides seconds and multiplies rates")
    small.add_argument("--page-pool", type=int, help="bytes")
    for name in ("--seqs", "--tokens"):
        small.add_argument(name, type=_numbers, help="sizes of steps")
    args = parser.parse_args(argv)
    if (args.ideal or args.slots) and not args.forecast:
        parser.error("--ideal and --slots go with --forecast")
    if min(args.slots, default=1) < 1:
        parser.error(f"--slots must be at least 1, not {min(args.slots)}")
    words = [word for word in args.only.split(",") if word]
    names = args.part or [n for n in PARTS if not words or any(word in n for word in words)]
    parts = {name: PARTS[name] for name in names}
    if args.list:
        print("\n".join(f"{part.seconds:4.0f} s  {name}" for name, part in parts.items()))
        return
    if args.report:
        report(args.json)
    if args.twin:
        compare(args.json)
    if args.steps:
        show_steps(args.json)
    if args.forecast:
        forecast(args.json, names, args.slots, on_ideal=args.ideal)
    if args.report or args.twin or args.steps or args.forecast:
        return
    kept = ("running", "dtype", "shape", "requests", "lengths", "speed", "page_pool", "seqs", "tokens")
    settings = {name: list(v) if isinstance(v := getattr(args, name), tuple) else v for name in kept}
    results = Report(args.json, settings, time.monotonic() + args.budget - process_seconds())
    results.parts = {name: point for name, point in results.parts.items() if "error" not in point}
    bench = Bench(args, results, {n: p.smaller(args.requests, args.lengths, args.speed) for n, p in parts.items()})
    for name in parts:
        try:
            bench.run(name)
        except OutOfTime:
            print(f"no time for: {name}", flush=True)


if __name__ == "__main__":
    main()
