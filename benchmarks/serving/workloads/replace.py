"""Adapters are replaced under their names while they are used: no answer may come from the wrong contents.

Every adapter has two versions that answer differently, and one prompt, so that keys and values of the other version
are always there to be confused with. Which version answered is checked twice: by the digest that the answer names,
against what the name meant when the request came; and by the tokens, against answers of each version alone.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import itertools
import time
from typing import Any

from benchmarks.serving.probe import adapter_bytes
from benchmarks.serving.session import Session, adapter_name
from benchmarks.serving.ticker import every
from benchmarks.serving.workloads import OpenSession
from benchmarks.serving.workloads.sweep import longest
from slora_jax import Adapter, Engine, Request, RequestOutput, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.cli.workload import read_trace
from slora_jax.traces import TraceRequest, prompt_tokens

_NAMES = 8
_REPLACEMENTS = 20  # in a run, of all adapters


@dataclasses.dataclass(frozen=True)
class Replacement:
    """began, ended: of the call, in seconds of time.monotonic; in between either version may answer."""

    name: str
    digest: str
    began: float
    ended: float


class Replacer:
    """Points every name at its other version, again and again."""

    def __init__(self, engine: Engine, versions: dict[str, Sequence[Adapter]], pause: float):
        self.history: list[Replacement] = []
        self._engine = engine
        self._versions = versions
        self._pause = pause
        self.point_all(0)

    def point_all(self, version: int) -> None:
        for name, adapters in self._versions.items():
            began = time.monotonic()
            digest = self._engine.add_adapter(name, adapters[version % 2])
            self.history.append(Replacement(name, digest, began, time.monotonic()))

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Replaces all of them every `pause` seconds meanwhile."""
        versions = itertools.count(1)
        return every(self._pause, lambda: self.point_all(next(versions)), "replacer")

    def allowed(self, name: str, asked: float, arrival: float) -> set[str]:
        """Digests that may answer a request: the engine was asked at one moment, and had chosen the contents when it
        noted the request's arrival.
        """
        mine = [r for r in self.history if r.name == name]
        ends = [r.ended for r in mine[1:]] + [float("inf")]
        return {r.digest for r, end in zip(mine, ends, strict=True) if r.began <= arrival and asked <= end}


def measure(args: argparse.Namespace, open_session: OpenSession) -> Iterator[dict[str, Any]]:
    n = min(max(args.adapters), _NAMES)
    trace = read_trace(args, adapters=n, rate=args.rate[0], alpha=args.alpha[0], cv=args.cv[0])
    length = max(r.prompt_len for r in trace)
    trace = [dataclasses.replace(r, prompt_len=length, prefix_len=length) for r in trace]
    with open_session(adapters=n, longest=longest(trace)) as session:
        dtype, ranks = session.model.params["embed"].dtype, session.setting.ranks
        versions = {
            adapter_name(i): [
                random_adapter(
                    session.model.config, ranks[i % len(ranks)], session.setting.targets, seed=s, dtype=dtype
                )
                for s in (2 * i, 2 * i + 1)
            ]
            for i in range(n)
        }
        session.bytes |= adapter_bytes([a for pair in versions.values() for a in pair], session.engine)
        alone = _answers_alone(session, trace, versions)
        span = max(trace[-1].arrival, 1.0)
        replacer = Replacer(session.engine, versions, span / _REPLACEMENTS)
        point, run = session.measure(trace, dict(case="replace", n=n), during=replacer.running)
        more = dict(
            replacements=len(replacer.history) - n,
            answers_by_version={str(v): _count_version(run.outputs, versions, v) for v in (0, 1)},
            wrong_digest=sum(
                o.adapter_digest not in replacer.allowed(str(o.adapter), asked, o.timings.arrival)
                for o, asked in zip(run.outputs, run.asked, strict=True)
            ),
            wrong_tokens=sum(_is_other(o, alone) for o in run.outputs),
        )
        yield point | dict(more=more) | session.describe()


def _count_version(outputs: Sequence[RequestOutput], versions: dict[str, Sequence[Adapter]], version: int) -> int:
    return sum(o.adapter_digest == versions[str(o.adapter)][version].digest for o in outputs)


def _answers_alone(
    session: Session, trace: Sequence[TraceRequest], versions: dict[str, Sequence[Adapter]]
) -> dict[tuple[str, str], list[int]]:
    """Tokens that each version answers an adapter's prompt with, by name and digest."""
    prompts = prompt_tokens(trace, session.model.config.vocab_size, session.args.seed)
    sampling = SamplingParams(max_tokens=max(r.output_len for r in trace), ignore_eos=True)
    first = {adapter_name(r.adapter): p for r, p in zip(reversed(trace), reversed(prompts), strict=True)}
    answers = {}
    for name, prompt in first.items():
        for adapter in versions[name]:
            digest = session.engine.add_adapter(name, adapter)
            (output,) = session.engine.generate([Request(prompt_token_ids=prompt, adapter=name, sampling=sampling)])
            answers[name, digest] = output.token_ids
    return answers


def _is_other(output: RequestOutput, alone: dict[tuple[str, str], list[int]]) -> bool:
    """Whether the answer goes the other version's way where the two versions part."""
    own = alone[str(output.adapter), str(output.adapter_digest)]
    (other,) = (t for (n, d), t in alone.items() if n == output.adapter and d != output.adapter_digest)
    parts = next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), len(own))
    got = output.token_ids
    return len(got) > parts and got[:parts] == own[:parts] and got[parts] == other[parts]
