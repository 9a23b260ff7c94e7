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
    tokens; exactly `output_len` tokens are generated. prefix_len: tokens at the beginning of the prompt that are the
    same in all requests of this adapter.
    """

    arrival: float
    adapter: int | None
    prompt_len: int
    output_len: int
    tenant: str | None = None
    priority: int = 0
    prefix_len: int = 0


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
    seconds: float | None = None,
    requests: int | None = None,
    alpha: float = 1.0,
    cv: float = 1.0,
    lengths: tuple[int, int] = (8, 512),
    seed: int = 42,
) -> list[TraceRequest]:
    """S-LoRA's synthetic trace, number for number (its benchmarks/trace.py).

    ``rate * seconds`` requests, or as many as `requests` says, from one Gamma renewal process with coefficient of
    variation `cv`; adapters drawn from a power law on [0, adapters) (alpha 1 is uniform, smaller is more skewed; 0
    adapters: the base model); lengths of prompts and answers uniform on [lengths[0], lengths[1]).
    """
    count = _count(rate, seconds, requests)
    _check(adapters, alpha, cv)
    if not 0 < lengths[0] < lengths[1]:
        raise RequestError("lengths of a trace must go up from at least 1")
    rng = np.random.RandomState(seed)  # the generator of numpy.random.seed, whose numbers never change
    chosen = rng.power(alpha, count) * adapters
    prompts = rng.randint(*lengths, count)
    outputs = rng.randint(*lengths, count)
    return _rows(np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count)), chosen, prompts, outputs, adapters)


def chat_trace(
    *,
    adapters: int = 26,
    rate: float,
    seconds: float | None = None,
    requests: int | None = None,
    alpha: float = 0.3,
    cv: float = 1.0,
    seed: int = 42,
) -> list[TraceRequest]:
    """A stand-in for S-LoRA's real trace (its figure 7), conversations that were never published.

    What the paper says of it is kept: prompts of 85 and answers of 165 tokens on average, all below 512, about 26
    adapters. That lengths are log-normal, that arrivals are a Gamma process and that adapters follow a power law is
    ours. Other arguments as in synthetic_trace.
    """
    count = _count(rate, seconds, requests)
    _check(adapters, alpha, cv)
    rng = np.random.RandomState(seed)
    chosen = rng.power(alpha, count) * adapters
    prompts, outputs = (_lengths(rng, log_mean, count) for log_mean in _CHAT_LOG_MEANS)
    return _rows(np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count)), chosen, prompts, outputs, adapters)


_CHAT_LOG_MEANS = (4.059, 5.025)  # such that lengths below 512 are 85 and 165 on average
_CHAT_LOG_DEVIATION = 1.0
_CHAT_LONGEST = 511


def _lengths(rng: np.random.RandomState, log_mean: float, count: int) -> np.ndarray:
    """Log-normal lengths, drawn again while they are too long. int [count]"""
    lengths = np.full(count, _CHAT_LONGEST + 1)
    while (long := lengths > _CHAT_LONGEST).any():
        lengths[long] = np.maximum(rng.lognormal(log_mean, _CHAT_LOG_DEVIATION, long.sum()), 1).astype(int)
    return lengths


def _count(rate: float, seconds: float | None, requests: int | None) -> int:
    if (seconds is None) == (requests is None):
        raise RequestError("give a trace either its seconds or its requests")
    if rate <= 0 or (seconds is not None and seconds <= 0) or (requests is not None and requests < 1):
        raise RequestError("rate, seconds and requests of a trace must be positive")
    if requests is None:
        assert seconds is not None
        requests = int(rate * seconds)
    if not requests:
        raise RequestError("rate times seconds is less than one request; raise one of them")
    return requests


def _check(adapters: int, alpha: float, cv: float) -> None:
    if alpha <= 0 or cv <= 0:
        raise RequestError("alpha and cv of a trace must be positive")
    if adapters < 0:
        raise RequestError(f"a trace needs 0 or more adapters, not {adapters}")


def _rows(arrivals, chosen, prompts, outputs, adapters: int) -> list[TraceRequest]:
    columns = (arrivals.tolist(), chosen.astype(int).tolist(), prompts.tolist(), outputs.tolist())
    return [TraceRequest(t, a if adapters else None, p, o) for t, a, p, o in zip(*columns, strict=True)]


def with_prefix(trace: Iterable[TraceRequest], length: int) -> list[TraceRequest]:
    """The same requests behind a text of `length` tokens that all requests of an adapter share."""
    return [dataclasses.replace(r, prompt_len=r.prompt_len + length, prefix_len=length) for r in trace]


def merge(*traces: Iterable[TraceRequest]) -> list[TraceRequest]:
    """Several traces at the same time."""
    return sorted((request for trace in traces for request in trace), key=lambda request: request.arrival)


def prompt_tokens(trace: Iterable[TraceRequest], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids of every prompt, drawn at random, so that two prompts share no more than their prefix."""
    prefixes: dict[int | None, np.ndarray] = {}
    result = []
    for index, request in enumerate(trace):
        tokens = np.random.default_rng((seed, 0, index)).integers(3, vocab_size, request.prompt_len)
        if n := request.prefix_len:
            known = prefixes.get(request.adapter, np.zeros(0, np.int64))
            if len(known) < n:  # a longer one begins with the same tokens
                key = 0 if request.adapter is None else request.adapter + 1
                known = prefixes[request.adapter] = np.random.default_rng((seed, 1, key)).integers(3, vocab_size, n)
            tokens[:n] = known[:n]
        result.append(tokens.tolist())
    return result


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
    for name, least in (("prompt_len", 1), ("output_len", 1), ("prefix_len", 0), ("priority", None), ("adapter", 0)):
        value = getattr(request, name)
        if name == "adapter" and value is None:
            continue
        if type(value) is not int or (least is not None and value < least):
            raise ValueError(f"{name} must be an integer{'' if least is None else f' of at least {least}'}")
    if request.prefix_len > request.prompt_len:
        raise ValueError("prefix_len must not be above prompt_len")
    if not isinstance(request.arrival, int | float) or request.arrival < 0:
        raise ValueError("arrival must be a number of seconds")
    return request
