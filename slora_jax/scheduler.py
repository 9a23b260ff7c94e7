"""Decides what the next step computes. Pure host code, no jax: the same code runs against a simulator.

Continuous batching with chunked prefill: every running sequence's next token first, then prompt chunks up to the step's
token budget. Pages are taken as they are needed; when none can be had the sequence admitted last gives its own back and
is recomputed later (S-LoRA reserves the worst case at admission instead and leaves memory idle).
"""

from collections import deque
from collections.abc import Hashable
import dataclasses

from pallas_kernels.geometry import PAGE_TOKENS, ceil_div
from slora_jax.page_pool import OutOfPages, PagePool
from slora_jax.sequence import AdapterUse, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``start + length`` of a sequence, to be computed in this step."""

    seq: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's end, so that its next token is wanted."""
        return self.start + self.length == len(self.seq.tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Chunks are in batch order: single tokens first, then longer chunks, each part grouped by adapter."""

    chunks: list[Chunk]
    loads: list[AdapterUse]  # adapters whose weights must be written to their pages before the step
    preempted: list[Sequence]

    @property
    def num_tokens(self) -> int:
        return sum(c.length for c in self.chunks)


def sequence_owner(seq: Sequence) -> Hashable:
    return ("seq", seq.seq_id)


def adapter_owner(digest: str) -> Hashable:
    return ("adapter", digest)


class Scheduler:
    """First come, first served over one page pool.

    max_seqs: sequences in a step at most. max_step_tokens: tokens in a step at most.
    """

    def __init__(self, pool: PagePool, *, max_seqs: int, max_step_tokens: int):
        if max_step_tokens < max_seqs:
            raise ValueError(f"max_step_tokens {max_step_tokens} must be at least max_seqs {max_seqs}")
        self.pool = pool
        self.max_seqs = max_seqs
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self._adapter_users: dict[str, int] = {}

    def add(self, seq: Sequence) -> None:
        """Queues a sequence. Raises ValueError if it could never fit in the pool, even alone."""
        if seq.worst_case_pages > self.pool.num_pages:
            raise ValueError(f"{seq.worst_case_pages} pages needed, the pool has {self.pool.num_pages}")
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Takes a finished or cancelled sequence out and frees its pages at once."""
        if seq in self.running:
            self.running.remove(seq)
            self._give_back(seq)
        else:
            self.waiting.remove(seq)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def adapter_in_use(self, digest: str) -> bool:
        return digest in self._adapter_users

    def schedule(self) -> StepPlan:
        """Plans a step and takes the pages it needs. Empty only if there is nothing to do."""
        budget = self.max_step_tokens
        chunks: list[Chunk] = []
        loads: list[AdapterUse] = []
        preempted: list[Sequence] = []
        # a token of every decoding sequence before any prompt, so that running answers keep their pace
        for decoding in (True, False):
            for seq in [s for s in self.running if (s.num_pending == 1) == decoding]:
                length = min(seq.num_pending, budget)
                if length and seq in self.running and self._grow(seq, length, preempted):
                    chunks.append(Chunk(seq, seq.num_computed, length))
                    budget -= length
        chunks = [c for c in chunks if c.seq not in preempted]
        while not preempted and self.waiting and budget and len(self.running) < self.max_seqs:
            seq = self.waiting[0]
            if not self._admit(seq, loads):
                break
            self.waiting.popleft()
            length = min(seq.num_pending, budget)
            chunks.append(Chunk(seq, seq.num_computed, length))
            budget -= length
        # a sequence preempted in this step goes before everything that was waiting, in its old order
        self.waiting.extendleft(preempted)
        chunks.sort(key=lambda c: (c.length > 1, c.seq.adapter.digest if c.seq.adapter else ""))
        return StepPlan(chunks, loads, preempted)

    def complete(self, plan: StepPlan) -> None:
        """Records that a plan's tokens are in their pages. The caller then appends sampled tokens to the sequences."""
        for chunk in plan.chunks:
            chunk.seq.num_computed = chunk.start + chunk.length

    def reset(self) -> None:
        """Drops every page's contents, because the device lost them. No sequence may be running."""
        assert not self.running
        for owner in list(self.pool.owners()):
            self.pool.release(owner)

    def _missing_pages(self, seq: Sequence, length: int) -> int:
        owner = sequence_owner(seq)
        held = len(self.pool.pages(owner)) if self.pool.holds(owner) else 0
        return ceil_div(seq.num_computed + length, PAGE_TOKENS) - held

    def _grow(self, seq: Sequence, length: int, preempted: list[Sequence]) -> bool:
        """Gets the pages for the next `length` tokens, preempting from the end of the line. False if `seq` itself had
        to go.
        """
        missing = self._missing_pages(seq, length)
        while missing > 0:
            try:
                self.pool.allocate(sequence_owner(seq), missing)
                return True
            except OutOfPages:
                victim = self.running.pop()
                self._give_back(victim)
                victim.num_computed = 0
                victim.preemptions += 1
                preempted.append(victim)
                if victim is seq:
                    return False
        return True

    def _admit(self, seq: Sequence, loads: list[AdapterUse]) -> bool:
        """Starts a waiting sequence if its adapter and its tokens fit beside a spare page for each running sequence."""
        need = self._missing_pages(seq, len(seq.tokens))
        adapter = seq.adapter
        resident = adapter is not None and self.pool.holds(adapter_owner(adapter.digest))
        available = self.pool.available
        if adapter is not None:
            if not resident:
                need += adapter.num_pages
            elif self.pool.is_idle(adapter_owner(adapter.digest)):
                available -= adapter.num_pages  # its own idle pages cannot be evicted for it
        if need + len(self.running) > available:
            return False
        if adapter is not None:
            owner = adapter_owner(adapter.digest)
            if not resident:
                self.pool.allocate(owner, adapter.num_pages, adapter.reload_cost)
                loads.append(adapter)
            elif self.pool.is_idle(owner):
                self.pool.revive(owner)
            self._adapter_users[adapter.digest] = self._adapter_users.get(adapter.digest, 0) + 1
        self.pool.allocate(sequence_owner(seq), self._missing_pages(seq, len(seq.tokens)))
        self.running.append(seq)
        return True

    def _give_back(self, seq: Sequence) -> None:
        self.pool.release(sequence_owner(seq))
        if seq.adapter is not None:
            digest = seq.adapter.digest
            self._adapter_users[digest] -= 1
            if not self._adapter_users[digest]:
                del self._adapter_users[digest]
                self.pool.retire(adapter_owner(digest))
