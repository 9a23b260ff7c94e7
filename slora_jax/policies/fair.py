"""Weighted fairness by virtual token counters."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
import heapq
import math

from slora_jax.policies.policy import Policy, View
from slora_jax.sequence import Chunk
from slora_jax.sequence import Sequence as Seq

_PROMPT_PRICE, _OUTPUT_PRICE = 1.0, 2.0  # of a token, as in S-LoRA and the paper


class Fair(Policy):
    """Virtual Token Counter (Sheng et al., arXiv 2401.00588; S-LoRA's vtc_req_queue.py).

    Everyone has a counter: prompt tokens at admission and twice each generated token, divided by their weight. Whoever
    has the least goes first. Who comes back after a pause starts at the least counter of those present: a pause
    saves up no credit.

    by: "tenant" or "adapter" (its name), whom counters are for. weights: name -> share, 1 for those not named.
    """

    def __init__(self, by: str = "tenant", weights: Mapping[str, float] | None = None):
        if by not in ("tenant", "adapter"):
            raise ValueError(f"by must be 'tenant' or 'adapter', not {by!r}")
        for name, weight in (weights or {}).items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of {name!r} must be positive, not {weight}")
        self.by = by
        self.weights = dict(weights or {})
        self.counters: dict[str | None, float] = {}
        self._present: Counter[str | None] = Counter()  # sequences waiting or running
        self._floor = 0.0  # counter of whoever left last

    def _key(self, seq: Seq) -> str | None:
        return seq.tenant if self.by == "tenant" else seq.adapter_name

    def _charge(self, seq: Seq, price: float) -> None:
        key = self._key(seq)
        if key in self.counters:  # else nobody of that name is left
            self.counters[key] += price / self.weights.get(key or "", 1.0)

    def added(self, seq: Seq) -> None:
        key = self._key(seq)
        if not self._present[key]:
            lift = min((self.counters[k] for k, n in self._present.items() if n), default=self._floor)
            self.counters[key] = max(self.counters.get(key, 0.0), lift)
        self._present[key] += 1

    def order(self, view: View) -> Iterable[Seq]:
        queues: dict[str | None, deque[Seq]] = {}
        for seq in view.waiting:
            queues.setdefault(self._key(seq), deque()).append(seq)
        heap = [(self.counters[key], i, key) for i, key in enumerate(queues)]
        heapq.heapify(heap)
        while heap:
            _, i, key = heapq.heappop(heap)
            yield queues[key].popleft()
            if queues[key]:
                heapq.heappush(heap, (self.counters[key], i, key))

    def admitted(self, seq: Seq) -> None:
        if not seq.preemptions:
            self._charge(seq, _PROMPT_PRICE * seq.prompt_len)

    def completed(self, chunks: Sequence[Chunk], seconds: float) -> None:
        for chunk in chunks:
            if chunk.samples:
                self._charge(chunk.seq, _OUTPUT_PRICE)

    def removed(self, seq: Seq) -> None:
        key = self._key(seq)
        self._present[key] -= 1
        if self._present[key]:
            return
        del self._present[key]
        self._floor = max(self._floor, self.counters[key])
        # who would be lifted on return anyway need not be remembered
        least = min((self.counters[k] for k in self._present), default=self._floor)
        if self.counters[key] <= least:
            del self.counters[key]
