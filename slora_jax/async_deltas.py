"""Answers for asyncio: deltas come from the delivery thread and are read on the event loop, which never waits."""

import asyncio
from collections.abc import Callable, Sequence
import contextlib

from slora_jax.jobs import Job, Sink
from slora_jax.requests import Delta, RequestOutput


class AsyncDeltas:
    """The pieces of the answers to requests that were started together, as (index of the request, Delta).

    A reader that is slow, or gone, holds nobody: pieces wait here, and there are no more of them than tokens asked for.
    """

    def __init__(self, abort: Callable[[str], object]):
        """abort: ends a request by its id; it must not block."""
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._jobs: Sequence[Job] = ()
        self._open = 0

    def sink(self, index: int) -> Sink:
        """Where the delivery thread puts the deltas of request number `index`."""

        def put(delta: Delta) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody reads any more
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, delta))

        return put

    def follow(self, jobs: Sequence[Job]) -> None:
        """The jobs whose sinks these are. To be called once."""
        self._jobs = jobs
        self._open = len(jobs)

    @property
    def jobs(self) -> Sequence[Job]:
        return self._jobs

    @property
    def outputs(self) -> list[RequestOutput]:
        """One for each request; they are complete when the iteration has ended."""
        return [job.output for job in self._jobs]

    def __aiter__(self) -> "AsyncDeltas":
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if not self._open:
            raise StopAsyncIteration
        item = await self._queue.get()
        self._open -= item[1].output is not None
        return item

    def close(self) -> None:
        """Aborts what has not finished. Returns at once; the pages are free before the engine's next step."""
        for job in self._jobs:
            if not job.finished:
                self._abort(job.output.request_id)
        self._open = 0
