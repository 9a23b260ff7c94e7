"""Running sequences in the order in which their chunks stand in a batch. Pure host code, no jax."""

import bisect
from collections.abc import Sequence
import operator

from slora_jax.sequence import Sequence as Seq

_place = operator.attrgetter("place")


class BatchOrder:
    """Kept from step to step, so that the chunks of sequences that decode need not be sorted. Sequences of equal place
    stand in order of admission. A sequence's place must not change while it is in it.
    """

    def __init__(self) -> None:
        self._seqs: list[Seq] = []

    def add(self, seq: Seq) -> None:
        bisect.insort(self._seqs, seq, key=_place)

    def remove(self, seq: Seq) -> None:
        self._seqs.remove(seq)

    def clear(self) -> None:
        self._seqs.clear()

    def of(self, some: Sequence[Seq]) -> list[Seq]:
        """Some of the running sequences, each once, in this order."""
        if len(some) == len(self._seqs):
            return list(self._seqs)
        chosen = set(some)
        return [seq for seq in self._seqs if seq in chosen]
