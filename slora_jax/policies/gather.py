"""Gathering: requests of one adapter run together, so that each step reads fewer adapters."""

from collections.abc import Iterable, Iterator

from slora_jax.policies.policy import Policy, View
from slora_jax.sequence import Sequence as Seq


class Gather(Policy):
    """Clustering for throughput when more requests arrive than can be served.

    Sequences go first whose adapter runs already, then those of the adapter for which most wait, and so on. A step then
    reads fewer adapters than under first come, first served, more pages are left for keys and values, and fewer
    adapters are copied from the host. Those who are alone with their adapter pay for it by waiting.

    oldest: every so many-th start is of whoever has waited longest, so that nobody waits for ever: at most `oldest`
    starts for each one that waited when it came. Unlike a bound in seconds, which everybody reaches under a load that
    lasts, this leaves the others' order alone. 1 is first come, first served.
    """

    def __init__(self, oldest: int = 4):
        if oldest < 1:
            raise ValueError(f"oldest must be at least 1, not {oldest}")
        self.oldest = oldest
        self._turn = 0  # starts since one of whoever had waited longest
        self._tried: list[Seq] = []  # and not started, in the last step

    def order(self, view: View) -> Iterator[Seq]:
        """But for the turns of the oldest, whoever was tried in the step before goes first: the adapter may be on its
        way, and would be copied for nothing if another took its place.
        """
        gathered = self._gathered(view)
        waiting = dict.fromkeys(view.waiting)
        again = [seq for seq in self._tried if seq in waiting]
        self._tried = []
        lines = [iter((*again, *gathered)), iter(view.waiting)]
        given: set[Seq] = set()
        while len(given) < len(waiting):
            seq = next(s for s in lines[self._turn == self.oldest - 1] if s not in given)
            given.add(seq)
            self._tried.append(seq)
            yield seq

    def admitted(self, seq: Seq) -> None:
        self._turn = (self._turn + 1) % self.oldest
        if self._tried and self._tried[-1] is seq:
            self._tried.pop()

    @staticmethod
    def _gathered(view: View) -> Iterable[Seq]:
        running = {seq.adapter.digest for seq in view.running if seq.adapter}
        groups: dict[str, list[Seq]] = {}
        ready: list[Seq] = []
        for seq in view.waiting:
            if seq.adapter is None or seq.adapter.digest in running:
                ready.append(seq)
            else:
                groups.setdefault(seq.adapter.digest, []).append(seq)
        largest = sorted(groups.values(), key=len, reverse=True)  # of equals whoever has waited longest
        return [*ready, *(seq for group in largest for seq in group)]
