"""Workloads of ``slora-jax bench``: each module has ``measure(args, open_session) -> points``."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from benchmarks.serving.session import Session


class OpenSession(Protocol):
    """Opens a session of the system that is measured."""

    def __call__(self, *, adapters: int, longest: int, base: bool = False) -> Session: ...


Measure = Callable[[argparse.Namespace, OpenSession], Iterator[dict[str, Any]]]
