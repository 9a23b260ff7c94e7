"""What a scheduling policy decides. Policies are plain Python, no jax."""

from collections.abc import Collection, Iterable, Sequence
import dataclasses

from slora_jax.sequence import Chunk
from slora_jax.sequence import Sequence as Seq


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at when a step is planned.

    now: seconds of the scheduler's clock. waiting: sequences that have not run yet, in order of arrival. running: in
    order of admission. max_step_tokens: tokens in a step at most.
    """

    now: float
    waiting: Sequence[Seq]
    running: Collection[Seq]
    max_step_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """A waiting sequence that a policy gives up, and why, as a text for its user."""

    seq: Seq
    reason: str


class Policy:
    """What the scheduler asks a policy: who goes first and who is given up. Who fits is the scheduler's own affair.

    A policy overrides what it wants; the methods given here are first come, first served.
    """

    def added(self, seq: Seq) -> None:
        """A sequence was queued."""

    def drop(self, view: View) -> Sequence[Drop]:
        """Waiting sequences to give up. Called once a step while any wait."""
        return ()

    def order(self, view: View) -> Iterable[Seq]:
        """The waiting sequences in the order in which they are tried. Called at most once a step, when there may be
        room. It may be a generator: `admitted` is called for a sequence before the next one is asked for.
        """
        return view.waiting

    def admitted(self, seq: Seq) -> None:
        """A sequence was started, or started again after it was preempted."""

    def completed(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """A step's tokens were computed, in `seconds` (0: not measured). Sampled tokens are not appended yet."""

    def removed(self, seq: Seq) -> None:
        """A sequence left, finished or not."""

    def victim(self, running: Collection[Seq]) -> Seq:
        """Which running sequence is preempted when pages run out. The others must be able to finish without it."""
        return list(running)[-1]

    def make_way(self, view: View) -> tuple[Seq, Seq] | None:
        """A running sequence to preempt and a waiting one to start in its place, or None. Asked again until it says
        None, after everything that fits was admitted: each pair must bring the end nearer.
        """
        return None
