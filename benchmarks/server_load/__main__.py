"""Load on a server process over loopback: many streams over many adapters, against solo runs and the bare engine.

    python -m benchmarks.server_load --model random:tiny-gqa --adapters 50 --streams 500 --requests 5000

Starts `slora-jax serve MODEL --adapters DIR` with random adapters, and is itself the outside load generator: so many
streams at the same time, each asking again when it is answered. Every answer's token ids are held against the same
request's answer when it was alone; /health is asked all the while, by a process of its own; the server's memory is
watched. Then the same requests go through Engine.generate in a process of its own. Needs aiohttp (extra dev).

The share of the bare engine's rate means something only for a model whose steps take milliseconds: beside
random:tiny-gqa, whose steps take microseconds, it says how many calls a second Python can answer. On a machine with few
cores server, load generator and model share them; cpu_seconds are those of the process alone. --cpus gives the server,
and then the bare engine, processors of their own, and the load generator the others, as if it were outside.

--simulated-step-ms measures the host's work alone, on a machine without a GPU as beside one: the device's work is
waited for and not done (benchmarks.server_load.simulated). Its tokens are random, so it wants --distinct 0.

Where kernels are not batch-invariant an answer may differ from its solo run in a late token, unless --deterministic is
given; it is lost if it is cut short or never comes, and mixed up if it is the solo answer to another request. With
--distinct 0 all requests differ, and their answers are counted only.
"""

import argparse
import asyncio
from collections.abc import Collection, Iterator
import contextlib
import json
import os
from pathlib import Path
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.record import RESULTS, write_result
from benchmarks.server_load.client import drive
from benchmarks.server_load.progress import say
from benchmarks.server_load.simulated import install
from benchmarks.server_load.workload import Ask, engine_config, measured, serve_flags, warming, write_adapters
from slora_jax import Engine, Request, SamplingParams


def run_server(args: argparse.Namespace, adapters: Path) -> dict[str, Any]:
    """The load on a server in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    own = ["--port", str(port), "--adapters", str(adapters), "--model-name", args.name, "--log-level", "warning"]
    program = ["slora_jax"]
    if args.simulated_step_ms:
        program = ["benchmarks.server_load.simulated", str(args.simulated_step_ms)]
    command = [sys.executable, "-m", *program, "serve", args.model, *own, *serve_flags(args)]
    with on_cpus(args.cpus):
        process = subprocess.Popen(command)
    try:
        return asyncio.run(drive(args, port, process))
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def on_cpus(cpus: Collection[int]) -> Iterator[None]:
    """What is started in here runs on these processors, and this process then on the others. Without any it is all
    the same where. SystemExit names those that this machine does not have.
    """
    if not cpus:
        yield
        return
    every = os.sched_getaffinity(0) | set(cpus)
    if missing := sorted(set(cpus) - set(range(os.cpu_count() or 1))):
        raise SystemExit(f"--cpus names processors {missing}, but there are only 0 to {(os.cpu_count() or 1) - 1}")
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, every - set(cpus) or every)


def run_bare(args: argparse.Namespace, adapters: Path) -> None:
    """The same requests through Engine.generate; prints JSON."""

    def request(ask: Ask) -> Request:
        params = SamplingParams(max_tokens=ask.answer, ignore_eos=True)
        return Request(None, ask.adapter, params, ask.prompt)

    if args.simulated_step_ms:
        install(args.simulated_step_ms)
    began, asks = time.monotonic(), [request(ask) for ask in measured(args)]
    directory = adapters if args.adapters else None
    with Engine.from_pretrained(args.model, engine_config(args), directory) as engine:
        ready = time.monotonic() - began
        say(f"the bare engine was ready after {ready:.1f} s; warming it up")
        for future in [engine.prefetch_adapter(name) for name in {r.adapter for r in asks if r.adapter}]:
            future.result()
        engine.generate([request(ask) for ask in warming(args)[: args.streams]])
        if args.distinct != 0:
            engine.generate(asks)
        say(f"measuring {args.requests} requests")
        start, spent = time.monotonic(), time.process_time()
        engine.generate([asks[i % len(asks)] for i in range(args.requests)])
        elapsed, spent = time.monotonic() - start, time.process_time() - spent
    tokens = sum(asks[i % len(asks)].sampling.max_tokens for i in range(args.requests))
    rates = dict(
        requests_per_second=args.requests / elapsed,
        cpu_seconds_per_request=spent / args.requests,
        tokens_per_second=tokens / elapsed,
    )
    print(json.dumps(dict(seconds_until_ready=ready, seconds=elapsed, **rates)))


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    given = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(given)
    args.name = "base"
    if args.bare:
        run_bare(args, args.bare)
        return None
    with tempfile.TemporaryDirectory() as made:
        write_adapters(Path(made), args)
        say(f"{args.adapters} adapters are written; starting the server")
        server = run_server(args, Path(made))
        say(f"the server answered {server['requests_per_second']:.2f} requests/s; starting the bare engine")
        command = [sys.executable, "-m", "benchmarks.server_load", *given, "--bare", made]
        with on_cpus(args.cpus):
            bare_process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines, _ = bare_process.communicate()
    if bare_process.returncode:
        raise SystemExit(f"the bare engine ended with status {bare_process.returncode}")
    bare = json.loads(lines.splitlines()[-1])
    say(f"the bare engine answered {bare['requests_per_second']:.2f} requests/s")
    result = dict(
        model=args.model,
        device="simulated: steps only take time, tokens are random" if args.simulated_step_ms else "real",
        settings={name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        server=server,
        bare_engine=bare,
        share_of_bare_engine=server["requests_per_second"] / bare["requests_per_second"],
        cpu_seconds_of_serving_a_request=server["cpu_seconds_per_request"] - bare["cpu_seconds_per_request"],
        load_average=os.getloadavg(),
    )
    write_result(args.json, result)
    print(json.dumps(result, indent=1))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:tiny-gqa")
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--rank", type=_numbers, default=[8], help="ranks of adapters in turn, as in 64,32,16,8")
    parser.add_argument("--targets", default="q,v")
    parser.add_argument("--share-weights", action="store_true", help="adapters of one rank lie in one file")
    parser.add_argument("--streams", type=int, default=500, help="at the same time")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--distinct", type=int, help="different requests (default: one an adapter); 0: all of them")
    parser.add_argument("--prompt", type=_lengths, default=(8, 32), help="prompt lengths: lowest, highest plus one")
    parser.add_argument("--answer", type=_lengths, default=(16, 17), help="tokens of every answer: one number, or two")
    parser.add_argument("--max-seqs", type=int, default=64)
    for name in ("--seq-buckets", "--token-buckets"):
        parser.add_argument(name, type=_numbers, help="sizes of steps, of the server and of the bare engine")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--page-pool", type=int, help="bytes")
    parser.add_argument("--dtype")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--cpus", type=_numbers, default=[], help="of the server, as in 0,1 (default: all)")
    parser.add_argument(
        "--simulated-step-ms", type=float, help="no device: a step of --max-seqs tokens takes this time"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="longest silence of the server, in seconds")
    parser.add_argument("--json", type=Path, default=RESULTS / "server_load.json")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)  # the process of the bare engine
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _lengths(text: str) -> tuple[int, int]:
    low, *high = _numbers(text)
    return (low, high[0]) if high else (low, low + 1)


if __name__ == "__main__":
    main()
