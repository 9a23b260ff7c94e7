"""A noisy tenant: five quiet ones alone, then beside one that asks at ten times the rate of each.

``rate`` is that of the quiet ones together. Say which policy is measured: --policy fair.
"""

import argparse
from collections.abc import Iterator
import dataclasses
from typing import Any

from benchmarks.serving.session import spread
from benchmarks.serving.workloads import OpenSession
from benchmarks.serving.workloads.sweep import longest
from slora_jax.cli.workload import read_trace
from slora_jax.traces import TraceRequest, merge

_QUIET, _FACTOR = 5, 10


def tenants(args: argparse.Namespace, adapters: int) -> tuple[list[TraceRequest], list[TraceRequest]]:
    """The quiet tenants' trace and the noisy one's, which has an adapter of its own."""
    rate = args.rate[0]
    quiet = read_trace(args, adapters=adapters, rate=rate, alpha=args.alpha[0], cv=args.cv[0])
    quiet = [dataclasses.replace(r, tenant=f"quiet-{i % _QUIET}") for i, r in enumerate(quiet)]
    factor = _FACTOR / _QUIET
    more = None if args.requests is None else int(args.requests * factor)
    options = argparse.Namespace(**vars(args) | dict(seed=args.seed + 1, requests=more))
    noisy = read_trace(options, adapters=1, rate=rate * factor, cv=args.cv[0])
    return quiet, [dataclasses.replace(r, tenant="noisy", adapter=adapters) for r in noisy]


def measure(args: argparse.Namespace, open_session: OpenSession) -> Iterator[dict[str, Any]]:
    n = max(args.adapters)
    quiet, noisy = tenants(args, n)
    mixed = merge(quiet, noisy)
    alone: dict[str, float] | None = None
    with open_session(adapters=n + 1, longest=longest(mixed), base=n == 0) as session:
        for case, trace in (("alone", quiet), ("beside a noisy tenant", mixed)):
            point, run = session.measure(trace, dict(case=case, policy=args.policy))
            waits = [r.ttft for r in run.records if r.request.tenant != "noisy" and r.ttft is not None]
            others = spread(waits) or dict(p50=0.0, p90=0.0, p99=0.0)
            alone = alone or others
            ratio = others["p99"] / alone["p99"] if alone["p99"] else None
            yield point | dict(more=dict(quiet_ttft=others, p99_of_alone=ratio)) | session.describe()
