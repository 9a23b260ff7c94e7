"""Workloads: who asks when, of which adapter, how much. No jax."""

from collections.abc import Iterable
import dataclasses
import json
from typing import Any

import numpy as np

from slora_jax.errors import AdapterError, RequestError


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace. arrival: seconds from its start. adapter: index, None for the base model. Lengths in
    tokens; exactly `output_len` tokens are generated.
    """

    arrival: float
    adapter: int | None
    prompt_len: int
    output_len: int
    tenant: str | None = None
    priority: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """Base model and adapters of an experiment: adapter i has rank ``ranks[i % len(ranks)]`` on every target."""

    shape: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...] = ("q", "k", "v", "o")

    def __post_init__(self):
        if not self.ranks or min(self.ranks) < 1:
            raise AdapterError(f"ranks must be at least 1, not {min(self.ranks, default='none')}")


SETTINGS = {
    "S1": Setting("llama-7b", (8,)),
    "S2": Setting("llama-7b", (64, 32, 16, 8)),
    "S4": Setting("llama-2-13b", (64, 32, 16)),  # the sizes of the first Llama's 13B
    "S5": Setting("llama-30b-m", (32,)),
    "S6": Setting("llama-70b-m", (64,)),
}
"""S-LoRA's settings (arXiv 2311.03285, table 1) by name."""


def synthetic_trace(
    *,
    adapters: int,
    rate: float,
    seconds: float,
    alpha: float = 1.0,
    cv: float = 1.0,
    lengths: tuple[int, int] = (8, 512),
    seed: int = 42,
) -> list[TraceRequest]:
    """S-LoRA's synthetic trace, number for number (its benchmarks/trace.py).

    ``rate * seconds`` requests from one Gamma renewal process with coefficient of variation `cv`; adapters drawn from a
    power law on [0, adapters) (alpha 1 is uniform, smaller is more skewed; 0 adapters: the base model); lengths of
    prompts and answers uniform on [lengths[0], lengths[1]).
    """
    if rate <= 0 or seconds <= 0 or alpha <= 0 or cv <= 0:
        raise RequestError("rate, seconds, alpha and cv of a trace must be positive")
    if adapters < 0 or not 0 < lengths[0] < lengths[1]:
        raise RequestError("a trace needs 0 or more adapters and lengths that go up from at least 1")
    rng = np.random.RandomState(seed)  # the generator of numpy.random.seed, whose numbers never change
    count = int(rate * seconds)
    chosen = (rng.power(alpha, count) * adapters).astype(int).tolist()
    prompts = rng.randint(*lengths, count).tolist()
    outputs = rng.randint(*lengths, count).tolist()
    arrivals = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count)).tolist()
    rows = zip(arrivals, chosen, prompts, outputs, strict=True)
    return [TraceRequest(t, a if adapters else None, p, o) for t, a, p, o in rows]


def burst(trace: Iterable[TraceRequest]) -> list[TraceRequest]:
    """The same requests, all at once."""
    return [dataclasses.replace(request, arrival=0.0) for request in trace]


_FIELDS = {field.name for field in dataclasses.fields(TraceRequest)}


def parse_trace(lines: Iterable[str]) -> list[TraceRequest]:
    """A trace from JSON lines with the fields of TraceRequest, sorted by arrival. RequestError names a bad line."""
    trace = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            trace.append(_parse(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise RequestError(f"line {number} of the trace: {error}") from None
    if not trace:
        raise RequestError("the trace is empty")
    return sorted(trace, key=lambda request: request.arrival)


def _parse(fields: Any) -> TraceRequest:
    if not isinstance(fields, dict) or not fields.keys() <= _FIELDS:
        raise ValueError(f"not an object with the fields {', '.join(sorted(_FIELDS))}")
    request = TraceRequest(**fields)
    for name, least in (("prompt_len", 1), ("output_len", 1), ("priority", None), ("adapter", 0)):
        value = getattr(request, name)
        if name == "adapter" and value is None:
            continue
        if type(value) is not int or (least is not None and value < least):
            raise ValueError(f"{name} must be an integer{'' if least is None else f' of at least {least}'}")
    if not isinstance(request.arrival, int | float) or request.arrival < 0:
        raise ValueError("arrival must be a number of seconds")
    return request
