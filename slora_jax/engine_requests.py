"""The requests' part of the Engine's interface."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
import contextlib
import queue
from typing import Any

from slora_jax.admission import Admission
from slora_jax.async_deltas import AsyncDeltas
from slora_jax.core import EngineCore
from slora_jax.engine_loop import EngineLoop
from slora_jax.errors import SloraError
from slora_jax.jobs import Job, Sink
from slora_jax.progress import progress_bar
from slora_jax.requests import Delta, Request, RequestOutput

_QUICK_TOKENS = 8192  # of prompts, which are checked in less than a millisecond


class EngineRequests:
    """Runs, streams, aborts and lists requests. A base class of Engine."""

    _admission: Admission
    _core: EngineCore
    _loop: EngineLoop

    def generate(
        self, requests: Sequence[Request | str], *, progress: bool = False, on_delta: Sink | None = None
    ) -> list[RequestOutput]:
        """Runs requests, together with whatever else the engine serves, and returns their outputs in order.

        Every request is checked before any is queued: RequestError or AdapterError names the first bad one. A failure
        later on ends that request alone, with finish_reason "error". on_delta: called with each piece of every answer,
        on a thread that hands out all answers; what it raises is logged and changes no answer.
        """
        finished: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

        def sink(delta: Delta) -> None:
            try:
                if on_delta:
                    on_delta(delta)
            finally:
                if delta.output:
                    finished.put(delta.output)

        jobs = [self._admission.job(r, sink) for r in requests]
        self._loop.call(lambda: self._start(jobs))
        with progress_bar("generating", progress) as report:
            for done in range(len(jobs)):
                finished.get()
                report(done + 1, len(jobs), "requests")
        return [job.output for job in jobs]

    def stream(self, request: Request | str) -> Iterator[Delta]:
        """Runs one request and yields its answer piece by piece. Closing the iterator early aborts the request."""
        deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        job = self._admission.job(request, deltas.put)
        self._loop.call(lambda: self._start([job]))
        return self._deltas(job, deltas)

    def _deltas(self, job: Job, deltas: "queue.SimpleQueue[Delta]") -> Iterator[Delta]:
        try:
            while True:
                delta = deltas.get()
                yield delta
                if delta.output:
                    return
        finally:
            if not job.finished:
                self.abort(job.output.request_id)

    async def astart(self, requests: Sequence[Request | str], *, ends_only: bool = False) -> AsyncDeltas:
        """Checks and queues requests, and returns their answers piece by piece. The event loop never waits for a step.

        Every request is checked before any is queued; errors are those of generate. The caller closes what it gets.
        ends_only: only the last piece of each completion comes.
        """

        def make_jobs(sink: Callable[[int], Sink]) -> list[Job]:
            return [self._admission.job(r, sink(i)) for i, r in enumerate(requests)]

        return await self._astart(make_jobs, ends_only, _is_quick(requests))

    async def _astart(
        self, make_jobs: Callable[[Callable[[int], Sink]], list[Job]], ends_only: bool, quick: bool = False
    ) -> AsyncDeltas:
        """make_jobs: checks requests and makes jobs, given the sink of each by its number; on a worker thread, which
        costs more than it does itself if it is quick.
        """

        def abort(request_id: str) -> None:
            with contextlib.suppress(SloraError):  # a closed engine has aborted it already
                self._loop.submit(lambda: self._abort(request_id))

        deltas = AsyncDeltas(abort, ends_only)
        jobs = make_jobs(deltas.sink) if quick else await asyncio.to_thread(make_jobs, deltas.sink)
        deltas.follow(jobs)
        try:
            await asyncio.wrap_future(self._loop.submit(lambda: self._start(jobs)))
        except BaseException:
            deltas.close()
            raise
        return deltas

    async def astream(self, request: Request | str) -> AsyncIterator[Delta]:
        """stream for asyncio."""
        deltas = await self.astart([request])
        try:
            async for _, delta in deltas:
                yield delta
        finally:
            deltas.close()

    async def agenerate(self, request: Request | str) -> RequestOutput:
        """Runs one request and returns its output. Cancelling the task aborts the request."""
        deltas = await self.astart([request], ends_only=True)
        try:
            async for _ in deltas:
                pass
            return deltas.outputs[0]
        finally:
            deltas.close()

    def abort(self, request_id: str) -> bool:
        """Ends a request now, with finish_reason "abort"; its pages are free before the next step. False if it is not
        in flight.
        """
        return self._loop.call(lambda: self._abort(request_id))

    def prompt_ids(self, request: Request) -> list[int]:
        """Token ids that a request's prompt stands for. RequestError as generate raises it."""
        return self._admission.prompt_ids(request)

    def list_requests(self) -> list[dict[str, Any]]:
        """Requests in flight: request_id, adapter, state ("running" or "waiting"), prompt_tokens, generated_tokens."""
        return self._loop.call(lambda: [job.describe(self._core.scheduler.running) for job in self._core.jobs()])

    def _start(self, jobs: list[Job]) -> None:
        """Queues jobs. On the engine's thread."""
        for job in jobs:
            self._core.start(job)

    def _abort(self, request_id: str) -> bool:
        """On the engine's thread."""
        jobs = [j for j in self._core.jobs() if j.output.request_id == request_id]
        for job in jobs:
            self._core.end(job, "abort")
        return bool(jobs)


def _is_quick(requests: Sequence[Request | str]) -> bool:
    """Whether there is nothing to tokenise, to compile or to go through that would take long."""
    tokens = 0
    for request in requests:
        if isinstance(request, str) or request.prompt_token_ids is None or request.sampling.structured is not None:
            return False
        tokens += len(request.prompt_token_ids)
    return tokens <= _QUICK_TOKENS
