"""HTTP/1.1 with a limit on how long a client may take to send headers, and bodies that are written without a task."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

BODY_WRITER = "slora_jax.body_writer"  # the BodyWriter among a scope's extensions


class BodyWriter:
    """Writes more of a response's body at once, where ASGI's `send` needs a task that is woken, and half a dozen calls
    of middleware that have nothing to do with bodies.
    """

    def __init__(self, cycle: RequestResponseCycle):
        self._cycle = cycle

    def ready(self) -> bool:
        """Whether the response has begun and not ended, and the client keeps up with it."""
        cycle = self._cycle
        begun = cycle.response_started and not cycle.response_complete
        return begun and not (cycle.disconnected or cycle.flow.write_paused)

    def write(self, body: bytes) -> None:
        """To be called when it is ready."""
        self._cycle.transport.write(self._cycle.conn.send(h11.Data(data=body)))


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol, which closes a connection whose headers do not come: without it a few thousand clients that
    send a byte now and then (slow loris) would take every file handle. uvicorn itself closes connections that are idle
    between requests, and the Edge limits the time for bodies.
    """

    header_seconds = 10.0
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self.cycle is not None:  # a call has come, whose task runs later
            scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]  # uvicorn knows ASGI's extensions only
            scope.setdefault("extensions", {})[BODY_WRITER] = BodyWriter(self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # a request has begun
            self._stop_timer()
        elif self._header_timer is None and not self.transport.is_closing():
            self._header_timer = self.loop.call_later(self.header_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def guarded_protocol(header_seconds: float) -> type[GuardedProtocol]:
    """The class for uvicorn's setting `http`."""
    return type("GuardedProtocol", (GuardedProtocol,), {"header_seconds": header_seconds})
