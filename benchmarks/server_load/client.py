"""The outside load generator: streams of calls, what came of them, and how the server was meanwhile."""

import argparse
import asyncio
from collections import Counter
from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import aiohttp
import numpy as np

from benchmarks.server_load.progress import say, say_answered
from benchmarks.server_load.workload import Ask, measured, warming


class Client:
    """Asks the server, and remembers how it went."""

    def __init__(self, session: aiohttp.ClientSession, base: str, model: str):
        self._session, self._base, self._model = session, base, model
        self.ttft: list[float] = []
        self.latency: list[float] = []
        self.tokens = 0  # received
        self.events = 0  # that brought them

    async def ask(self, ask: Ask) -> list[int] | str:
        """Token ids of an answer, or what went wrong."""
        body = dict(
            model=ask.adapter or self._model, prompt=ask.prompt, max_tokens=ask.answer, temperature=0, ignore_eos=True,
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
                    self.events += 1
        except (aiohttp.ClientError, OSError) as error:
            return type(error).__name__
        self.latency.append(time.monotonic() - start)
        self.tokens += len(ids)
        return ids if ended and len(ids) == ask.answer else "cut short"

    async def prefetch(self, adapter: str) -> None:
        """Has the server bring an adapter to host memory."""
        async with self._session.post(f"{self._base}/v1/prefetch_lora_adapter", json={"lora_name": adapter}) as answer:
            answer.raise_for_status()


async def drive(args: argparse.Namespace, port: int, process: subprocess.Popen) -> dict[str, Any]:
    """Warms the server up, then measures. Raises SystemExit if it does not answer as it should before that."""
    base = f"http://127.0.0.1:{port}"
    timeout = aiohttp.ClientTimeout(total=None, sock_read=args.timeout)
    began = time.monotonic()
    # shorter than the server keeps an idle connection, which may end just when it is to be used again
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await _until_ready(session, base, process)
        ready = time.monotonic() - began
        say(f"the server was ready after {ready:.1f} s; warming it up")
        asks = measured(args)
        client = Client(session, base, args.name)
        await asyncio.gather(*(client.prefetch(name) for name in {a.adapter for a in asks if a.adapter}))
        answers = await asyncio.gather(*(client.ask(ask) for ask in warming(args)[: args.streams]))
        if bad := [answer for answer in answers if isinstance(answer, str)]:
            raise SystemExit(f"a request failed before the measurement: {bad[0]}")
        if args.distinct != 0:
            say(f"asking {len(asks)} requests alone")
        alone = None if args.distinct == 0 else [await client.ask(ask) for ask in asks]
        if bad := [answer for answer in alone or () if isinstance(answer, str)]:
            raise SystemExit(f"a request alone failed: {bad[0]}")
        say(f"measuring {args.requests} requests in {args.streams} streams")
        return dict(seconds_until_ready=ready) | await _measure(args, Client(session, base, args.name), alone, process)


async def _until_ready(session: aiohttp.ClientSession, base: str, process: subprocess.Popen) -> None:
    while process.poll() is None:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{base}/ready") as response:
                if response.status == 200:
                    return
        await asyncio.sleep(0.2)
    raise SystemExit(f"the server ended with status {process.returncode}")


async def _measure(
    args: argparse.Namespace, client: Client, alone: list[list[int] | str] | None, process: subprocess.Popen
) -> dict[str, Any]:
    """alone: each request's answer when it was alone; None: the answers are only counted."""
    asks = measured(args)
    owners = {tuple(answer) for answer in alone or ()}
    left, outcome = iter(range(args.requests)), Counter[str]()

    async def stream() -> None:
        for number in left:
            index = number % len(asks)
            answer = await client.ask(asks[index])
            if isinstance(answer, str):
                outcome[f"lost: {answer}"] += 1
            elif alone is None:
                outcome["complete"] += 1
            elif answer == alone[index]:
                outcome["as alone"] += 1
            else:
                outcome["mixed up" if tuple(answer) in owners else "other tokens than alone"] += 1

    health, memory = list[float](), list[int]()
    with watch_health(int(client._base.rpartition(":")[2]), health):
        watchers = [
            asyncio.create_task(_watch_memory(process.pid, memory)),
            asyncio.create_task(say_answered(outcome, args.requests)),
        ]
        main_thread = Path(f"/proc/{process.pid}/task/{process.pid}")  # runs the event loop
        start, spent, loop = time.monotonic(), cpu_seconds(process.pid), cpu_seconds_of(main_thread)
        await asyncio.gather(*(stream() for _ in range(args.streams)))
        elapsed = time.monotonic() - start
        spent, loop = cpu_seconds(process.pid) - spent, cpu_seconds_of(main_thread) - loop
        for watcher in watchers:
            watcher.cancel()
    tenth = max(1, len(memory) // 10)
    return dict(
        seconds=elapsed,
        requests_per_second=args.requests / elapsed,
        cpu_seconds_per_request=spent / args.requests,
        tokens_per_second=client.tokens / elapsed,
        event_loop_microseconds_per_token=loop / max(1, client.tokens) * 1e6,
        tokens_per_event=client.tokens / max(1, client.events),
        outcome=dict(outcome),
        ttft_seconds=_spread(client.ttft),
        latency_seconds=_spread(client.latency),
        health_seconds=_spread(health) | dict(asked=len(health)),
        resident_bytes=dict(
            first_tenth=max(memory[:tenth]), last_tenth=max(memory[-tenth:]), max=max(memory), samples=len(memory)
        ),
    )


@contextlib.contextmanager
def watch_health(port: int, took: list[float]) -> Iterator[None]:
    """Appends how long answers of /health took meanwhile."""
    command = [sys.executable, "-m", "benchmarks.server_load.ask_health", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        yield
        took += json.loads(process.communicate()[0])
    finally:
        process.kill()


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken, of all its threads."""
    return cpu_seconds_of(Path(f"/proc/{pid}"))


def cpu_seconds_of(process: Path) -> float:
    """Processor time of a process, or of one thread, by its directory in /proc."""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


async def _watch_memory(pid: int, samples: list[int]) -> None:
    while True:
        samples.append(resident_bytes(pid))
        await asyncio.sleep(0.5)


def _spread(values: list[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)} | {"max": max(values)} if values else {}
