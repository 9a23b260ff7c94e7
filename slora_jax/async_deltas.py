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

_AT_ONCE = 64  # readers that get what has come for them before the loop looks after its connections again

Pieces = list[tuple[int, Delta]]


class _Mailbox:
    """For whom one thread has pieces. The loop is woken once for all that have gathered until it gets there."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = weakref.ref(loop)
        self._readers: deque[AsyncDeltas] = deque()
        self._called = False

    def put(self, reader: "AsyncDeltas") -> None:
        """On the delivery thread."""
        self._readers.append(reader)
        if self._called:  # it is cleared before the readers are taken, so none is left behind
            return
        self._called = True
        if (loop := self._loop()) is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody reads any more
                loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._called = False
        for _ in range(min(len(self._readers), _AT_ONCE)):
            self._readers.popleft().receive()
        if self._readers and (loop := self._loop()) is not None:
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
        self._coming: deque[tuple[int, Delta]] = deque()  # from the delivery thread
        self._announced = False  # the mailbox knows of them
        self._items: Pieces = []
        self._taken: deque[tuple[int, Delta]] = deque()  # by __anext__
        self._waiter: asyncio.Future[None] | None = None
        self._diverted: Callable[[Pieces], bool] | None = None
        self._jobs: Sequence[Job] = ()
        self._open = 0

    def sink(self, index: int) -> Sink:
        """Where the delivery thread puts the deltas of request number `index`."""

        def put(delta: Delta) -> None:
            if delta.finish_reason is not None or not self._ends_only:
                self._coming.append((index, delta))
                if not self._announced:  # it is cleared before the pieces are taken, so none is left behind
                    self._announced = True
                    self._mailbox.put(self)

        return put

    def divert(self, take: Callable[[Pieces], bool]) -> None:
        """Pieces that come while the reader waits go to `take` first, which must not raise; where it says False they
        are the reader's. To wake a task for every token costs more than to write one.
        """
        self._diverted = take

    def receive(self) -> None:
        """Takes what has come. On the event loop."""
        self._announced = False
        while self._coming:
            self._items.append(self._coming.popleft())
        if self._waiter is None or self._waiter.done() or not self._items:
            return
        if self._diverted is not None and self._diverted(self._items):
            self._items.clear()
        else:
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

    async def take(self) -> Pieces:
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
        self._diverted = None
        self._coming.clear()
        self._items.clear()
        self._taken.clear()
