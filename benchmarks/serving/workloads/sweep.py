"""A trace, or one for each combination of the numbers of adapters, alphas, cvs and rates."""

import argparse
from collections.abc import Iterator, Sequence
import itertools
from typing import Any

from benchmarks.serving.workloads import OpenSession
from slora_jax.cli.workload import read_trace
from slora_jax.traces import TraceRequest


def points(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[TraceRequest]]]:
    """What names each point, and its trace."""
    if args.trace:
        yield dict(trace=args.trace), read_trace(args, adapters=0, rate=1.0)
        return
    for n, alpha, cv, rate in itertools.product(args.adapters, args.alpha, args.cv, args.rate):
        what = dict(n=n, alpha=alpha) if args.burst else dict(n=n, alpha=alpha, cv=cv, rate=rate)
        yield what, read_trace(args, adapters=n, rate=rate, alpha=alpha, cv=cv)


def longest(*traces: Sequence[TraceRequest]) -> int:
    return max(r.prompt_len + r.output_len for trace in traces for r in trace)


def measure(args: argparse.Namespace, open_session: OpenSession) -> Iterator[dict[str, Any]]:
    named = list(points(args))
    traces = [trace for _, trace in named]
    used = {r.adapter for trace in traces for r in trace}
    count = max((a + 1 for a in used if a is not None), default=0)
    if not args.trace and count:
        count = max(args.adapters)  # all of them are registered, whether the trace asks for them or not
    with open_session(adapters=count, longest=longest(*traces), base=None in used) as session:
        for what, trace in named:
            yield session.measure(trace, what)[0] | session.describe()
