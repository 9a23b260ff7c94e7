"""Limits of single adapters."""

from collections import Counter
from collections.abc import Mapping
import dataclasses

from slora_jax.sequence import Sequence as Seq


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quota:
    """What one adapter may take; None is no limit.

    max_running: sequences that run at the same time. max_pages: pages of its running sequences at their longest, and of
    its weights. tokens_per_second: tokens computed, of prompts and answers: an adapter that is above it starts no
    further sequence until the average has come down; what runs goes on. Up to one second's tokens can be saved up.
    """

    max_running: int | None = None
    max_pages: int | None = None
    tokens_per_second: float | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ValueError(f"{field.name} must be positive, not {value}")


class Quotas:
    """Books of who takes what. each: the quota of every adapter that `named` does not name. The base model has none."""

    def __init__(self, each: Quota | None = None, named: Mapping[str, Quota] | None = None):
        self._each = each
        self._named = dict(named or {})
        self._running: Counter[str] = Counter()
        self._pages: Counter[str] = Counter()
        self._tokens: dict[str, tuple[float, float]] = {}  # name -> (tokens that may be taken, when that was so)
        self.limited = bool(each or self._named)  # whether anybody has a quota at all

    def of(self, seq: Seq) -> Quota | None:
        return None if seq.adapter_name is None else self._named.get(seq.adapter_name, self._each)

    def check(self, seq: Seq) -> None:
        """Raises ValueError if the sequence alone is above its adapter's quota."""
        quota = self.of(seq)
        if quota is not None and quota.max_pages is not None and seq.worst_case_pages > quota.max_pages:
            raise ValueError(f"{seq.worst_case_pages} pages needed, the quota of its adapter is {quota.max_pages}")

    def admits(self, seq: Seq, now: float) -> bool:
        """Whether the sequence may start now, as far as its adapter's quota goes."""
        quota, name = self.of(seq), seq.adapter_name
        if quota is None or name is None:
            return True
        if quota.max_running is not None and self._running[name] >= quota.max_running:
            return False
        if quota.max_pages is not None and self._pages[name] + seq.worst_case_pages > quota.max_pages:
            return False
        return quota.tokens_per_second is None or self._level(name, quota.tokens_per_second, now) > 0

    def _level(self, name: str, rate: float, now: float) -> float:
        level, then = self._tokens.get(name, (rate, now))
        return min(rate, level + (now - then) * rate)

    def admitted(self, seq: Seq) -> None:
        if self.of(seq) is not None and seq.adapter_name is not None:
            self._running[seq.adapter_name] += 1
            self._pages[seq.adapter_name] += _kv_pages(seq)

    def stopped(self, seq: Seq) -> None:
        """A running sequence finished or was preempted."""
        name = seq.adapter_name
        if self.of(seq) is not None and name is not None:
            self._running[name] -= 1
            self._pages[name] -= _kv_pages(seq)
            if not self._running[name]:
                del self._running[name], self._pages[name]

    def charge(self, seq: Seq, tokens: int, now: float) -> None:
        quota, name = self.of(seq), seq.adapter_name
        if quota is not None and quota.tokens_per_second is not None and name is not None:
            self._tokens[name] = (self._level(name, quota.tokens_per_second, now) - tokens, now)


def _kv_pages(seq: Seq) -> int:
    return seq.worst_case_pages - (seq.adapter.num_pages if seq.adapter else 0)
