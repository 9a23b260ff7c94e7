"""Tensor parallelism: base model only, S-LoRA's layout, the communication-free one, and "auto", of one model on N GPUs.

    python -m benchmarks.tensor_parallel --tp 2 --model llama-30b-m
    JAX_NUM_CPU_DEVICES=4 python -m benchmarks.tensor_parallel --tp 4 --model tiny-gqa --dtype float32

Measures, on random weights made on the devices: the time of a decode step beside its floor (bytes that the busiest
device reads / copy bandwidth + all-reduces at their measured time), and requests/s served of a burst of S-LoRA's
synthetic trace. Says which collectives XLA made and where a step's time goes. Results are written after every part;
started again with the same --json it goes on with what is missing. --budget seconds after its start it begins
nothing new. --tp 1 measures one GPU: base only, and with adapters ("one-gpu").

benchmarks/tensor_parallel_all.py runs it for all models and numbers of GPUs; --compile-only leaves the programs in the
persistent cache.
"""

import os

# A benchmark has the GPUs to itself but for NCCL.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.88")
os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "128")  # pinned images of the adapters in three layouts
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast stays off

import argparse
from concurrent.futures import ThreadPoolExecutor
import dataclasses
from pathlib import Path
import time
from typing import Any

import jax

from benchmarks.ceilings import copy_bandwidth, seconds_per_call
from benchmarks.record import RESULTS
from benchmarks.tensor_parallel_parts import Decode, Pool, serve
from benchmarks.tensor_parallel_profile import collectives, profile
from benchmarks.tensor_parallel_report import OutOfTime, Report
from benchmarks.tensor_parallel_subject import LAYOUTS, MODELS, Subject
from sharding import collective_timer
from slora_jax.program_shapes import StepShape

NCCL_ONLY: dict[str, bool | str] = {"xla_gpu_experimental_use_collective_kernels": ""}
"""Without XLA's own all-reduce kernels for small arrays."""


class Bench:
    """All parts for one model."""

    def __init__(self, args: argparse.Namespace, report: Report):
        self.args, self.report = args, report
        start = time.monotonic()
        self.subject = Subject(args, args.model)
        self.begun = time.monotonic() - start
        self.timers: dict[str, Any] = {}
        self.pool = Pool(self.subject)

    def cases(self) -> list[tuple[str, int]]:
        """Layouts with a number of adapters, the most wanted first: base alone, then all with 10, then with 100."""
        layouts = self.subject.layouts()
        found = [("base", self.subject.counts[0])] if "base" in layouts else []
        return found + [(x, n) for n in self.subject.counts for x in layouts if x != "base"]

    def prepare(self) -> None:
        """Compiles what the missing parts need. Needs no memory on the GPUs but for trying out matrix products."""
        start = time.monotonic()
        wanted: dict[tuple[str, int], list[StepShape]] = {}
        for layout, n in self.cases():
            seqs = [s for s in self.args.seqs if self.report.missing(self.decode_name(s, layout, n))]
            served = bool(self.args.requests) and self.report.missing(self.served_name(layout, n))
            if seqs or served:
                wanted[layout, n] = self.subject.shapes(layout, seqs, served)
        if self.args.tp > 1 and self.report.missing("ceilings"):
            ways: dict[str, Any] = {"default": None}
            if jax.default_backend() == "gpu":
                ways["nccl"] = NCCL_ONLY
            hidden = self.subject.config.hidden_size
            sizes = [(way, n) for way in ways for n in sorted({*self.args.seqs, self.args.step_tokens})]
            with ThreadPoolExecutor(len(sizes)) as threads:
                made = threads.map(
                    lambda s: collective_timer(
                        self.subject.mesh, (s[1], hidden), self.args.dtype, compiler_options=ways[s[0]]
                    ),
                    sizes,
                )
                self.timers = {f"{way}/{n}": timer for (way, n), timer in zip(sizes, made, strict=True)}
        self.subject.compile(wanted)
        seconds = time.monotonic() - start
        self.prepared = dict(
            begin_seconds=self.begun, tuning_seconds=self.subject.tuning_seconds, compile_seconds=seconds
        )
        programs = sum(len(p.compiled_steps()) for p in self.subject.programs.values())
        print(f"{programs} programs in {seconds:.1f} s, {self.begun:.1f} s before: {self.prepared}", flush=True)

    def run(self) -> None:
        report = self.report
        report.run("ceilings", self.ceilings, 5)
        for seqs in self.args.seqs:
            for layout, n in self.cases():
                self.part(
                    self.decode_name(seqs, layout, n), layout, n, lambda s=seqs, x=layout, n=n: self.decode(s, x, n), 2
                )
        self.pool.state = None
        if self.args.requests:
            for layout, n in self.cases():
                self.part(
                    self.served_name(layout, n),
                    layout,
                    n,
                    lambda x=layout, n=n: self.served(x, n),
                    self.args.served_seconds,
                )

    def part(self, name: str, layout: str, count: int, run, least: float) -> None:
        if layout == "auto" and (same := self.subject.same(count)) and same in self.subject.layouts():
            self.report.run(name, lambda: dict(same_as=same), 0)
        else:
            self.report.run(name, run, least)

    def decode_name(self, seqs: int, layout: str, count: int) -> str:
        return f"decode/{seqs}/{layout}" + ("" if layout == "base" else f"/n{count}")

    def served_name(self, layout: str, count: int) -> str:
        return f"served/{layout}" + ("" if layout == "base" else f"/n{count}")

    def ceilings(self) -> dict[str, Any]:
        copy = copy_bandwidth(self.args.spend / 2)
        start = time.monotonic()
        self.pool.fill()  # before the weights, between which no room of its size might be left
        _ = self.subject.model  # before any other time is taken, and while nothing else is on the devices
        found: dict[str, Any] = dict(self.prepared, weights_seconds=time.monotonic() - start)
        found |= dict(num_pages=self.subject.num_pages, page_bytes=self.subject.page_bytes)
        found |= dict(copy_bytes_per_second=copy, cost_model=dataclasses.asdict(self.subject.cost))
        found["all_reduce_seconds"] = {name: timer() for name, timer in self.timers.items()}
        self.timers = {}
        if "auto" in self.subject.layouts():
            found["auto"] = {}
            for n in self.subject.counts:
                parallel = self.subject.parallels["auto", n]
                assert parallel is not None
                found["auto"][str(n)] = dict(zip(("qkv", "o", "gu", "down"), parallel.layout.lora, strict=True))
        return found

    def decode(self, seqs: int, layout: str, count: int) -> dict[str, Any]:
        case = Decode(self.subject, layout, count, seqs)
        self.raise_failed(layout, count, case.shape)
        self.pool.fill()
        call = case.caller(self.pool)
        seconds = seconds_per_call(call, self.args.spend)
        ceilings = self.report.parts["ceilings"]
        size = case.floor_bytes()
        floor = size / ceilings["copy_bytes_per_second"]
        if self.args.tp > 1:
            reduces = 2 * self.subject.config.num_layers + 1
            floor += reduces * ceilings["all_reduce_seconds"][f"default/{seqs}"]
        program = case.programs.step(case.shape)
        result: dict[str, Any] = dict(
            seconds=seconds,
            floor_seconds=floor,
            times_floor=seconds / floor,
            floor_bytes=size,
            context=case.context,
            temp_bytes=program.memory_analysis().temp_size_in_bytes,
        )
        result |= self.of_base(f"decode/{seqs}/base", seconds=seconds, floor_seconds=floor)
        if seqs == self.args.profile_seqs and (layout == "base" or count == self.subject.counts[-1]):
            if self.args.tp > 1:
                result["collectives"] = collectives(program)
            result["profile"] = profile(call)
        return result

    def of_base(self, name: str, **seconds: float) -> dict[str, float]:
        """Base only's times over these: what is kept of its throughput, measured, and by bytes."""
        base = self.report.parts.get(name, {})
        return {f"{x}_of_base": base[x] / value for x, value in seconds.items() if x in base}

    def served(self, layout: str, count: int) -> dict[str, Any]:
        for shape in self.subject.shapes(layout, [], served=True):
            self.raise_failed(layout, count, shape)
        self.pool.state = None
        result = serve(self.subject, layout, count)
        base = self.report.parts.get("served/base", {})
        if result["finished"] and base.get("finished"):
            result |= self.of_base("served/base", seconds=result["seconds"])
        return result

    def raise_failed(self, layout: str, count: int, shape: StepShape) -> None:
        if error := self.subject.failed.get((self.subject.key(layout, count), shape)):
            raise error


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="number of GPUs")
    parser.add_argument("--model", default="llama-30b-m", choices=MODELS)
    parser.add_argument("--layouts", type=lambda t: t.split(","), default=list(LAYOUTS))
    parser.add_argument("--adapters", type=_numbers, default=[10, 100])
    parser.add_argument("--seqs", type=_numbers, default=[64, 256, 1], help="sizes of decode steps, in this order")
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence, fewer where memory is short")
    parser.add_argument("--requests", type=int, default=256, help="of the served burst; 0 serves none")
    parser.add_argument(
        "--lengths", type=_numbers, default=[8, 512], help="of prompts and answers: lowest, highest + 1"
    )
    parser.add_argument("--max-seqs", type=int, default=256)
    parser.add_argument("--step-tokens", type=int, default=512, help="tokens of a served step with prompts at most")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--spend", type=float, default=0.6, help="seconds of steps a timing takes")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds after which nothing new begins")
    parser.add_argument("--served-seconds", type=float, default=20.0, help="left at least when a burst begins")
    parser.add_argument("--burst-seconds", type=float, default=60.0, help="that a burst takes at most")
    parser.add_argument(
        "--profile-seqs", type=int, default=64, help="the size whose collectives and kernels are listed"
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--compile-only", action="store_true", help="compile what the missing parts need, and end")
    parser.add_argument("--lock", default=None, help="file that processes lock while they time anything to compile")
    args = parser.parse_args(argv)
    if max(args.seqs) > args.max_seqs:
        raise SystemExit(f"--seqs {max(args.seqs)} is above --max-seqs {args.max_seqs}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    deadline = time.monotonic() + args.budget
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", ".cache/jax")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    settings = {x: getattr(args, x) for x in ("model", "tp", "dtype", "requests", "lengths", "max_seqs", "step_tokens")}
    settings["context"] = args.context
    settings["device_kind"] = jax.devices()[0].device_kind
    path = args.json or RESULTS / f"tensor_parallel_{args.model}_tp{args.tp}.json"
    report = Report(path, settings, deadline)
    try:
        report.check(0)
        bench = Bench(args, report)
        print("tuned", flush=True)
        bench.prepare()
        if args.compile_only:
            return
        bench.run()
        print("done", flush=True)
    except OutOfTime:
        print("out of time; the same command goes on where this one ended", flush=True)


if __name__ == "__main__":
    main()
