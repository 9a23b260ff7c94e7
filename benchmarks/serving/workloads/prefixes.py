"""Prompts of an adapter that begin alike, and the same lengths without anything in common."""

import argparse
from collections.abc import Iterator
import dataclasses
from typing import Any

from benchmarks.serving.workloads import OpenSession
from benchmarks.serving.workloads.sweep import longest
from slora_jax.cli.workload import read_trace

_PREFIX = 256


def measure(args: argparse.Namespace, open_session: OpenSession) -> Iterator[dict[str, Any]]:
    n = max(args.adapters)
    options = argparse.Namespace(**vars(args) | dict(prefix=args.prefix or _PREFIX))
    shared = read_trace(options, adapters=n, rate=args.rate[0], alpha=args.alpha[0], cv=args.cv[0])
    apart = [dataclasses.replace(r, prefix_len=0) for r in shared]
    with open_session(adapters=n, longest=longest(shared), base=n == 0) as session:
        for case, trace in (("nothing shared", apart), ("shared", shared)):
            yield session.measure(trace, dict(case=case, prefix=options.prefix))[0] | session.describe()
