"""The engine with the base model only: the same requests, each without its adapter."""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from benchmarks.serving.session import Session
from benchmarks.serving.workloads import OpenSession
from slora_jax.traces import Setting, TraceRequest


class BaseSession(Session):
    """Asks the base model, whatever adapter a request names."""

    def measure(self, trace: Sequence[TraceRequest], what: Mapping[str, Any], **options):
        return super().measure([dataclasses.replace(r, adapter=None) for r in trace], what, **options)


def open_session(args: argparse.Namespace, setting: Setting) -> OpenSession:
    def open(*, adapters: int, longest: int, base: bool = False) -> Session:
        return BaseSession(args, setting, adapters=0, longest=longest, base=True)

    return open
