"""More adapters than fit: hit rate, first tokens of hits and misses, and what loads cost those who need none.

One request in five is for the base model: a bystander. ``page_pool`` should hold a fraction of the adapters. The
control is the same trace with one adapter for all, which is loaded once.
"""

import argparse
from collections.abc import Iterator
import dataclasses
from typing import Any

from benchmarks.serving.session import spread
from benchmarks.serving.workloads import OpenSession
from benchmarks.serving.workloads.sweep import longest
from slora_jax.cli.workload import read_trace

_BYSTANDERS = 5


def measure(args: argparse.Namespace, open_session: OpenSession) -> Iterator[dict[str, Any]]:
    n = max(args.adapters)
    trace = read_trace(args, adapters=n, rate=args.rate[0], alpha=args.alpha[0], cv=args.cv[0])
    trace = [dataclasses.replace(r, adapter=None) if i % _BYSTANDERS == 0 else r for i, r in enumerate(trace)]
    control = [r if r.adapter is None else dataclasses.replace(r, adapter=0) for r in trace]
    with open_session(adapters=n, longest=longest(trace), base=True) as session:
        for case, requests in (("control", control), ("churn", trace)):
            point, run = session.measure(requests, dict(case=case, n=n))
            missed = [o.request_id in run.loaded_for for o in run.outputs]
            rows = [(r, miss) for r, miss in zip(run.records, missed, strict=True) if r.ttft is not None]
            more = dict(
                hits=spread([r.ttft for r, miss in rows if r.request.adapter is not None and not miss]),
                misses=spread([r.ttft for r, miss in rows if miss]),
                bystander_tpot=spread([r.tpot for r, _ in rows if r.request.adapter is None and r.tpot]),
            )
            yield point | dict(more=more) | session.describe()
