"""Decides what the next step computes. Pure host code, no jax: the same code runs against a simulator.

Continuous batching with chunked prefill: every running sequence's next token first, then prompt chunks up to the step's
token budget. Pages are taken as they are needed; when none can be had a sequence gives its own back and is recomputed
later (S-LoRA reserves the worst case at admission instead and leaves memory idle).

A policy says in which order waiting sequences are tried. One that does not fit is overtaken by others that do, but only
so often: then nobody is admitted before it. One whose adapter is not in host memory yet holds up nobody.

A step may be planned while the one before it still runs: its sampled tokens then count as tokens whose values are not
known yet. The device runs steps in order, so pages change hands as soon as nothing that is planned needs them.
"""

from collections.abc import Callable, Hashable, Iterator
import time

from pallas_kernels.geometry import PAGE_TOKENS
from slora_jax.adapter_pages import AdapterPages
from slora_jax.batch_order import BatchOrder
from slora_jax.grouping import Grouping
from slora_jax.page_loads import PageLoads
from slora_jax.page_pool import OutOfPages, PagePool
from slora_jax.policies import Drop, Fcfs, Policy, Quotas, View
from slora_jax.prefix_cache import PrefixCache
from slora_jax.seats import Seats
from slora_jax.sequence import AdapterUse, Chunk, Sequence
from slora_jax.step_plan import StepDraft, StepPlan
from slora_jax.waiting import WaitingQueue

_TRIES = 64  # sequences that may be found not to fit in one step, so that planning takes bounded time


class Scheduler:
    """Shares one page pool and the tokens of each step among sequences.

    deterministic: a token of a prompt is computed in a step of prompts only, any other in a step of single tokens only,
    also when a preempted sequence is computed again: so that each token always meets the same program. A prompt is
    never cut so that one token stands alone, which kernels may treat as one to decode.
    max_seqs: sequences in a step at most. max_step_tokens: tokens in a step at most. max_overtakes: how often a
    sequence that does not fit may be overtaken. max_prompt_rows: tokens in a step whose log-probabilities are wanted
    because they are of a prompt; None is no limit. prefix_page_cost: seconds to compute a page of keys and values
    again, which says how long one that nobody uses is kept for later sequences; None: none is kept. prompt_gap: see
    Grouping. loads: how adapters come to their pages; None: each as a whole before the step that starts its sequence.
    clock: returns seconds.
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
        prompt_gap: int = 0,
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
        self.max_prompt_rows = max_step_tokens if max_prompt_rows is None else max_prompt_rows
        self.deterministic = deterministic
        # kinds of steps that are not mixed take turns already
        self._grouping = Grouping(0 if deterministic else prompt_gap, max_seqs)
        self._prompts_last = False  # whether the last step was of prompts, if kinds are not mixed
        self.policy = policy or Fcfs()
        self.quotas = quotas or Quotas()
        self.clock = clock
        self.prefixes = None if prefix_page_cost is None else PrefixCache(pool, prefix_page_cost)
        self.adapters = AdapterPages(pool, loads)
        pool.on_evict = self._evicted
        self.waiting = WaitingQueue(max_overtakes)
        self._seats = Seats(pool, self.adapters, self.prefixes, max_seqs=max_seqs, deterministic=deterministic)
        self.running = self._seats.running  # in order of admission
        self._order = BatchOrder()  # of the same
        self._ending: list[Sequence] = []  # whose last token is being sampled

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
        self.waiting.add(seq)
        self.policy.added(seq)

    def remove(self, seq: Sequence) -> None:
        """Takes a finished or cancelled sequence out and frees its pages at once. A step that was planned with it may
        still run: it is over before another can use the pages.
        """
        if seq in self.running:
            self._stop(seq)
        else:
            self.waiting.remove(seq)
        self.policy.removed(seq)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.adapters.loads)

    def upcoming(self, limit: int) -> Iterator[AdapterUse]:
        """Adapters that are not in their pages and will be needed, those first whose sequences could not be started in
        the last step. limit: waiting sequences that are looked at besides those.
        """
        for seq in self.waiting.next_up(limit):
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
        if self.deterministic:
            prompts = [seq for seq in self.running if seq.num_computed < seq.prompt_len]
        else:  # num_pending, without the call
            prompts = [seq for seq in self.running if len(seq.tokens) + seq.num_unknown - seq.num_computed != 1]
        longer = set(prompts)
        decoding = [seq for seq in self.running if seq not in longer]
        draft = StepDraft(self.max_step_tokens, self.max_prompt_rows, self.deterministic)
        # kinds that are not mixed take turns
        decode_only = self._prompts_last and bool(decoding) if self.deterministic else None
        # a token of every decoding sequence before any prompt, so that running answers keep their pace
        if decode_only is not False:
            self._decode(decoding, draft)
        if not decode_only:
            self._compute_prompts(prompts, draft)
            if self._grouping.holds_back(draft, len(self.running)):
                self.waiting.tried = []
            elif not draft.preempted:
                settled = list(self.running)
                self._admit_waiting(draft, now)
                self._make_way(settled, draft, now)
        if decode_only is False and not draft.chunks:
            self._decode(decoding, draft)
            decode_only = True
        self._prompts_last = not decode_only
        self._grouping.planned(draft)
        if not draft.preempted and self.pool.free > len(self.running) and (self.waiting or self.adapters.prefetches):
            self.adapters.prefetch(list(self.upcoming(_TRIES)), len(self.running), limited=bool(self.running))
        # a sequence preempted in this step goes before everything that was waiting, in its old order
        self.waiting.put_back(draft.preempted)
        chunks = draft.in_batch_order()
        self._advance(chunks)
        loads, sends = self.adapters.take_loads()
        return StepPlan(chunks, loads, draft.preempted, sends, dropped, draft.admitted, decode_only)

    def complete(self, plan: StepPlan, seconds: float = 0.0) -> None:
        """Records that a plan's step has run. The caller then pushes the sampled tokens.

        seconds: what the step took, for policies that estimate; 0 if it was not measured.
        """
        if self.quotas.limited:
            now = self.clock()
            for chunk in plan.chunks:
                self.quotas.charge(chunk.seq, chunk.length, now)
        filled = [c for c in plan.chunks if (c.start + c.length) % PAGE_TOKENS < c.length]  # a page
        for chunk in filled:
            if chunk.seq in self.running:
                self._seats.publish(chunk.seq, chunk.start + chunk.length)
        self.policy.completed(plan.chunks, seconds)

    def reset(self) -> None:
        """Stops every running sequence and drops every page's contents, because the device lost them or the books
        cannot be trusted. What waits goes on waiting.
        """
        for seq in self.running:
            self.quotas.stopped(seq)
        self._ending.clear()
        self._order.clear()
        self._seats.reset()

    def forget_adapter(self, digest: str) -> None:
        """Frees what is kept of an adapter that no sequence uses: its weights, and keys and values under it."""
        self.adapters.forget(digest)
        if self.prefixes is not None:
            self.prefixes.forget(digest)

    def _let_go(self) -> None:
        """Frees what sequences hold whose last token is being sampled: no further step needs it."""
        for seq in self._ending:
            if seq in self.running:
                self._seats.publish(seq, seq.num_computed)
                self._stop(seq)
        self._ending.clear()

    def _drop(self, now: float) -> list[Drop]:
        dropped = list(self.policy.drop(self._view(now))) if self.waiting.has_arrived else []
        for drop in dropped:
            self.remove(drop.seq)
        return dropped

    def _decode(self, decoding: list[Sequence], draft: StepDraft) -> None:
        """Adds the next token of sequences that decode. There are never more of them than tokens in a step."""
        chunks = draft.chunks
        before = len(chunks)
        if not before and self.pool.available >= len(decoding):  # nobody has to go, so the order of chunks is free
            for seq in [seq for seq in decoding if seq.num_computed >= seq.room]:
                self._grow(seq, 1, draft)
            decoding = self._order.of(decoding)
            draft.ordered = len(decoding)
        chunks += [
            Chunk(seq, seq.num_computed, 1)
            for seq in decoding
            if seq.num_computed < seq.room or self._grow(seq, 1, draft)
        ]
        draft.budget -= len(chunks) - before

    def _compute_prompts(self, prompts: list[Sequence], draft: StepDraft) -> None:
        """Goes on with prompts that were begun."""
        for seq in prompts:
            length = draft.chunk_length(seq)
            if length and self._grow(seq, length, draft):
                draft.add(seq, length)

    def _admit_waiting(self, draft: StepDraft, now: float) -> None:
        """Starts what fits and adds its first chunks."""
        tried = self.waiting.tried = []
        refused: list[Sequence] = []
        coming: set[Hashable] = set()  # adapters on their way, each to a seat that is free now
        reserved = 0  # pages for whoever waits first for each of these, which would be evicted before it was used
        if not draft.budget or not self._seats.any_free():
            return
        for seq, first in self.waiting.candidates(lambda: self.policy.order(self._view(now))):
            if not self.quotas.admits(seq, now) or (seq.prompt_logprobs and not draft.prompt_rows):
                continue
            if not self.adapters.may_load(seq.adapter):
                tried.append(seq)
                continue
            if not self._admit(seq, draft, reserved=reserved):
                tried.append(seq)
                if self.adapters.is_loading(seq.adapter):
                    reserved += 0 if seq.group in coming else self._seats.pages_needed(seq)
                    coming.add(seq.group)
                else:
                    refused.append(seq)
                if first or len(refused) == _TRIES or not self._seats.any_free(len(coming), reserved):
                    break
                continue
            length = draft.chunk_length(seq)
            if length:
                draft.add(seq, length)
            overdue = self.waiting.overtake(refused)
            if overdue or not length or not draft.budget or not self._seats.any_free(pages=reserved):
                break

    def _make_way(self, settled: list[Sequence], draft: StepDraft, now: float) -> None:
        """Preempts whom the policy names for a waiting sequence, and starts that one.

        settled: whom it may name. What was started in this very step is not, because its adapter may be loading. Nobody
        makes way for a sequence whose adapter is not there in this step.
        """
        while settled and self.waiting.has_arrived:
            pair = self.policy.make_way(View(now, self.waiting.arrived, settled, self.max_step_tokens))
            if pair is None or not self.quotas.admits(pair[1], now):
                break
            victim, seq = pair
            pages, adapter = self.adapters, seq.adapter
            there = pages.may_load(adapter) and pages.completes(adapter, limited=True, urgent=True)
            if pages.is_loading(adapter) or not there:
                self.waiting.tried.append(seq)
                break
            draft.discard(victim)
            if not draft.budget:
                break
            settled.remove(victim)
            self._preempt(victim, draft)
            if self._admit(seq, draft, urgent=True) and (length := draft.chunk_length(seq)):
                draft.add(seq, length)

    def _admit(self, seq: Sequence, draft: StepDraft, urgent: bool = False, reserved: int = 0) -> bool:
        """Starts a waiting sequence if it fits; see Seats.enter."""
        if not self._seats.enter(seq, urgent, reserved):
            return False
        seq.set_place()
        self._order.add(seq)
        self.waiting.remove(seq)
        self.quotas.admitted(seq)
        self.policy.admitted(seq)
        draft.admitted.append(seq)
        return True

    def _grow(self, seq: Sequence, length: int, draft: StepDraft) -> bool:
        """Gets the pages for the next `length` tokens, preempting whom the policy names. False if `seq` itself had to
        go, now or before.
        """
        while not draft.preempted or seq in self.running:
            try:
                self._seats.make_room(seq, seq.num_computed + length)
                return True
            except OutOfPages:
                self._preempt(self.policy.victim(self.running), draft)
        return False

    def _preempt(self, victim: Sequence, draft: StepDraft) -> None:
        self._stop(victim)
        victim.num_computed = 0
        victim.preemptions += 1
        draft.preempted.append(victim)

    def _stop(self, seq: Sequence) -> None:
        self._seats.leave(seq)
        self._order.remove(seq)
        self.quotas.stopped(seq)

    def _advance(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            seq = chunk.seq
            seq.num_computed = end = chunk.start + chunk.length
            if chunk.samples:
                seq.num_unknown += 1
                if end + 1 - seq.prompt_len >= seq.max_tokens:
                    self._ending.append(seq)

    def _view(self, now: float) -> View:
        return View(now, self.waiting.arrived, self.running, self.max_step_tokens)

    def _evicted(self, owner: Hashable) -> None:
        if isinstance(owner, tuple) and owner[0] == "adapter":
            self.adapters.evictions += 1
        elif self.prefixes is not None:
            self.prefixes.evicted(owner)
