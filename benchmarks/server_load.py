"""Load on a server process over loopback: many streams over many adapters, against solo runs and the bare engine.

    python -m benchmarks.server_load --model random:tiny-gqa --adapters 50 --streams 500 --requests 5000

Starts `slora-jax serve MODEL --adapters DIR` with random adapters, and is itself the outside load generator: so many
streams at the same time, each asking again when it is answered. Every answer's token ids are held against the same
request's answer when it was alone; /health is asked all the while, by a process of its own; the server's memory is
watched. Then the same requests go through Engine.generate in a process of its own. Needs aiohttp (extra dev).

The share of the bare engine's rate means something only for a model whose steps take milliseconds: beside
random:tiny-gqa, whose steps take microseconds, it says how many calls a second Python can answer. On a machine with few
cores server, load generator and model share them; cpu_seconds are those of the process alone.

Where kernels are not batch-invariant an answer may differ from its solo run in a late token; it is lost if it is cut
short or never comes, and mixed up if it is the solo answer to another request.
"""

import argparse
import asyncio
from collections import Counter
from collections.abc import Iterator
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

import aiohttp
import numpy as np
from safetensors.numpy import save_file

from benchmarks.record import RESULTS, write_result
from pallas_kernels.geometry import MODULES
from slora_jax import Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapters.targets import projection_name
from slora_jax.loading import load_config


def write_adapters(directory: Path, model: str, count: int, rank: int, targets: list[str]) -> None:
    """PEFT directories a-0, a-1, ... of random weights; float16."""
    config = load_config(model)
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(config.num_layers):
        for module, name in enumerate(MODULES):
            if name in targets:
                prefix = f"base_model.model.{projection_name(layer, module)}"
                shapes = {"A": (rank, config.in_sizes[module]), "B": (config.out_sizes[module], rank)}
                for factor, shape in shapes.items():
                    values = rng.standard_normal(shape, np.float32) / np.sqrt(shape[1])
                    tensors[f"{prefix}.lora_{factor}.weight"] = values.astype(np.float16)
    fields = dict(peft_type="LORA", r=rank, lora_alpha=2 * rank, target_modules=[f"{t}_proj" for t in targets])
    for index in range(count):
        path = directory / f"a-{index}"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(fields))
        scale = np.float16(1 + index / count)
        scaled = {name: np.roll(t, index, 1) * scale if "_A" in name else t for name, t in tensors.items()}
        save_file(scaled, path / "adapter_model.safetensors")


def make_requests(args: argparse.Namespace) -> list[tuple[str, list[int]]]:
    """(adapter, prompt's token ids) of every distinct request."""
    rng = np.random.default_rng(1)
    vocab = load_config(args.model).vocab_size
    low, high = map(int, args.prompt.split(","))
    names = [f"a-{i}" for i in range(args.adapters)] or [None]
    return [
        (names[i % len(names)], rng.integers(3, vocab, rng.integers(low, high)).tolist())
        for i in range(max(args.distinct, args.adapters))
    ]


class Client:
    """Asks the server, and remembers how it went."""

    def __init__(self, session: aiohttp.ClientSession, base: str, model: str, tokens: int):
        self._session, self._base, self._model, self._tokens = session, base, model, tokens
        self.ttft: list[float] = []
        self.latency: list[float] = []

    async def ask(self, adapter: str | None, prompt: list[int]) -> list[int] | str:
        """Token ids of an answer, or what went wrong."""
        body = dict(
            model=adapter or self._model, prompt=prompt, max_tokens=self._tokens, temperature=0, ignore_eos=True,
            stream=True, return_token_ids=True,
        )  # fmt: skip
        start, ids, ended = time.monotonic(), list[int](), False
        try:
            async with self._session.post(f"{self._base}/v1/completions", json=body) as response:
                if response.status != 200:
                    return f"status {response.status}"
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line == b"data: [DONE]\n":
                        ended = True
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        return event["error"]["message"]
                    if not ids:
                        self.ttft.append(time.monotonic() - start)
                    ids += event["choices"][0]["token_ids"]
        except (aiohttp.ClientError, OSError) as error:
            return type(error).__name__
        self.latency.append(time.monotonic() - start)
        return ids if ended and len(ids) == self._tokens else "cut short"


@contextlib.contextmanager
def watch_health(port: int, took: list[float]) -> Iterator[None]:
    """Appends how long answers of /health took meanwhile."""
    command = [sys.executable, "-m", "benchmarks.ask_health", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        yield
        took += json.loads(process.communicate()[0])
    finally:
        process.kill()


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


async def watch_memory(pid: int, samples: list[int]) -> None:
    while True:
        samples.append(resident_bytes(pid))
        await asyncio.sleep(0.5)


def seconds(values: list[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)} | {"max": max(values)} if values else {}


async def drive(args: argparse.Namespace, port: int, pid: int, distinct: list[tuple[str, list[int]]]) -> dict[str, Any]:
    base = f"http://127.0.0.1:{port}"
    timeout = aiohttp.ClientTimeout(total=None, sock_read=args.timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        while True:
            try:
                async with session.get(f"{base}/ready") as response:
                    if response.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
        client = Client(session, base, args.name, args.answer)
        alone = [await client.ask(*request) for request in distinct]
        bad = [answer for answer in alone if isinstance(answer, str)]
        if bad:
            raise SystemExit(f"a request alone failed: {bad[0]}")
        await asyncio.gather(*(client.ask(*distinct[i % len(distinct)]) for i in range(args.streams)))  # warm
        client = Client(session, base, args.name, args.answer)
        left, outcome, memory = iter(range(args.requests)), Counter[str](), list[int]()
        owners = {tuple(answer): i for i, answer in enumerate(alone)}

        async def stream() -> None:
            for number in left:
                index = number % len(distinct)
                answer = await client.ask(*distinct[index])
                if isinstance(answer, str):
                    outcome[f"lost: {answer}"] += 1
                elif answer == alone[index]:
                    outcome["as alone"] += 1
                else:
                    outcome["mixed up" if tuple(answer) in owners else "other tokens than alone"] += 1

        health = list[float]()
        with watch_health(port, health):
            watcher = asyncio.create_task(watch_memory(pid, memory))
            start, spent = time.monotonic(), cpu_seconds(pid)
            await asyncio.gather(*(stream() for _ in range(args.streams)))
            elapsed, spent = time.monotonic() - start, cpu_seconds(pid) - spent
            watcher.cancel()
        tenth = max(1, len(memory) // 10)
        return dict(
            seconds=elapsed,
            requests_per_second=args.requests / elapsed,
            cpu_seconds_per_request=spent / args.requests,
            outcome=dict(outcome),
            ttft_seconds=seconds(client.ttft),
            latency_seconds=seconds(client.latency),
            health_seconds=seconds(health),
            resident_bytes=dict(
                first_tenth=max(memory[:tenth]), last_tenth=max(memory[-tenth:]), max=max(memory), samples=len(memory)
            ),
        )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    pool = args.page_pool
    return EngineConfig(dtype=args.dtype, max_seqs=args.max_seqs, page_pool_bytes=pool, max_lora_rank=args.rank)


def run_bare(args: argparse.Namespace, adapters: Path) -> None:
    """The same requests through Engine.generate; prints JSON."""
    distinct = make_requests(args)
    params = SamplingParams(max_tokens=args.answer, ignore_eos=True)
    requests = [
        Request(None, adapter, params, prompt)
        for adapter, prompt in (distinct[i % len(distinct)] for i in range(args.requests))
    ]
    sources = {f"a-{i}": adapters / f"a-{i}" for i in range(args.adapters)}
    with Engine.from_pretrained(args.model, engine_config(args), sources) as engine:
        engine.warm_up(adapters=True)
        engine.generate(requests[: args.streams])
        start, spent = time.monotonic(), time.process_time()
        engine.generate(requests)
        elapsed, spent = time.monotonic() - start, time.process_time() - spent
        rates = dict(requests_per_second=args.requests / elapsed, cpu_seconds_per_request=spent / args.requests)
        print(json.dumps(dict(seconds=elapsed, **rates)))


def run_server(args: argparse.Namespace, adapters: Path) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options: dict[str, Any] = {
        "--port": port, "--adapters": adapters, "--model-name": args.name, "--max-seqs": args.max_seqs,
        "--max-lora-rank": args.rank, "--max-queue": args.streams, "--dtype": args.dtype, "--page-pool": args.page_pool,
        "--log-level": "warning",
    }  # fmt: skip
    flags = [str(part) for pair in options.items() if pair[1] is not None for part in pair]
    command = [sys.executable, "-m", "slora_jax", "serve", args.model, "--quiet", *flags]
    process = subprocess.Popen(command)
    try:
        result = asyncio.run(drive(args, port, process.pid, make_requests(args)))
    finally:
        process.terminate()
        process.wait(60)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:tiny-gqa")
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="q,v")
    parser.add_argument("--streams", type=int, default=500, help="at the same time")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--distinct", type=int, default=0, help="different requests; at least one an adapter")
    parser.add_argument("--prompt", default="8,32", help="prompt lengths: lowest, highest plus one")
    parser.add_argument("--answer", type=int, default=16, help="tokens of every answer")
    parser.add_argument("--max-seqs", type=int, default=64)
    parser.add_argument("--page-pool", type=int, default=None, help="bytes")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--timeout", type=float, default=600.0, help="longest silence of the server, in seconds")
    parser.add_argument("--json", type=Path, default=RESULTS / "server_load.json")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)  # the process of the bare engine
    args = parser.parse_args()
    args.name = "base"
    if args.bare:
        run_bare(args, args.bare)
        return
    with tempfile.TemporaryDirectory() as made:
        write_adapters(Path(made), args.model, args.adapters, args.rank, args.targets.split(","))
        server = run_server(args, Path(made))
        command = [sys.executable, "-m", "benchmarks.server_load", *sys.argv[1:], "--bare", made]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    bare = json.loads(done.stdout.splitlines()[-1])
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    share = server["requests_per_second"] / bare["requests_per_second"]
    overhead = server["cpu_seconds_per_request"] - bare["cpu_seconds_per_request"]
    result = dict(
        model=args.model,
        settings=settings,
        server=server,
        bare_engine=bare,
        share_of_bare_engine=share,
        cpu_seconds_of_serving_a_request=overhead,
        load_average=os.getloadavg(),
    )
    write_result(args.json, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
