"""The random load of benchmarks.soak on the twin: the engine's scheduler, allocator, prefix cache and batches, in
simulated time.

    python -m benchmarks.soak_twin --minutes 30

Requests arrive and are cancelled at random; adapters are added, removed, replaced under the same name and unreadable;
pages hold a few adapters, host memory a few images. Instead of a device there is a memory that knows what was written
to each slot of each page, and reads what a step's batch says and nothing else. A token's value is a hash of its
adapter, of itself and of the value before it, as it lies in its page. So an answer is that of its solo run only if no
page was lost, mixed up or left from somebody else, and none was looked for where it no longer is.
Deterministic mode, results taken a step late as in the engine; a step takes what bytes and operations need on an H200.
"""

import argparse
from collections import Counter
from collections.abc import Sequence as Seq
import heapq
import os
from pathlib import Path
import random
import time
from typing import Any

import numpy as np

from benchmarks.record import write_result
from pallas_kernels.geometry import PAGE_TOKENS
from slora_jax.adapter_pages import adapter_owner
from slora_jax.adapters import AdapterShape, random_adapter
from slora_jax.batch import Batch
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.page_loads import PageLoads
from slora_jax.page_pool import PagePool
from slora_jax.policies import make_policy
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import AdapterUse, Chunk, Sequence
from slora_jax.shapes import named_shape
from slora_jax.step_plan import StepPlan
from slora_jax.twin import ideal_cost, step_work

_VOCAB = 32000
_SHAPE = "llama-2-7b"
_NAMES = 8
_IMAGES = 3  # of adapters that host memory holds
_IDLE_SECONDS = 0.002
_MAX_LEN = 320  # tokens of the longest prompt and answer, and some
_TINY = named_shape("tiny-gqa")
_ANY = random_adapter(_TINY, 4, seed=0)


class _Shapes(dict[str, AdapterShape]):
    """One shape for all digests: of an adapter's row only its pages matter here."""

    def __missing__(self, digest: str) -> AdapterShape:
        return _ANY


class Memory:
    """What a device would have in its pages, and the tokens it would sample. Raises AssertionError if a step finds what
    is not its own.
    """

    def __init__(self, pool: PagePool, rng: random.Random, builder: BatchBuilder):
        self._pool, self._random, self._builder = pool, rng, builder
        self._shapes = _Shapes()
        self._values: dict[tuple[int, int], int] = {}  # (page, slot) -> value
        self._adapters: dict[int, tuple[str, int]] = {}  # page -> digest, and which of its pages it holds
        self._last: dict[int, int] = {}  # row -> token sampled last

    @staticmethod
    def value(before: int, token: int, digest: str) -> int:
        return hash((before, token, digest))

    @staticmethod
    def token(value: int) -> int:
        return value % _VOCAB

    def run(self, plan: StepPlan) -> list[tuple[Sequence, int]]:
        """Runs a step. Returns the tokens it samples."""
        for load in plan.loads:
            pages = self._pool.pages(adapter_owner(load.adapter.digest))
            for i in range(load.start, load.stop):
                self._adapters[pages[i]] = load.adapter.digest, i
        if not plan.chunks:
            return []
        batch, _ = self._builder.build(plan.chunks, self._pool, self._shapes, decode_only=plan.decode_only)
        return [token for i, chunk in enumerate(plan.chunks) for token in self._compute(chunk, i, batch)]

    def _compute(self, chunk: Chunk, number: int, batch: Batch) -> list[tuple[Sequence, int]]:
        seq, first = chunk.seq, int(batch.q_start[number])
        pages = batch.page_tables[number].tolist()
        assert batch.kv_lens[number] == chunk.start + chunk.length, "not the sequence's length"
        row = int(batch.seg_adapter[np.searchsorted(batch.seg_start, first, "right") - 1])
        if seq.adapter:
            place = int(batch.adapters.page_start[row])
            held = [
                self._adapters.get(page)
                for page in batch.adapters.pages[place : place + seq.adapter.num_pages].tolist()
            ]
            assert held == [(seq.group, i) for i in range(seq.adapter.num_pages)], "not the adapter's weights"
        else:
            assert row < 0, "an adapter's weights"
        if chunk.start:
            some = self._random.randrange(chunk.start)
            assert self._values[self._slot(pages, some)] == self._expected(seq, some), "not the sequence's own past"
        value = self._values[self._slot(pages, chunk.start - 1)] if chunk.start else 0
        here = slice(first, first + chunk.length)
        for token, page, slot in zip(
            *(a[here].tolist() for a in (batch.tokens, batch.page_ids, batch.slots)), strict=True
        ):
            value = self.value(value, token if token >= 0 else self._last[-1 - token], seq.group)
            self._values[page, slot] = value
            self._adapters.pop(page, None)
        if not chunk.samples:
            return []
        self._last[seq.row] = self.token(value)
        return [(seq, self.token(value))]

    @staticmethod
    def _slot(pages: Seq[int], i: int) -> tuple[int, int]:
        return pages[i // PAGE_TOKENS], i % PAGE_TOKENS

    def _expected(self, seq: Sequence, i: int) -> int:
        value = 0
        for token in seq.tokens[: i + 1]:
            value = self.value(value, token, seq.group)
        return value


class TwinSoak:
    """One run. num_pages, max_seqs, max_step_tokens: of the scheduler. rate: actions a second."""

    def __init__(self, *, seed: int, rate: float, num_pages: int, max_seqs: int, max_step_tokens: int, policy: str):
        self.now, self.rate, self.random = 0.0, rate, random.Random(seed)
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(
            self.pool,
            max_seqs=max_seqs,
            max_step_tokens=max_step_tokens,
            policy=make_policy(policy, {}),
            deterministic=True,
            prefix_page_cost=1e-3,
            loads=PageLoads(4, 8),
            clock=lambda: self.now,
        )
        self.scheduler.adapters.is_ready = self._ready
        buckets = Buckets.default(max_seqs, max_step_tokens)
        builder = BatchBuilder(_TINY.geometry, buckets, num_pages, _MAX_LEN, deterministic=True)
        self.memory = Memory(self.pool, random.Random(seed + 1), builder)
        self.cost = ideal_cost(named_shape(_SHAPE), item_bytes=2)
        self.prompts = [[self.random.randrange(_VOCAB) for _ in range(n)] for n in (1, 5, 17, 40, 90, 160)]
        self.names: dict[str, AdapterUse] = {}
        self.counts: Counter[str] = Counter()
        self.resident: list[int] = []  # bytes of the process
        self.longest_wait = 0.0  # of a request for its first token
        self._images: dict[str, float] = {}  # digest -> when it is in host memory, oldest use first
        self._users: dict[str, set[Sequence]] = {}  # by digest, in flight
        self._cancels: list[tuple[float, int, Sequence]] = []

    def run(self, seconds: float) -> None:
        """Acts at random for so many simulated seconds, and then until all is answered."""
        act, look = 0.0, 0.0
        pending: tuple[StepPlan, list[tuple[Sequence, int]], float] | None = None
        while self.now < seconds or pending or self.scheduler.has_work():
            while act < min(self.now, seconds):
                self._act()
                act += self.random.expovariate(self.rate)
            self._cancel()
            self._fail()
            plan = self.scheduler.schedule()
            sampled = self.memory.run(plan)
            step = self.cost.seconds(step_work(plan.chunks, lambda _: 0)) if plan.chunks else _IDLE_SECONDS
            self.now += step
            if pending:
                self._take(*pending)
            pending = (plan, sampled, step) if plan.chunks else None
            self.counts["steps"] += bool(plan.chunks)
            self.counts["preemptions"] += len(plan.preempted)
            if self.now > look:
                look = self.now + seconds / 200
                self.pool.check_integrity()
                with open("/proc/self/statm") as file:
                    self.resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    def result(self) -> dict[str, Any]:
        """What was done, and what was left behind once all names are gone."""
        for use in list(self.names.values()):
            self.scheduler.forget_adapter(use.digest)
        assert self.scheduler.prefixes is not None
        self.scheduler.prefixes.forget(None)
        self.pool.check_integrity()
        third = self.resident[len(self.resident) // 3 :]
        adapters = self.scheduler.adapters
        return dict(
            simulated_seconds=round(self.now, 1),
            **self.counts,
            adapter_hits=adapters.hits,
            adapter_misses=adapters.misses,
            adapter_evictions=adapters.evictions,
            prefix_hit_tokens=self.scheduler.prefixes.hit_tokens,
            longest_wait_seconds=round(self.longest_wait, 2),
            leaked_pages=self.pool.num_pages - self.pool.free,
            memory_growth=third[-1] / third[0] - 1 if third else 0.0,
        )

    def _act(self) -> None:
        kinds = ("ask", "add", "remove", "break", "prefetch")
        action = self.random.choices(kinds, (100, 8, 2, 2, 3))[0]
        self.counts[action] += 1
        name = f"n{self.random.randrange(_NAMES)}"
        if action == "ask":
            self._ask()
        elif action in ("add", "break"):
            digest = f"{'broken' if action == 'break' else 'contents'}-{self.random.randrange(10**9)}"
            self._replace(name, AdapterUse(digest, self.random.choice((1, 2, 4, 7, 13)), 1e-3))
        elif action == "remove":
            self._replace(name, None)
        elif name in self.names:
            use = self.names[name]
            self.scheduler.adapters.prefetches[use.digest] = use

    def _ask(self) -> None:
        use = self.random.choice([None, *self.names.values()])
        prompt = self.random.choice(self.prompts)
        answer = self.random.choice((1, 12, 40, 120))
        number = self.counts["ask"]
        seq = Sequence(seq_id=number, tokens=list(prompt), prompt_len=len(prompt), max_tokens=answer, adapter=use)
        self.scheduler.add(seq)
        self._users.setdefault(seq.group, set()).add(seq)
        if self.random.random() < 0.15:
            heapq.heappush(self._cancels, (self.now + self.random.uniform(0.0, 0.3), number, seq))

    def _replace(self, name: str, use: AdapterUse | None) -> None:
        old = self.names.pop(name, None)
        if use is not None:
            self.names[name] = use
        if old is not None:
            self._release(old.digest)

    def _release(self, digest: str) -> None:
        """Frees what is kept of contents without a name that nobody uses."""
        if digest and not self._users.get(digest) and all(use.digest != digest for use in self.names.values()):
            self._users.pop(digest, None)
            self._images.pop(digest, None)
            self.scheduler.forget_adapter(digest)

    def _ready(self, use: AdapterUse) -> bool:
        """Whether an image is in host memory; has it read if it is not."""
        if use.digest.startswith("broken"):
            self._images.setdefault(use.digest, self.now + 0.02)
            return False
        at = self._images.pop(use.digest, None)
        self._images[use.digest] = self.now + self.random.uniform(0.002, 0.08) if at is None else at
        under_way = {other.digest for other in self.scheduler.adapters.loads.adapters()}
        for digest in [d for d, at in self._images.items() if at <= self.now and d not in under_way][:-_IMAGES]:
            if digest != use.digest:
                del self._images[digest]
        return self._images[use.digest] <= self.now

    def _fail(self) -> None:
        """Ends those that wait for an adapter that turned out to be unreadable."""
        for digest in [d for d, at in self._images.items() if at <= self.now and d.startswith("broken")]:
            del self._images[digest]
            self.scheduler.adapters.prefetches.pop(digest, None)
            for seq in list(self._users.get(digest, ())):
                assert seq.output_len == 0, "a broken adapter answered"
                self.counts["failed_as_they_must"] += 1
                self._end(seq)

    def _cancel(self) -> None:
        while self._cancels and self._cancels[0][0] <= self.now:
            seq = heapq.heappop(self._cancels)[2]
            if seq in self._users.get(seq.group, ()):
                self.counts["cancelled"] += 1
                self._end(seq)

    def _take(self, plan: StepPlan, sampled: list[tuple[Sequence, int]], seconds: float) -> None:
        self.scheduler.complete(plan, seconds)
        for seq, token in sampled:
            if seq not in self._users.get(seq.group, ()):
                continue  # it was cancelled meanwhile
            seq.push(token)
            if seq.output_len == 1:
                assert seq.arrival is not None
                self.longest_wait = max(self.longest_wait, self.now - seq.arrival)
            if seq.output_len == seq.max_tokens:
                self.counts["finished"] += 1
                assert seq.tokens == self._alone(seq), "differs from its solo run"
                self._end(seq)

    def _alone(self, seq: Sequence) -> list[int]:
        tokens, value = seq.tokens[: seq.prompt_len], 0
        for i in range(seq.prompt_len + seq.max_tokens - 1):
            value = Memory.value(value, tokens[i], seq.group)
            if i == len(tokens) - 1:
                tokens.append(Memory.token(value))
        return tokens

    def _end(self, seq: Sequence) -> None:
        self.scheduler.remove(seq)
        self._users[seq.group].remove(seq)
        self._release(seq.group)


def main(argv: Seq[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of simulated time")
    parser.add_argument("--rate", type=float, default=30, help="actions a second")
    parser.add_argument("--num-pages", type=int, default=48)
    parser.add_argument("--max-seqs", type=int, default=16)
    parser.add_argument("--max-step-tokens", type=int, default=256)
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    options = {k: v for k, v in vars(args).items() if k not in ("minutes", "json")}
    began, soak = time.monotonic(), TwinSoak(**options)
    soak.run(args.minutes * 60)
    result = dict(options, minutes=args.minutes) | soak.result() | dict(seconds=round(time.monotonic() - began, 1))
    assert not result["leaked_pages"], f"{result['leaked_pages']} pages were leaked"
    if args.json:
        write_result(args.json, result)
    for key, value in result.items():
        print(f"{key:22} {value}")
    return result


if __name__ == "__main__":
    main()
