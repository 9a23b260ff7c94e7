"""Decides what the next step computes. Pure host code, no jax: the same code runs against a simulator.

Continuous batching with chunked prefill: every running sequence's next token first, then prompt chunks up to the step's
token budget. Pages are taken as they are needed; when none can be had a sequence gives its own back and is recomputed
later (S-LoRA reserves the worst case at admission instead and leaves memory idle).

A policy says in which order waiting sequences are tried. One that does not fit is overtaken by others that do, but only
so often: then nobody is admitted before it. One whose adapter is not in host memory yet holds up nobody.

A step may be planned while the one before it still runs: its sampled tokens then count as tokens whose values are not
known yet. The device runs steps in order, so pages change hands as soon as nothing that is planned needs them.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
import dataclasses
import itertools
import time

from pallas_kernels.geometry import PAGE_TOKENS, ceil_div
from slora_jax.adapter_pages import AdapterPages
from slora_jax.page_loads import Load, PageLoads
from slora_jax.page_pool import OutOfPages, PagePool
from slora_jax.policies import Drop, Fcfs, Policy, Quotas, View
from slora_jax.prefix_cache import PrefixCache
from slora_jax.sequence import AdapterUse, Chunk, Sequence

_TRIES = 64  # sequences that may be found not to fit in one step, so that planning takes bounded time


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Chunks are in batch order: single tokens first, then longer chunks, each part grouped by adapter."""

    chunks: list[Chunk]
    loads: list[Load]  # what must be written to adapters' pages before the step
    preempted: list[Sequence]
    dropped: list[Drop] = dataclasses.field(default_factory=list)  # given up by the policy; they are no longer queued
    admitted: list[Sequence] = dataclasses.field(default_factory=list)  # started, or started again
    decode_only: bool | None = None  # which of its two kinds the step is of, where kinds are not mixed

    @property
    def num_tokens(self) -> int:
        return sum(c.length for c in self.chunks)


def sequence_owner(seq: Sequence) -> Hashable:
    return ("seq", seq.seq_id)


class Scheduler:
    """Shares one page pool and the tokens of each step among sequences.

    deterministic: a token of a prompt is computed in a step of prompts only, any other in a step of single tokens only,
    also when a preempted sequence is computed again: so that each token always meets the same program. A prompt is
    never cut so that one token stands alone, which kernels may treat as one to decode.
    max_seqs: sequences in a step at most. max_step_tokens: tokens in a step at most. max_overtakes: how often a
    sequence that does not fit may be overtaken. max_prompt_rows: tokens in a step whose log-probabilities are wanted
    because they are of a prompt; None is no limit. prefix_page_cost: seconds to compute a page of keys and values
    again, which says how long one that nobody uses is kept for later sequences; None: none is kept. loads: how adapters
    come to their pages; None: each as a whole before the step that starts its sequence. clock: returns seconds.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_seqs: int,
        max_step_tokens: int,
        policy: Policy | None = None,
        quotas: Quotas | None = None,
        max_overtakes: int = 64,
        max_prompt_rows: int | None = None,
        deterministic: bool = False,
        prefix_page_cost: float | None = None,
        loads: PageLoads | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if max_step_tokens < max_seqs:
            raise ValueError(f"max_step_tokens {max_step_tokens} must be at least max_seqs {max_seqs}")
        if deterministic and max_step_tokens < 4:
            raise ValueError(f"max_step_tokens {max_step_tokens} must be at least 4, to cut prompts in pieces of two")
        self.pool = pool
        self.max_seqs = max_seqs
        self.max_step_tokens = max_step_tokens
        self.max_overtakes = max_overtakes
        self.max_prompt_rows = max_prompt_rows
        self.deterministic = deterministic
        self._prompts_last = False  # whether the last step was of prompts, if kinds are not mixed
        self._prompt_rows = 0  # left in the step that is being planned
        self.policy = policy or Fcfs()
        self.quotas = quotas or Quotas()
        self.clock = clock
        self.prefixes = None if prefix_page_cost is None else PrefixCache(pool, prefix_page_cost)
        self.adapters = AdapterPages(pool, loads)
        pool.on_evict = self._evicted
        self.running: dict[Sequence, None] = {}  # in order of admission
        self._queue: dict[Sequence, None] = {}  # never ran, in order of arrival
        self._overdue: dict[Sequence, None] = {}  # those of _queue that may not be overtaken any more
        self._preempted: deque[Sequence] = deque()
        self._ending: list[Sequence] = []  # whose last token is being sampled
        self._tried: list[Sequence] = []  # in the last step, but could not be started
        self._rows = list(range(max_seqs - 1, -1, -1))  # not in use
        self._tickets = 0

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that do not run, preempted ones first, then in order of arrival."""
        return [*self._preempted, *self._queue]

    def check(self, seq: Sequence) -> None:
        """Raises ValueError if the sequence could never run, even alone."""
        if seq.worst_case_pages > self.pool.num_pages:
            raise ValueError(f"{seq.worst_case_pages} pages needed, the pool has {self.pool.num_pages}")
        self.quotas.check(seq)

    def add(self, seq: Sequence) -> None:
        """Queues a sequence. Raises ValueError if it could never run, even alone."""
        self.check(seq)
        if seq.arrival is None:
            seq.arrival = self.clock()
        self._queue[seq] = None
        self.policy.added(seq)

    def remove(self, seq: Sequence) -> None:
        """Takes a finished or cancelled sequence out and frees its pages at once. A step that was planned with it may
        still run: it is over before another can use the pages.
        """
        if seq in self.running:
            del self.running[seq]
            self._give_back(seq)
        elif seq in self._queue:
            del self._queue[seq]
            self._overdue.pop(seq, None)
        elif seq in self._preempted:
            self._preempted.remove(seq)
        self.policy.removed(seq)

    def has_work(self) -> bool:
        return bool(self._queue or self._preempted or self.running or self.adapters.loads)

    @property
    def has_waiting(self) -> bool:
        return bool(self._queue or self._preempted)

    def upcoming(self, limit: int) -> Iterator[AdapterUse]:
        """Adapters that are not in their pages and will be needed, those first whose sequences could not be started in
        the last step. limit: waiting sequences that are looked at besides those.
        """
        waiting = itertools.islice(itertools.chain(self._preempted, self._overdue, self._queue), limit)
        for seq in itertools.chain(self._tried, waiting):
            if seq.adapter is not None and not self.adapters.resident(seq.adapter.digest):
                yield seq.adapter

    def schedule(self) -> StepPlan:
        """Plans a step and takes the pages it needs. The sequences advance at once; the values of the tokens that the
        step samples are given to Sequence.push later, before the step after the next is planned.

        It has no chunks only if there is nothing to compute, if quotas let nothing start just now, if adapters are
        still on their way, or if all that runs waits for its last token.
        """
        now = self.clock()
        self._let_go()
        self.adapters.loads.begin_step(limited=bool(self.running))
        dropped = self._drop(now)
        decoding: list[Sequence] = []
        prompts: list[Sequence] = []
        for seq in self.running:
            if self.deterministic:
                (decoding if seq.num_computed >= seq.prompt_len else prompts).append(seq)
            else:
                (decoding if seq.num_pending == 1 else prompts).append(seq)
        chunks: list[Chunk] = []
        preempted: list[Sequence] = []
        admitted: list[Sequence] = []
        # kinds that are not mixed take turns
        decode_only = self._prompts_last and bool(decoding) if self.deterministic else None
        # a token of every decoding sequence before any prompt, so that running answers keep their pace
        if decode_only is not False:
            self._decode(decoding, chunks, preempted)
        if not decode_only:
            self._compute_prompts(prompts, chunks, preempted)
            if not preempted:
                settled = list(self.running)
                self._admit_waiting(chunks, now, admitted)
                chunks = self._make_way(settled, chunks, now, preempted, admitted)
        if decode_only is False and not chunks:
            self._decode(decoding, chunks, preempted)
            decode_only = True
        self._prompts_last = not decode_only
        if preempted:
            chunks = [c for c in chunks if c.seq.row >= 0]
        elif self.pool.free > len(self.running) and (self.has_waiting or self.adapters.prefetches):
            self.adapters.prefetch(list(self.upcoming(_TRIES)), len(self.running), limited=bool(self.running))
        # a sequence preempted in this step goes before everything that was waiting, in its old order
        self._preempted.extendleft(preempted)
        chunks.sort(key=lambda c: c.seq.group)
        chunks.sort(key=lambda c: c.length > 1)
        self._advance(chunks)
        return StepPlan(chunks, self.adapters.take_loads(), preempted, dropped, admitted, decode_only)

    def _decode(self, decoding: list[Sequence], chunks: list[Chunk], preempted: list[Sequence]) -> None:
        """Adds the next token of sequences that decode. There are never more of them than tokens in a step."""
        for seq in decoding:
            if seq.num_computed < seq.room or self._grow(seq, 1, preempted):
                chunks.append(Chunk(seq, seq.num_computed, 1))

    def _compute_prompts(self, prompts: list[Sequence], chunks: list[Chunk], preempted: list[Sequence]) -> None:
        """Goes on with prompts that were begun."""
        self._prompt_rows = self.max_step_tokens if self.max_prompt_rows is None else self.max_prompt_rows
        budget = self.max_step_tokens - len(chunks)
        for seq in prompts:
            length = self._chunk_length(seq, budget)
            if length and self._grow(seq, length, preempted):
                chunks.append(Chunk(seq, seq.num_computed, length))
                budget -= length

    def _chunk_length(self, seq: Sequence, budget: int) -> int:
        pending = seq.num_pending
        if self.deterministic:
            pending = seq.prompt_len - seq.num_computed
        length = min(pending, budget)
        if seq.prompt_logprobs and seq.num_computed < seq.prompt_len:
            length = min(length, self._prompt_rows)
        if self.deterministic and length < pending:
            length -= pending - length == 1
            length = 0 if length == 1 else length
        if seq.prompt_logprobs:
            self._prompt_rows -= length
        return length

    def _advance(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            seq = chunk.seq
            seq.num_computed = end = chunk.start + chunk.length
            if chunk.samples:
                seq.num_unknown += 1
                if end + 1 - seq.prompt_len >= seq.max_tokens:
                    self._ending.append(seq)

    def _let_go(self) -> None:
        """Frees what sequences hold whose last token is being sampled: no further step needs it."""
        for seq in self._ending:
            if seq in self.running:
                self._publish(seq, seq.num_computed)
                del self.running[seq]
                self._give_back(seq)
        self._ending.clear()

    def complete(self, plan: StepPlan, seconds: float = 0.0) -> None:
        """Records that a plan's step has run. The caller then pushes the sampled tokens.

        seconds: what the step took, for policies that estimate; 0 if it was not measured.
        """
        if self.quotas.limited:
            now = self.clock()
            for chunk in plan.chunks:
                self.quotas.charge(chunk.seq, chunk.length, now)
        for chunk in plan.chunks:
            end = chunk.start + chunk.length
            if end // PAGE_TOKENS > chunk.start // PAGE_TOKENS and chunk.seq in self.running:
                self._publish(chunk.seq, end)
        self.policy.completed(plan.chunks, seconds)

    def _publish(self, seq: Sequence, end: int) -> None:
        """Offers the full pages of a running sequence up to token `end` to later ones."""
        if self.prefixes is not None:
            end = min(end, seq.prompt_len) if self.deterministic else end
            self.prefixes.publish(seq, sequence_owner(seq), end)

    def reset(self) -> None:
        """Stops every running sequence and drops every page's contents, because the device lost them or the books
        cannot be trusted. What waits goes on waiting.
        """
        for seq in self.running:
            self.quotas.stopped(seq)
            seq.row, seq.room = -1, 0
        self.running.clear()
        self._ending.clear()
        self.adapters.reset()
        self._rows = list(range(self.max_seqs - 1, -1, -1))
        for owner in list(self.pool.owners()):
            self.pool.release(owner)
        if self.prefixes is not None:
            self.prefixes.clear()

    def forget_adapter(self, digest: str) -> None:
        """Frees what is kept of an adapter that no sequence uses: its weights, and keys and values under it."""
        self.adapters.forget(digest)
        if self.prefixes is not None:
            self.prefixes.forget(digest)

    def used_pages(self) -> dict[str, int]:
        """Pages by use: kv and adapter (in use), idle_kv and idle_adapter (kept until the space is needed), free."""
        kinds: dict[int, str] = {}
        for owner in self.pool.owners():
            assert isinstance(owner, tuple)  # made by sequence_owner, prefix_owner or adapter_owner
            kind = "adapter" if owner[0] == "adapter" else "kv"
            if self.pool.is_idle(owner):
                kind = f"idle_{kind}"
            kinds.update(dict.fromkeys(self.pool.pages(owner), kind))  # who shares a page agrees whether it is idle
        counts = Counter(kinds.values())
        return {k: counts[k] for k in ("kv", "idle_kv", "adapter", "idle_adapter")} | dict(free=self.pool.free)

    def _view(self, now: float) -> View:
        return View(now, list(self._queue), self.running, self.max_step_tokens)

    def _drop(self, now: float) -> list[Drop]:
        dropped = list(self.policy.drop(self._view(now))) if self._queue else []
        for drop in dropped:
            self.remove(drop.seq)
        return dropped

    def _evicted(self, owner: Hashable) -> None:
        if isinstance(owner, tuple) and owner[0] == "adapter":
            self.adapters.evictions += 1
        elif self.prefixes is not None:
            self.prefixes.evicted(owner)

    def _admit_waiting(self, chunks: list[Chunk], now: float, admitted: list[Sequence]) -> None:
        """Starts what fits and adds its first chunks."""
        self._tried = []
        budget = self.max_step_tokens - sum(c.length for c in chunks)
        refused: list[Sequence] = []
        if not budget or not self._has_room():
            return
        for seq, first in self._candidates(now):
            if not self.quotas.admits(seq, now) or (seq.prompt_logprobs and not self._prompt_rows):
                continue
            if not self.adapters.may_load(seq.adapter):
                self._tried.append(seq)
                continue
            if not self._admit(seq):
                self._tried.append(seq)
                if not self.adapters.is_loading(seq.adapter):
                    refused.append(seq)
                if first or len(refused) == _TRIES:
                    break
                continue
            admitted.append(seq)
            length = self._chunk_length(seq, budget)
            if length:
                chunks.append(Chunk(seq, seq.num_computed, length))
                budget -= length
            if self._overtaken(refused) or not length or not budget or not self._has_room():
                break

    def _make_way(
        self,
        settled: list[Sequence],
        chunks: list[Chunk],
        now: float,
        preempted: list[Sequence],
        admitted: list[Sequence],
    ) -> list[Chunk]:
        """Preempts whom the policy names for a waiting sequence, and starts that one. Returns the step's chunks.

        settled: whom it may name. What was started in this very step is not, because its adapter may be loading. Nobody
        makes way for a sequence whose adapter is not there in this step.
        """
        while settled and self._queue:
            pair = self.policy.make_way(View(now, list(self._queue), settled, self.max_step_tokens))
            if pair is None or not self.quotas.admits(pair[1], now):
                break
            victim, seq = pair
            pages, adapter = self.adapters, seq.adapter
            if pages.is_loading(adapter) or not (pages.may_load(adapter) and pages.completes(adapter, limited=True)):
                self._tried.append(seq)
                break
            others = [c for c in chunks if c.seq is not victim]
            budget = self.max_step_tokens - sum(c.length for c in others)
            if not budget:
                break
            settled.remove(victim)
            self._preempt(victim, preempted)
            chunks = others
            if self._admit(seq):
                admitted.append(seq)
                if length := self._chunk_length(seq, budget):
                    chunks.append(Chunk(seq, seq.num_computed, length))
        return chunks

    def _preempt(self, victim: Sequence, preempted: list[Sequence]) -> None:
        del self.running[victim]
        self._give_back(victim)
        victim.num_computed = 0
        victim.preemptions += 1
        preempted.append(victim)

    def _has_room(self) -> bool:
        return len(self.running) < self.max_seqs and self.pool.available > len(self.running)

    def _candidates(self, now: float) -> Iterator[tuple[Sequence, bool]]:
        """Sequences in the order in which they are tried, and whether all others must wait if one does not fit."""
        for seq in [*self._preempted, *self._overdue]:
            yield seq, True
        for seq in self.policy.order(self._view(now)) if self._queue else ():
            if seq not in self.running and seq not in self._overdue:
                yield seq, False

    def _overtaken(self, refused: list[Sequence]) -> bool:
        """Notes that one was admitted before all of these. True if one of them may not be overtaken again."""
        overdue = False
        for seq in refused:
            seq.overtaken += 1
            if seq.overtaken >= self.max_overtakes:
                self._overdue[seq] = None
                overdue = True
        return overdue

    def _take_pages(self, seq: Sequence, count: int) -> None:
        self.pool.allocate(sequence_owner(seq), count)
        seq.room += count * PAGE_TOKENS

    def _grow(self, seq: Sequence, length: int, preempted: list[Sequence]) -> bool:
        """Gets the pages for the next `length` tokens, preempting whom the policy names. False if `seq` itself had to
        go, now or before.
        """
        if preempted and seq not in self.running:
            return False
        missing = ceil_div(seq.num_computed + length - seq.room, PAGE_TOKENS)
        while missing > 0:
            try:
                self._take_pages(seq, missing)
                return True
            except OutOfPages:
                victim = self.policy.victim(self.running)
                self._preempt(victim, preempted)
                if victim is seq:
                    return False
        return True

    def _admit(self, seq: Sequence) -> bool:
        """Starts a waiting sequence if its adapter and its tokens fit beside a spare page for each running sequence.

        If they fit, but the adapter has to be copied and takes more than this step, that is begun.
        """
        assert not seq.num_unknown, "a sequence cannot start while its last token is not known"
        # what was decoded is decoded again, and at least two tokens of a prompt are computed together
        limit = seq.prompt_len - 2 if self.deterministic else len(seq.tokens) - 1
        hits = self.prefixes.match(seq, limit) if self.prefixes is not None else []
        need = ceil_div(len(seq.tokens), PAGE_TOKENS) - len(hits)
        available = self.pool.available
        if self.prefixes is not None:
            available -= self.prefixes.count_idle(hits)
        adapter, limited = seq.adapter, bool(self.running)
        missing, own = self.adapters.pages_needed(adapter)
        if need + missing + len(self.running) > available - own or self.adapters.is_loading(adapter):
            return False
        if adapter is not None and not self.adapters.completes(adapter, limited):
            self.adapters.load(adapter, limited)
            return False
        if self.prefixes is not None:  # before anything is evicted to make room
            self.prefixes.take(seq, sequence_owner(seq), hits)
        seq.room = seq.num_computed  # of the pages that the cache gave
        if adapter is not None:
            self.adapters.enter(adapter, limited)
        self._take_pages(seq, ceil_div(seq.num_computed + seq.num_pending - seq.room, PAGE_TOKENS))
        if seq in self._queue:
            del self._queue[seq]
            self._overdue.pop(seq, None)
        else:
            self._preempted.remove(seq)
        self.running[seq] = None
        seq.row = self._rows.pop()
        self._tickets += 1
        seq.ticket = self._tickets
        self.quotas.admitted(seq)
        self.policy.admitted(seq)
        return True

    def _give_back(self, seq: Sequence) -> None:
        self._rows.append(seq.row)
        seq.row, seq.room = -1, 0
        self.quotas.stopped(seq)
        if self.prefixes is not None:
            self.prefixes.leave(seq)
        self.pool.release(sequence_owner(seq))
        if seq.adapter is not None:
            self.adapters.leave(seq.adapter)
