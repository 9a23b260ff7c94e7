"""Priorities that age."""

from collections.abc import Collection, Iterable

from slora_jax.policies.policy import Policy, View
from slora_jax.sequence import Sequence as Seq


class Priority(Policy):
    """The highest priority goes first, then who came first; the lowest is preempted first, then who was admitted last.

    aging: seconds of waiting that are worth one level of priority, so that nobody waits for ever.
    """

    def __init__(self, aging: float = 30.0):
        if aging <= 0:
            raise ValueError(f"aging must be positive, not {aging}")
        self.aging = aging

    def order(self, view: View) -> Iterable[Seq]:
        # all of them age at the same pace, so the present moment does not matter
        return sorted(view.waiting, key=lambda seq: (seq.arrival or 0.0) / self.aging - seq.priority)

    def victim(self, running: Collection[Seq]) -> Seq:
        return min(reversed(list(running)), key=lambda seq: seq.priority)
