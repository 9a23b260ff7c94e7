"""Tensor parallelism: base model only, S-LoRA's layout, the communication-free one, and "auto", on N GPUs.

    python -m benchmarks.tensor_parallel --tp 2 --models llama-30b-m
    JAX_NUM_CPU_DEVICES=4 python -m benchmarks.tensor_parallel --tp 4 --models tiny-gqa --dtype float32

Measures, on random weights made on the devices: the time of a decode step beside its floor (bytes that the busiest
device reads / copy bandwidth + all-reduces at their measured time), and requests/s served of a burst of S-LoRA's
synthetic trace. Says which collectives XLA made and where a step's time goes. Results are written after every part;
started again with the same --json it goes on with what is missing. --budget seconds after its start it begins nothing
new. --tp 1 measures one GPU: base only, and with adapters ("one-gpu").
"""

import os

# a benchmark has the GPUs to itself; NCCL takes its part beside XLA's
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import time
from typing import Any

import jax

from benchmarks.record import RESULTS
from benchmarks.tensor_parallel_parts import (
    DecodeCase,
    collectives,
    copy_bandwidth,
    free_bytes,
    kernel_times,
    serve,
    tuning_bytes,
)
from benchmarks.tensor_parallel_report import OutOfTime, Report
from benchmarks.tensor_parallel_subject import LAYOUTS, MODELS, Subject
from sharding import measure_latency
from slora_jax import EngineConfig


class Bench:
    """All parts for one model."""

    def __init__(self, args: argparse.Namespace, name: str, report: Report):
        self.args, self.name, self.report = args, name, report
        self.subject = Subject(args, name)
        self.config, self.counts, self.parallels = self.subject.config, self.subject.counts, self.subject.parallels

    def run(self) -> None:
        report = self.report
        report.run(f"{self.name}/ceilings", self.ceilings, 20)
        for seqs in self.args.seqs:
            self.decode(seqs)
        for count in self.counts:
            for layout in self.subject.layouts():
                name = f"{self.name}/served/{layout}" + ("" if layout == "base" else f"/n{count}")
                if layout == "auto" and (same := self.subject.same(count)):
                    report.run(name, lambda same=same: dict(same_as=same), 0)
                else:
                    report.run(name, lambda x=layout, n=count: self.served(x, n), self.args.served_seconds)

    def ceilings(self) -> dict[str, Any]:
        found: dict[str, Any] = dict(
            copy_bytes_per_second=copy_bandwidth(self.args.spend), latency=self.subject.latency
        )
        parallel = next(iter(self.parallels.values()))
        if parallel:
            found["all_reduce_seconds"] = {
                str(n): measure_latency(self.subject.mesh, (n, self.config.hidden_size), self.args.dtype)
                for n in self.args.seqs
            }
            auto = {n: p.layout.lora for (x, n), p in self.parallels.items() if x == "auto" and p}
            found["auto"] = {
                str(n): dict(zip(("qkv", "o", "gu", "down"), lora, strict=True)) for n, lora in auto.items()
            }
        return found

    def decode(self, seqs: int) -> None:
        """All layouts at one number of sequences. Their programs are compiled side by side, then timed one by one."""
        wanted: dict[str, list[int]] = {}
        for layout in self.subject.layouts():
            counts = [n for n in self.counts if self.report.missing(self._decode_name(layout, seqs, n))]
            counts = counts[:1] if layout == "base" else counts
            if layout == "auto":
                for n in [n for n in counts if self.subject.same(n)]:
                    self.report.run(
                        self._decode_name(layout, seqs, n), lambda n=n: dict(same_as=self.subject.same(n)), 0
                    )
                    counts.remove(n)
            if counts:
                wanted[layout] = counts
        if not wanted:
            return
        self.report.check(self.args.compile_seconds)
        try:
            cases, programs = self._compile(wanted, seqs)
        except Exception as error:  # noqa: BLE001 - a size that does not fit must not end the others
            failed = error
            for layout, counts in wanted.items():
                for n in counts:
                    self.report.run(self._decode_name(layout, seqs, n), lambda: _raise(failed), 0)
            return
        for (layout, lora), program in programs.items():
            case, state = cases[layout, lora], None
            for n in wanted[layout]:
                parallel = self.parallels[layout, n]
                if (parallel.layout.lora if parallel else None) != lora:
                    continue

                def part(n=n, layout=layout, case=case, program=program):
                    nonlocal state
                    state = case.random_state() if state is None else state
                    result, state = self._timed(case, program, state, layout, n)
                    return result

                self.report.run(self._decode_name(layout, seqs, n), part, 5)
            del state

    def _compile(self, wanted: dict[str, list[int]], seqs: int):
        """Cases and programs by layout, side by side. "auto" may be another program for another number of adapters."""
        model = self.subject.model  # made before the threads ask for it
        start = time.monotonic()
        keys = {}
        for layout, counts in wanted.items():
            for n in counts:
                parallel = self.parallels[layout, n]
                keys[layout, parallel.layout.lora if parallel else None] = n
        cases = {key: self.subject.case(key[0], n, seqs) for key, n in keys.items()}
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            programs = dict(zip(cases, pool.map(lambda c: c.compile(model.params), cases.values()), strict=True))
        print(f"{len(programs)} programs for {seqs} sequences compiled in {time.monotonic() - start:.1f} s", flush=True)
        return cases, programs

    def _decode_name(self, layout: str, seqs: int, count: int) -> str:
        return f"{self.name}/decode/{seqs}/{layout}" + ("" if layout == "base" else f"/n{count}")

    def _timed(self, case: DecodeCase, program, state, layout: str, count: int) -> tuple[dict[str, Any], Any]:
        adapters = [] if layout == "base" else self.subject.used(count, case.seqs)
        seconds, state = case.seconds(program, self.subject.model.params, state, adapters, self.args.spend)
        ceilings = self.report.parts[f"{self.name}/ceilings"]
        size = case.floor_bytes(adapters)
        floor = size / ceilings["copy_bytes_per_second"]
        if case.parallel:
            floor += (2 * self.config.num_layers + 1) * ceilings["all_reduce_seconds"][str(case.seqs)]
        result = dict(
            seconds=seconds,
            floor_seconds=floor,
            times_floor=seconds / floor,
            floor_bytes=size,
            context=case.context,
            temp_bytes=program.memory_analysis().temp_size_in_bytes,
        )
        if case.parallel and case.seqs == self.args.profile_seqs and count == self.counts[-1 if adapters else 0]:
            result["collectives"] = collectives(program)
            batch = case.device_batch(program, adapters)
            held = state

            def call():
                nonlocal held
                held, output = program(self.subject.model.params, held, batch)
                return output.tokens

            result["kernels"] = kernel_times(call)
            state = held
        return result, state

    def served(self, layout: str, count: int) -> dict[str, Any]:
        parallel = self.parallels[layout, count]
        adapters = {} if layout == "base" else dict(list(self.subject.adapters.items())[:count])
        free = free_bytes(self.config, self.args.dtype, parallel)
        devices = self.args.tp
        pool = 1 << 28 if free is None else free - tuning_bytes(self.config, self.args.dtype, devices)
        settings = EngineConfig(
            dtype=self.args.dtype,
            max_seqs=self.args.max_seqs,
            max_step_tokens=self.args.step_tokens,
            seq_buckets=(self.args.max_seqs,),
            token_buckets=(self.args.step_tokens,),
            max_model_len=self.args.lengths[1] * 2,
            max_lora_rank=self.subject.max_rank,
            page_pool_bytes=pool,
            tensor_parallel=devices,
            implementation=self.args.implementation,
            loop=self.subject.loop,
            warm_up="greedy",
            compile_cache_dir=os.environ.get("JAX_COMPILATION_CACHE_DIR", ".cache/jax"),
        )
        options: dict[str, Any] = dict(requests=self.args.requests, lengths=tuple(self.args.lengths), settings=settings)
        result = serve(self.subject.model, parallel, adapters, **options)
        base = self.report.parts.get(f"{self.name}/served/base", {}).get("requests_per_second")
        return dict(result, of_base=result["requests_per_second"] / base) if base and layout != "base" else result


def _raise(error: Exception) -> dict[str, Any]:
    raise error


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="number of GPUs")
    parser.add_argument(
        "--models", type=lambda t: t.split(","), default=[m for m in MODELS if not m.startswith("tiny")]
    )
    parser.add_argument("--layouts", type=lambda t: t.split(","), default=list(LAYOUTS))
    parser.add_argument("--adapters", type=_numbers, default=[10, 100])
    parser.add_argument("--seqs", type=_numbers, default=[64, 256, 1], help="sizes of decode steps, in this order")
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence, fewer where memory is short")
    parser.add_argument("--requests", type=int, default=200, help="of the served burst; 0 serves none")
    parser.add_argument(
        "--lengths", type=_numbers, default=[8, 512], help="of prompts and answers: lowest, highest + 1"
    )
    parser.add_argument("--max-seqs", type=int, default=256)
    parser.add_argument("--step-tokens", type=int, default=1024, help="tokens of a served step at most")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--spend", type=float, default=2.0, help="seconds of steps a timing takes")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds after which nothing new begins")
    parser.add_argument("--compile-seconds", type=float, default=60.0, help="left at least when a size is compiled")
    parser.add_argument("--served-seconds", type=float, default=90.0, help="left at least when a burst begins")
    parser.add_argument(
        "--profile-seqs", type=int, default=64, help="the size whose collectives and kernels are listed"
    )
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    for name in args.models:
        if name not in MODELS:
            raise SystemExit(f"there is no model {name!r}; choose from {', '.join(MODELS)}")
    deadline = time.monotonic() + args.budget
    cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/jax")
    jax.config.update("jax_compilation_cache_dir", cache)
    settings = dict(tp=args.tp, dtype=args.dtype, requests=args.requests, lengths=args.lengths, max_seqs=args.max_seqs)
    report = Report(args.json or RESULTS / f"tensor_parallel_{args.tp}.json", settings, deadline)
    try:
        for name in args.models:
            Bench(args, name, report).run()
    except OutOfTime:
        print("out of time; the same command goes on where this one ended", flush=True)


if __name__ == "__main__":
    main()
