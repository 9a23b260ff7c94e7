"""Answers for asyncio: deltas come from the delivery thread and are read on the event loop, which never waits.

A step ends with a token for each of hundreds of answers. Waking an event loop costs more than making such a token's
text, so all that comes while the loop is busy with something else reaches it in one go.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
import contextlib
import weakref

from slora_jax.jobs import Job, Sink
from slora_jax.requests import Delta, RequestOutput

_AT_ONCE = 64  # pieces handed out before the loop looks after its connections again


class _Mailbox:
    """What one thread has for an event loop. The loop is woken once for all that has gathered until it gets there."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = weakref.ref(loop)
        self._items: deque[tuple[AsyncDeltas, int, Delta]] = deque()
        self._called = False

    def put(self, reader: "AsyncDeltas", index: int, delta: Delta) -> None:
        """On the delivery thread."""
        self._items.append((reader, index, delta))
        if self._called:  # it is cleared before the items are taken, so none is left behind
            return
        self._called = True
        if (loop := self._loop()) is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody reads any more
                loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._called = False
        for _ in range(min(len(self._items), _AT_ONCE)):
            reader, index, delta = self._items.popleft()
            reader.put(index, delta)
        if self._items and (loop := self._loop()) is not None:
            self._called = True
            loop.call_soon(self._hand_out)


_mailboxes: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox]" = weakref.WeakKeyDictionary()


class AsyncDeltas:
    """The pieces of the answers to requests that were started together, as (index of the request, Delta).

    A reader that is slow, or gone, holds nobody: pieces wait here, and there are no more of them than tokens asked for.
    """

    def __init__(self, abort: Callable[[str], object], ends_only: bool = False):
        """abort: ends a request by its id; it must not block. ends_only: only the last piece of each completion is
        wanted, for who reads the outputs; the event loop hears of no other.
        """
        self._abort = abort
        self._ends_only = ends_only
        self._loop = asyncio.get_running_loop()
        self._mailbox = _mailboxes.setdefault(self._loop, _Mailbox(self._loop))
        self._items: list[tuple[int, Delta]] = []
        self._taken: deque[tuple[int, Delta]] = deque()  # by __anext__
        self._waiter: asyncio.Future[None] | None = None
        self._jobs: Sequence[Job] = ()
        self._open = 0

    def sink(self, index: int) -> Sink:
        """Where the delivery thread puts the deltas of request number `index`."""

        def put(delta: Delta) -> None:
            if delta.finish_reason is not None or not self._ends_only:
                self._mailbox.put(self, index, delta)

        return put

    def put(self, index: int, delta: Delta) -> None:
        """A piece has come. On the event loop."""
        self._items.append((index, delta))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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

    @property
    def ended(self) -> bool:
        """Whether all answers have been taken to their ends."""
        return not self._open

    async def take(self) -> list[tuple[int, Delta]]:
        """All pieces that have come since the last call, at least one; none after the last answer's end."""
        while not self._items:
            if not self._open:
                return []
            self._waiter = self._loop.create_future()
            await self._waiter
        items, self._items = self._items, []
        self._open -= sum(delta.output is not None for _, delta in items)
        return items

    def __aiter__(self) -> "AsyncDeltas":
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if not self._taken:
            self._taken.extend(await self.take())
        if not self._taken:
            raise StopAsyncIteration
        return self._taken.popleft()

    def close(self) -> None:
        """Aborts what has not finished. Returns at once; the pages are free before the engine's next step."""
        for job in self._jobs:
            if not job.finished:
                self._abort(job.output.request_id)
        self._open = 0
        self._items.clear()
        self._taken.clear()
