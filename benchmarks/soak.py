"""Random load for so many minutes, with everything that can go wrong with adapters; then every answer is checked.

    python -m benchmarks.soak --minutes 8 --shape llama-2-7b

Requests arrive at random, are cancelled at random, and name adapters that are added, removed and replaced under the
same name meanwhile, some of which cannot be read. Pages and host memory hold only a few adapters. Afterwards each
answer must be that of the contents its name had when the request came, computed alone; no page may be lost and no byte
of host memory left; the process must not have grown.

Exact equality needs an engine whose answers do not depend on the batch: float32 on a CPU, or deterministic mode.
"""

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence
import dataclasses
import os
from pathlib import Path
import random
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, write_result
from pallas_kernels.geometry import MODULES
from slora_jax import Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapters import random_adapter, save_adapter
from slora_jax.async_deltas import AsyncDeltas
from slora_jax.loading import load_model
from slora_jax.memory import page_bytes

BASE, BROKEN = -1, -2  # contents that are no adapter's
_MOST_GROWTH, _MOST_DRIFT = 0.1, 0.05


@dataclasses.dataclass
class Asked:
    """A request, what its adapter's name meant when it came, at which second (monotonic), and what it got."""

    contents: int
    prompt: int
    answer: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: str | None = None
    error: str | None = None
    cancelled: bool = False
    at: float = dataclasses.field(default_factory=time.monotonic)


class Soak:
    """One run against one engine. contents: the adapters that names may point at."""

    def __init__(self, engine: Engine, contents: Sequence[Any], root: Path, seed: int, rate: float):
        self.engine = engine
        self.contents = contents
        self.root = root
        self.random = random.Random(seed)
        self.rate = rate
        rng = np.random.default_rng(seed)
        vocab, longest = engine.model.config.vocab_size, min(engine.max_model_len // 2, 160)
        self.prompts = [rng.integers(3, vocab, int(n)).tolist() for n in np.linspace(1, longest, 6)]
        self.answers = [1, 12, 40]
        self.names: dict[str, int] = {}
        self.asked: list[Asked] = []
        self.actions: Counter[str] = Counter()
        self.memory: list[int] = []
        self._versions = 0

    async def run(self, seconds: float) -> None:
        """Acts at random, with about `rate` requests a second."""
        end, tasks, next_look = time.monotonic() + seconds, set(), 0.0
        while time.monotonic() < end:
            await asyncio.sleep(self.random.expovariate(self.rate))
            if time.monotonic() > next_look:
                next_look = time.monotonic() + seconds / 40
                await asyncio.to_thread(self.look)
            kinds = ("ask", "add", "remove", "break", "prefetch", "unfile")
            action = self.random.choices(kinds, (100, 8, 2, 2, 3, 1))[0]
            self.actions[action] += 1
            if action == "ask":
                tasks = {task for task in tasks if not task.done()}
                if len(tasks) < 200:
                    tasks.add(asyncio.create_task(self.follow(*await self.ask())))
            else:
                await asyncio.to_thread(getattr(self, action if action != "break" else "add_broken"))
        await asyncio.gather(*tasks)

    async def ask(self) -> tuple[Asked, AsyncDeltas]:
        """Starts a request. What its name means is settled when this returns."""
        name = self.random.choice([None, *self.names])
        asked = Asked(
            BASE if name is None else self.names[name],
            self.random.randrange(len(self.prompts)),
            self.random.choice(self.answers),
        )
        params = SamplingParams(max_tokens=asked.answer, ignore_eos=True)
        deltas = await self.engine.astart([Request(None, name, params, self.prompts[asked.prompt])])
        self.asked.append(asked)
        return asked, deltas

    async def follow(self, asked: Asked, deltas: AsyncDeltas) -> None:
        """Takes the answer, or leaves after a few tokens."""
        leave_after = self.random.randrange(asked.answer) if self.random.random() < 0.15 else None
        try:
            if leave_after == 0:
                asked.cancelled = True
                return
            async for _, delta in deltas:
                asked.tokens += delta.token_ids
                if delta.output is not None:
                    asked.reason, asked.error = delta.finish_reason, delta.output.completions[0].error
                elif leave_after is not None and len(asked.tokens) >= leave_after:
                    asked.cancelled = True
                    return
        finally:
            deltas.close()

    def add(self) -> None:
        """A new name, or other contents under an old one, as weights or as files."""
        name, which = f"n{self.random.randrange(8)}", self.random.randrange(len(self.contents))
        source = self.contents[which]
        lazy = self.random.random() < 0.7
        self.engine.add_adapter(name, self._write(which) if lazy else source, lazy=lazy)
        self.names[name] = which

    def add_broken(self) -> None:
        """Files whose header is right and whose tensors are not."""
        path = self._write(0)
        weights = path / "adapter_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-4:] = b"\xff" * 4  # NaN in every dtype
        weights.unlink()  # the others keep theirs
        weights.write_bytes(data)
        name = f"n{self.random.randrange(8)}"
        self.engine.add_adapter(name, path, lazy=True)
        self.names[name] = BROKEN

    def unfile(self) -> None:
        """Files that vanish after they were added."""
        path = self._write(0)
        name = f"n{self.random.randrange(8)}"
        self.engine.add_adapter(name, path, lazy=True)
        (path / "adapter_model.safetensors").unlink()
        self.names[name] = BROKEN

    def remove(self) -> None:
        if self.names:
            name = self.random.choice(list(self.names))
            del self.names[name]
            try:
                self.engine.remove_adapter(name, timeout=0)
            except TimeoutError:
                self.actions["removed in use"] += 1

    def prefetch(self) -> None:
        if self.names:
            future = self.engine.prefetch_adapter(self.random.choice(list(self.names)))
            future.add_done_callback(lambda f: f.exception())

    def look(self) -> None:
        """What must hold at any moment."""
        self.engine.check_integrity()
        host = self.engine.stats()["adapter_tiers"]["host"]
        assert host["bytes"] <= host["budget"], "host memory is over its budget"
        with open("/proc/self/statm") as file:
            self.memory.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    def check(self) -> dict[str, Any]:
        """Compares every answer with that of the same contents alone, and looks for what was left behind."""
        engine, wrong = self.engine, Counter[str]()
        examples: list[dict[str, Any]] = []
        for name in list(self.names):
            engine.remove_adapter(name)
        alone = {i: f"alone-{i}" for i in range(len(self.contents))}
        for i, name in alone.items():
            engine.add_adapter(name, self.contents[i])
        known: dict[tuple[int, int], list[int]] = {}
        for asked in self.asked:
            if asked.contents == BROKEN:
                if asked.tokens or not (asked.cancelled or asked.error):
                    wrong["a broken adapter answered"] += 1
                continue
            key = asked.contents, asked.prompt
            if key not in known:
                params = SamplingParams(max_tokens=max(self.answers), ignore_eos=True)
                name = None if asked.contents == BASE else alone[asked.contents]
                known[key] = engine.generate([Request(None, name, params, self.prompts[asked.prompt])])[0].token_ids
            what = self._what_is_wrong(asked, known[key])
            if what:
                wrong[what] += 1
                same = [a == b for a, b in zip(asked.tokens, known[key], strict=False)]
                examples.append(
                    dict(
                        what=what,
                        after_seconds=asked.at - self.asked[0].at,
                        contents=asked.contents,
                        prompt_tokens=len(self.prompts[asked.prompt]),
                        tokens=len(asked.tokens),
                        first_wrong=same.index(False) if False in same else None,
                    )
                )
        for name in alone.values():
            engine.remove_adapter(name)
        engine.check_integrity()
        stats = engine.stats()
        pages = stats["pages"]
        grown, drift = _growth(self.memory)
        left = pages["kv"] + pages["adapter"] + pages["idle_adapter"]
        return dict(
            requests=len(self.asked),
            finished=sum(not a.cancelled for a in self.asked),
            cancelled=sum(a.cancelled for a in self.asked),
            failed_as_they_must=sum(a.contents == BROKEN for a in self.asked),
            wrong=dict(wrong),
            examples=examples[:20],
            leaked_pages=left,
            host_bytes_left=stats["adapter_tiers"]["host"]["bytes"],
            memory_growth=grown,
            memory_drift=drift,
            memory_bytes=self.memory,
            preemptions=stats["preemptions"],
            tiers=stats["adapter_tiers"],
            actions=dict(self.actions),
            ok=not wrong
            and not left
            and not stats["adapter_tiers"]["host"]["bytes"]
            and grown < _MOST_GROWTH
            and drift < _MOST_DRIFT,
        )

    @staticmethod
    def _what_is_wrong(asked: Asked, alone: list[int]) -> str:
        """Of a request whose adapter can be read. alone: the tokens of its solo run."""
        if not asked.cancelled and asked.reason != "length":
            return f"ended with {asked.reason}: {asked.error}"
        if not asked.cancelled and len(asked.tokens) != asked.answer:
            return "wrong length"
        return "" if asked.tokens == alone[: len(asked.tokens)] else "differs from its solo run"

    def _write(self, which: int) -> Path:
        """A directory of its own that holds some contents, whose bytes are on the disk once."""
        first = self.root / f"contents-{which}"
        if not first.exists():
            save_adapter(self.contents[which], first)
        self._versions += 1
        path = self.root / f"version-{self._versions}"
        path.mkdir()
        for file in first.iterdir():
            os.link(file, path / file.name)
        return path


def _growth(memory: Sequence[int]) -> tuple[float, float]:
    """By how much the process has more memory at the end than a third into the run, and in the middle of the last third
    than in that of the third before, which adapters that are just being read change less.
    """
    third = len(memory) // 3
    if not third:
        return 0.0, 0.0
    drift = statistics.median(memory[-third:]) / statistics.median(memory[-2 * third : -third])
    return memory[-1] / memory[third] - 1, drift - 1


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--shape", default="tiny-gqa", help="named shape of the base model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--adapters", type=int, default=6, help="different contents")
    parser.add_argument("--targets", default=",".join(MODULES), help="projections that they adapt")
    parser.add_argument("--rate", type=float, default=30, help="actions a second")
    parser.add_argument("--max-seqs", type=int, default=16)
    parser.add_argument("--max-step-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "soak.json")
    args = parser.parse_args(argv)
    model = load_model(f"random:{args.shape}", dtype=args.dtype)
    ranks, dtype = (8, 16, 32, 64), model.params["embed"].dtype
    contents = [
        random_adapter(model.config, ranks[i % len(ranks)], args.targets.split(","), seed=i, scale=0.5, dtype=dtype)
        for i in range(args.adapters)
    ]
    page = page_bytes(model.config, args.dtype)
    pages = sorted(a.num_pages(model.config.geometry) for a in contents)
    # two of the largest adapters and a long request: pools that are too small for what is asked
    num_pages = 2 * pages[-1] + 16
    options: dict[str, Any] = dict(
        host_adapter_bytes=(pages[-1] + pages[-2]) * page,
        adapter_chunk_bytes=4 * page,
        adapter_step_bytes=8 * page,
        deterministic=True,
    )
    settings = EngineConfig(
        dtype=args.dtype,
        max_seqs=args.max_seqs,
        max_step_tokens=args.max_step_tokens,
        seq_buckets=(args.max_seqs,),
        token_buckets=(args.max_step_tokens,),
        max_model_len=min(512, model.config.max_position),
        max_lora_rank=max(ranks),
        page_pool_bytes=num_pages * page,
        **options,
    )
    with tempfile.TemporaryDirectory() as root, Engine(model, settings) as engine:
        engine.warm_up(adapters=True, greedy_only=True)
        soak = Soak(engine, contents, Path(root), args.seed, args.rate)
        began = time.monotonic()
        asyncio.run(soak.run(args.minutes * 60))
        seconds = time.monotonic() - began
        result = dict(
            shape=args.shape,
            dtype=args.dtype,
            deterministic=True,
            minutes=args.minutes,
            seconds=seconds,
            num_pages=num_pages,
            **soak.check(),
        )
    write_result(args.json, result)
    for key, value in result.items():
        print(f"{key:20} {value}")
    return result


if __name__ == "__main__":
    raise SystemExit(not main()["ok"])
