"""Responses that last: an event stream, and waiting for an answer while watching whether the client is still there."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
import contextlib
from typing import Any

import pydantic_core
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slora_jax.server.errors import ApiError
from slora_jax.server.protocol import BODY_WRITER, BodyWriter


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def to_json(data: Any) -> bytes:
    """Compact JSON. pydantic's writer takes a fourth of the time of the standard library's, and there is an event for
    every token.
    """
    return pydantic_core.to_json(data, inf_nan_mode="null")


class EventStream(Response):
    """Sends events as they come. An ApiError among them becomes the last one.

    close: called at the end, also when the client leaves or does not read for `write_seconds`. begun: called once
    headers are out, if the server has something that writes more of the body without a task; whoever takes that must
    use it only while `events` wait for their next.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        write_seconds: float,
        close: Callable[[], None],
        begun: Callable[[BodyWriter], None] | None = None,
    ):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._write_seconds = write_seconds
        self._close = close
        self._begun = begun

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            writer = scope.get("extensions", {}).get(BODY_WRITER)
            if writer is not None and self._begun is not None:
                self._begun(writer)
            with contextlib.suppress(ClientDisconnect):
                await unless_gone(receive, self._pump(send))
        finally:
            self._close()

    async def _pump(self, send: Send) -> None:
        try:
            async with asyncio.timeout(None) as limit, contextlib.aclosing(self._events) as events:
                patience = _Patience(self._write_seconds, limit)
                try:
                    async for item in events:
                        if item:
                            await patience.write(send, item)
                    await patience.write(send, b"", more=False)
                except ApiError as error:
                    await patience.write(send, event(error.body()), more=False)
                finally:
                    patience.end()
        except TimeoutError:  # it does not read
            raise ClientDisconnect from None


class _Patience:
    """Writes to a client, and lets `limit` end once a write has taken `seconds`. One timer looks at that now and then:
    to set one for every token would take as long as the writing.
    """

    def __init__(self, seconds: float, limit: asyncio.Timeout):
        self._seconds = seconds
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._began: float | None = None  # the write under way
        self._timer = self._loop.call_later(seconds, self._look)

    async def write(self, send: Send, body: bytes, more: bool = True) -> None:
        self._began = self._loop.time()
        try:
            await send({"type": "http.response.body", "body": body, "more_body": more})
        except OSError:
            raise ClientDisconnect from None
        self._began = None

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        since = now if self._began is None else self._began
        if now - since >= self._seconds:
            self._limit.reschedule(now)
        else:
            self._timer = self._loop.call_at(since + self._seconds, self._look)


async def unless_gone[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer_unless_gone(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The result of `work` as JSON. A client that left meanwhile gets nothing, and the work ends."""
    try:
        return Response(to_json(await unless_gone(request.receive, work)), media_type="application/json")
    except ClientDisconnect:
        return Response(status_code=499)
