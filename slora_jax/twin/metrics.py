"""Figures of a run, simulated or measured, from one record for each request."""

from collections.abc import Callable, Hashable, Iterable, Sequence
import dataclasses
from typing import Any

import numpy as np

from slora_jax.traces import TraceRequest

_STRIP = 10.0  # seconds at both ends that the steady state leaves out, as S-LoRA's strip_throughput does


@dataclasses.dataclass(slots=True)
class Record:
    """What became of a request. Moments in seconds of the trace's clock, None until reached. aborted: given up before
    it ran.
    """

    request: TraceRequest
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    preemptions: int = 0
    aborted: bool = False

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.request.arrival

    @property
    def latency(self) -> float | None:
        return None if self.finished is None else self.finished - self.request.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first."""
        if self.finished is None or self.first_token is None or self.request.output_len < 2:
            return None
        return (self.finished - self.first_token) / (self.request.output_len - 1)


def summarise(records: Sequence[Record], slo: float = 6.0) -> dict[str, Any]:
    """Throughput, latencies, SLO and fairness.

    As S-LoRA defines them: throughput is finished requests over the time from the first arrival to the last completion;
    SLO attainment the share of all requests whose first token came within `slo` seconds; satisfaction the mean of
    ``1 - (ttft / slo)^2`` (0 if later); aborted requests count 0 in both and not at all in latencies.
    """
    done = [r for r in records if r.finished is not None]
    start = min((r.request.arrival for r in records), default=0.0)
    end = max((r.finished for r in done if r.finished is not None), default=start)
    seconds = end - start
    outputs = sum(r.request.output_len for r in done)
    prompts = sum(r.request.prompt_len for r in done)
    steady = [r for r in done if r.finished is not None and start + _STRIP <= r.finished <= end - _STRIP]
    attained = [r.ttft is not None and r.ttft < slo for r in records]
    satisfied = [max(0.0, 1 - (r.ttft / slo) ** 2) if r.ttft is not None else 0.0 for r in records]
    return dict(
        requests=len(records),
        finished=len(done),
        aborted=sum(r.aborted for r in records),
        preemptions=sum(r.preemptions for r in records),
        seconds=seconds,
        requests_per_second=_ratio(len(done), seconds),
        steady_requests_per_second=_ratio(len(steady), seconds - 2 * _STRIP),
        output_tokens_per_second=_ratio(outputs, seconds),
        tokens_per_second=_ratio(prompts + outputs, seconds),
        ttft=_spread(r.ttft for r in records),
        tpot=_spread(r.tpot for r in records),
        latency=_spread(r.latency for r in records),
        slo_attainment=_ratio(sum(attained), len(records)),
        satisfaction=_ratio(sum(satisfied), len(records)),
        adapter_fairness=fairness(done, lambda r: r.request.adapter),
        tenants={str(k): _spread(r.ttft for r in v) for k, v in _groups(records, lambda r: r.request.tenant).items()},
    )


def fairness(records: Iterable[Record], key: Callable[[Record], Hashable]) -> float | None:
    """Jain's index over the groups of `key`, of a group's mean latency per output token: 1 where all fare alike, 1/n
    where one of n takes all the time. None without records.
    """
    groups = _groups(records, key)
    means = [np.mean([(r.latency or 0.0) / r.request.output_len for r in group]) for group in groups.values()]
    return float(np.sum(means) ** 2 / (len(means) * np.sum(np.square(means)))) if means and np.any(means) else None


def _groups(records: Iterable[Record], key: Callable[[Record], Hashable]) -> dict[Hashable, list[Record]]:
    groups: dict[Hashable, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and percentiles, or None where there are no values."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    p50, p90, p99 = np.percentile(known, (50, 90, 99)).tolist()
    return dict(mean=float(np.mean(known)), p50=p50, p90=p90, p99=p99)
