"""The sequences that do not run. Pure host code, no jax."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
import itertools

from slora_jax.sequence import Sequence


class WaitingQueue:
    """Preempted sequences first, then those that never ran, in order of arrival; iteration gives them in this order.

    max_overtakes: how often one that does not fit may be overtaken by others that do. After that it is overdue: nobody
    is admitted before it. tried: sequences that could not be started in the last step.
    """

    def __init__(self, max_overtakes: int):
        self.max_overtakes = max_overtakes
        self.tried: list[Sequence] = []
        self._preempted: deque[Sequence] = deque()
        self._arrived: dict[Sequence, None] = {}
        self._overdue: dict[Sequence, None] = {}  # of those that arrived
        self._listed: list[Sequence] | None = None  # those that arrived, if none came or went since they were listed

    def __len__(self) -> int:
        return len(self._preempted) + len(self._arrived)

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain(self._preempted, self._arrived)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._arrived or seq in self._preempted

    @property
    def arrived(self) -> list[Sequence]:
        """Those that never ran, in order of arrival. A list that was given out never changes."""
        if self._listed is None:
            self._listed = list(self._arrived)
        return self._listed

    @property
    def has_arrived(self) -> bool:
        return bool(self._arrived)

    def add(self, seq: Sequence) -> None:
        self._arrived[seq] = None
        self._listed = None

    def put_back(self, preempted: Iterable[Sequence]) -> None:
        """Queues sequences that ran, each in front of all that wait."""
        self._preempted.extendleft(preempted)

    def remove(self, seq: Sequence) -> None:
        """Takes a sequence out, if it is there."""
        if seq in self._arrived:
            del self._arrived[seq]
            self._listed = None
            self._overdue.pop(seq, None)
        elif seq in self._preempted:
            self._preempted.remove(seq)

    def candidates(self, order: Callable[[], Iterable[Sequence]]) -> Iterator[tuple[Sequence, bool]]:
        """Sequences in the order in which they are tried, and whether all others must wait if one does not fit.

        order: gives those that never ran in the policy's order, while some of them may be admitted.
        """
        for seq in [*self._preempted, *self._overdue]:
            yield seq, True
        for seq in order() if self._arrived else ():
            if seq in self._arrived and seq not in self._overdue:
                yield seq, False

    def overtake(self, refused: Iterable[Sequence]) -> bool:
        """Notes that one was admitted before all of these. True if one of them may not be overtaken again."""
        overdue = False
        for seq in refused:
            seq.overtaken += 1
            if seq.overtaken >= self.max_overtakes:
                self._overdue[seq] = None
                overdue = True
        return overdue

    def next_up(self, limit: int) -> Iterator[Sequence]:
        """Those that were tried in the last step, then at most `limit` of all; one may come twice."""
        waiting = itertools.chain(self._preempted, self._overdue, self._arrived)
        return itertools.chain(self.tried, itertools.islice(waiting, limit))
