"""Weighted fairness by virtual token counters."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
import heapq
import math

from slora_jax.policies.policy import Policy, View
from slora_jax.sequence import Chunk
from slora_jax.sequence import Sequence as Seq

_PROMPT_PRICE, _OUTPUT_PRICE = 1.0, 2.0  # of a token, as in S-LoRA and the paper
_FORGET = 64  # names that left and are kept beyond those present, before any is forgotten


class Fair(Policy):
    """Virtual Token Counter (Sheng et al., OSDI 2024, arXiv 2401.00588; S-LoRA's vtc_req_queue.py), with preemption.

    Everyone has a counter: prompt tokens at admission and twice each generated token, divided by their weight. Whoever
    has the least goes first. Who has nothing waiting and comes back is lifted to the highest counter at which anybody
    was admitted so far, less `burst`: a pause saves up no more credit than that.

    The paper only orders the queue. While all seats or pages are held by somebody who asks for more than their share,
    whoever comes has to wait for one of those answers to end, whatever the order. So, with `preempt`, the youngest
    sequence of whoever has the largest counter gives way to a waiting one whose prompt's price still leaves its owner's
    counter below; it finds most of its keys and values in the prefix cache when it goes on.

    by: "tenant" or "adapter" (its name), whom counters are for. weights: name -> share, 1 for those not named. burst:
    in prices of tokens; 0 is the paper's rule, under which a tenant of few requests, when two of them come in a row,
    stands behind one that is always there.
    """

    def __init__(
        self,
        by: str = "tenant",
        weights: Mapping[str, float] | None = None,
        preempt: bool = True,
        burst: float = 4096.0,
    ):
        if by not in ("tenant", "adapter"):
            raise ValueError(f"by must be 'tenant' or 'adapter', not {by!r}")
        for name, weight in (weights or {}).items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of {name!r} must be positive, not {weight}")
        if not 0 <= burst < math.inf:
            raise ValueError(f"burst must not be negative, not {burst}")
        self.by = by
        self.weights = dict(weights or {})
        self.preempt = preempt
        self.burst = burst
        self.counters: dict[str | None, float] = {}
        self._waiting: dict[str | None, set[Seq]] = {}
        self._present: Counter[str | None] = Counter()  # sequences waiting or running
        self._level = self.burst  # highest counter at which anybody was admitted

    def _key(self, seq: Seq) -> str | None:
        return seq.tenant if self.by == "tenant" else seq.adapter_name

    def _price(self, key: str | None, price: float) -> float:
        return price / self.weights.get(key or "", 1.0)

    def added(self, seq: Seq) -> None:
        key = self._key(seq)
        if key not in self._waiting:
            self.counters[key] = max(self.counters.get(key, -math.inf), self._level - self.burst)
        self._waiting.setdefault(key, set()).add(seq)
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

    def make_way(self, view: View) -> tuple[Seq, Seq] | None:
        if not self.preempt:
            return None
        youngest = {self._key(seq): seq for seq in view.running}
        first: dict[str | None, Seq] = {}
        for seq in view.waiting:
            first.setdefault(self._key(seq), seq)
        most = max(youngest, key=lambda key: self.counters[key], default=None)
        least = min(first, key=lambda key: self.counters[key], default=None)
        if not youngest or not first:
            return None
        price = self._price(least, _PROMPT_PRICE * first[least].prompt_len)
        return (youngest[most], first[least]) if self.counters[least] + price < self.counters[most] else None

    def admitted(self, seq: Seq) -> None:
        key = self._key(seq)
        if not seq.preemptions:
            self._level = max(self._level, self.counters[key])
            self.counters[key] += self._price(key, _PROMPT_PRICE * seq.prompt_len)
        self._leave_queue(seq, key)

    def completed(self, chunks: Sequence[Chunk], seconds: float) -> None:
        for chunk in chunks:
            key = self._key(chunk.seq)
            if chunk.samples and key in self.counters:  # else nobody of that name is left
                self.counters[key] += self._price(key, _OUTPUT_PRICE)

    def removed(self, seq: Seq) -> None:
        key = self._key(seq)
        self._leave_queue(seq, key)
        self._present[key] -= 1
        if not self._present[key]:
            del self._present[key]
        if len(self.counters) > 2 * len(self._present) + _FORGET:
            # who would be lifted on return anyway need not be remembered
            least = self._level - self.burst
            self.counters = {k: c for k, c in self.counters.items() if k in self._present or c > least}

    def _leave_queue(self, seq: Seq, key: str | None) -> None:
        if queue := self._waiting.get(key):
            queue.discard(seq)
            if not queue:
                del self._waiting[key]
