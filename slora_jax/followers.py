"""One engine over several processes: process 0 schedules, and every other one repeats what its runner does.

Programs on several processes must be started by all of them, in the same order and with the same arguments. So process
0 sends each call of its Runner (a step's batch, sampling parameters, pages of an adapter) to the others, which
make the same call on a Runner of their own; see sharding/processes.py for how it travels.
"""

from collections.abc import Sequence, Set
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from pallas_kernels import AdapterTable
from sharding import Processes, ShardedTable, join
from slora_jax.batch import Batch, Output, Sampling
from slora_jax.runner import Runner


class LeaderRunner(Runner):
    """The Runner of process 0. Every call that starts a program on the devices goes to the followers first."""

    def __init__(self, processes: Processes, **options):
        self._processes = processes
        self._following = False  # the followers make their Runner themselves
        super().__init__(**options)
        self._following = True

    def _send(self, method: str, *args: Any) -> None:
        if self._following:
            self._processes.send((method, args))

    def reset(self) -> None:
        self._send("reset")
        super().reset()

    def require_adapters(self, rank: int, groups: Set[str]) -> bool:
        self._send("require_adapters", rank, groups)
        return super().require_adapters(rank, groups)

    def _place(self, chunk: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        return chunk  # it travels when it is written

    def put(self, batch: Batch) -> Batch:
        return batch  # as it is, it travels with its step

    def _write_chunk(self, page_ids: Sequence[int], chunk: jax.Array | np.ndarray) -> None:
        self._send("_write_chunk", list(page_ids), np.asarray(chunk))
        super()._write_chunk(page_ids, chunk)

    def forward(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        self._send("forward", batch)
        return super().forward(super().put(batch))

    def sample(self, logits: jax.Array, sampling: Sampling, rows: np.ndarray) -> Output:
        self._send("sample", sampling, rows)  # of the logits of the last step
        return super().sample(logits, sampling, rows)

    def keep(self, sampling: Sampling) -> Sampling:
        return sampling  # it travels with its step

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
    processes.meet()
    options["num_pages"] = int(multihost_utils.process_allgather(np.int32(options["num_pages"])).min())
    if processes.index == 0:
        return LeaderRunner(processes, **options)
    follow(processes, Runner(**options))
    raise SystemExit(0)


def follow(processes: Processes, runner: Runner) -> None:
    """Repeats process 0's calls until it closes."""
    logits = None
    while (message := processes.receive((Batch, Sampling, AdapterTable, ShardedTable))) is not None:
        method, args = message
        if method == "forward":
            logits, _ = runner.forward(runner.put(*args))
        elif method == "sample":
            assert logits is not None, "a step comes before its sampling"
            runner.sample(logits, *args)
        else:
            getattr(runner, method)(*args)
