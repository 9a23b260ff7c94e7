"""A step as it is planned, chunk by chunk. Pure host code, no jax."""

import dataclasses
import operator

from slora_jax.page_loads import Load
from slora_jax.policies import Drop
from slora_jax.sequence import Chunk, Sequence

_place = operator.attrgetter("seq.place")


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Chunks are in batch order: single tokens first, then longer chunks, each part grouped by adapter, large
    adapters first, and then by how sequences begin.
    """

    chunks: list[Chunk]
    loads: list[Load]  # what must be written to adapters' pages before the step
    preempted: list[Sequence]
    sends: list[Load] = dataclasses.field(default_factory=list)  # to be sent to the device with it; see PageLoads
    dropped: list[Drop] = dataclasses.field(default_factory=list)  # given up by the policy; they are no longer queued
    admitted: list[Sequence] = dataclasses.field(default_factory=list)  # started, or started again
    decode_only: bool | None = None  # which of its two kinds the step is of, where kinds are not mixed

    @property
    def num_tokens(self) -> int:
        return sum(c.length for c in self.chunks)


@dataclasses.dataclass(slots=True)
class StepDraft:
    """A step that is being planned.

    budget: tokens that are left. prompt_rows: tokens that are left of those whose log-probabilities are wanted because
    they are of a prompt. deterministic: see Scheduler. ordered: chunks at the front that are in batch order.
    """

    budget: int
    prompt_rows: int
    deterministic: bool
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    preempted: list[Sequence] = dataclasses.field(default_factory=list)
    admitted: list[Sequence] = dataclasses.field(default_factory=list)
    ordered: int = 0

    def chunk_length(self, seq: Sequence) -> int:
        """Tokens of a prompt that the step may compute next, 0 if none. Takes them from prompt_rows."""
        pending = seq.num_pending
        if self.deterministic:
            pending = seq.prompt_len - seq.num_computed
        length = min(pending, self.budget)
        if seq.prompt_logprobs and seq.num_computed < seq.prompt_len:
            length = min(length, self.prompt_rows)
        if self.deterministic and length < pending:
            length -= pending - length == 1
            length = 0 if length == 1 else length
        if seq.prompt_logprobs:
            self.prompt_rows -= length
        return length

    def add(self, seq: Sequence, length: int) -> None:
        """Adds the next `length` tokens of a sequence."""
        self.chunks.append(Chunk(seq, seq.num_computed, length))
        self.budget -= length

    def discard(self, seq: Sequence) -> None:
        """Takes a sequence's tokens out."""
        self.budget += sum(c.length for c in self.chunks if c.seq is seq)
        self.chunks = [c for c in self.chunks if c.seq is not seq]
        self.ordered = 0

    def in_batch_order(self) -> list[Chunk]:
        """The chunks of sequences that still run, as StepPlan wants them."""
        if self.ordered == len(self.chunks) and not self.preempted:
            return self.chunks
        chunks = [c for c in self.chunks if c.seq.row >= 0] if self.preempted else self.chunks
        longer = sorted([c for c in chunks if c.length > 1], key=_place)
        single = sorted([c for c in chunks if c.length == 1] if longer else chunks, key=_place)
        return single + longer
