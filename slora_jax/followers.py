"""One engine over several processes: process 0 schedules, and every other one repeats what its runner does.

Programs on several processes must be started by all of them, in the same order and with the same arguments. So process
0 sends each call of its Runner (a step's batch, sampling parameters, an adapter for its pages) to the others, which
make the same call on a Runner of their own; see sharding/processes.py for how it travels.
"""

from collections import OrderedDict
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from sharding import Processes, join
from slora_jax.adapters import Adapter
from slora_jax.batch import Batch, Output, Sampling
from slora_jax.runner import Runner

_KEPT_BYTES = 16 << 30  # of adapters that a follower keeps on its host, so that loading them again sends nothing


@dataclasses.dataclass(frozen=True)
class _Known:
    """An adapter that the followers have already."""

    digest: str


class LeaderRunner(Runner):
    """The Runner of process 0. Every call that starts a program on the devices goes to the followers first."""

    def __init__(self, processes: Processes, **options):
        self._processes = processes
        self._following = False  # the followers make their Runner themselves
        self._known: OrderedDict[str, int] = OrderedDict()  # bytes by digest, least recently used first
        super().__init__(**options)
        self._following = True

    def _send(self, method: str, *args: Any) -> None:
        if self._following:
            self._processes.send((method, args))

    def reset(self) -> None:
        self._send("reset")
        super().reset()

    def require_rank(self, rank: int) -> bool:
        self._send("require_rank", rank)
        return super().require_rank(rank)

    def load_adapter(self, adapter: Adapter, page_ids: Sequence[int]) -> None:
        known = adapter.digest in self._known
        self._known[adapter.digest] = adapter.weights.buffer.nbytes
        self._known.move_to_end(adapter.digest)
        forgotten = []
        while sum(self._known.values()) > _KEPT_BYTES and len(self._known) > 1:
            forgotten.append(self._known.popitem(last=False)[0])
        self._send("load_adapter", _Known(adapter.digest) if known else adapter, list(page_ids), forgotten)
        super().load_adapter(adapter, page_ids)

    def forward(self, batch: Batch) -> jax.Array:
        self._send("forward", batch)
        return super().forward(batch)

    def sample(self, logits: jax.Array, sampling: Sampling, rows: np.ndarray) -> Output:
        self._send("sample", sampling, rows)  # of the logits of the last step
        return super().sample(logits, sampling, rows)

    def close(self) -> None:
        """Lets the followers go. Steps are no longer possible."""
        self._processes.close()


def make_runner(**options) -> Runner:
    """A Runner with these arguments. In process 0 of several it leads the others; in those it never returns: they run
    process 0's steps until its engine is closed, and then exit.
    """
    if jax.process_count() == 1:
        return Runner(**options)
    processes = join()
    options["num_pages"] = int(multihost_utils.process_allgather(np.int32(options["num_pages"])).min())
    if processes.index == 0:
        return LeaderRunner(processes, **options)
    follow(processes, Runner(**options))
    raise SystemExit(0)


def follow(processes: Processes, runner: Runner) -> None:
    """Repeats process 0's calls until it closes."""
    adapters: dict[str, Adapter] = {}
    logits = None
    while (message := processes.receive()) is not None:
        method, args = message
        if method == "forward":
            logits = runner.forward(*args)
        elif method == "sample":
            assert logits is not None, "a step comes before its sampling"
            runner.sample(logits, *args)
        elif method == "load_adapter":
            adapter, page_ids, forgotten = args
            for digest in forgotten:
                adapters.pop(digest, None)
            adapter = adapters[adapter.digest] if isinstance(adapter, _Known) else adapter
            adapters[adapter.digest] = adapter
            runner.load_adapter(adapter, page_ids)
        else:
            getattr(runner, method)(*args)
