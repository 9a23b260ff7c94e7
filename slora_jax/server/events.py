"""Responses that last: an event stream, and waiting for an answer while watching whether the client is still there."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
import contextlib
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slora_jax.server.errors import ApiError


def event(data: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else to_json(data)
    return b"data: " + text.encode() + b"\n\n"


to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class EventStream(Response):
    """Sends events as they come. An ApiError among them becomes the last one.

    close: called at the end, also when the client leaves or does not read for `write_seconds`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], write_seconds: float, close: Callable[[], None]):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._write_seconds = write_seconds
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with contextlib.suppress(ClientDisconnect):
                await unless_gone(receive, self._pump(send))
        finally:
            self._close()

    async def _pump(self, send: Send) -> None:
        loop = asyncio.get_running_loop()

        async def write(body: bytes, more: bool = True) -> None:
            limit.reschedule(loop.time() + self._write_seconds)
            try:
                await send({"type": "http.response.body", "body": body, "more_body": more})
            except OSError:
                raise ClientDisconnect from None
            limit.reschedule(None)

        try:
            async with asyncio.timeout(None) as limit, contextlib.aclosing(self._events) as events:
                try:
                    async for item in events:
                        if item:
                            await write(item)
                except ApiError as error:
                    await write(event(error.body()))
                await write(b"", more=False)
        except TimeoutError:  # it does not read
            raise ClientDisconnect from None


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
