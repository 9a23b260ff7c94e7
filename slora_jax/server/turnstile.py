"""Lets calls through a few at a time, so that a crowd of them does not keep the event loop from everybody else."""

import asyncio
from collections import deque


class Turnstile:
    """Lets `at_once` callers through in one turn of the event loop; the others wait for the next turns, in order.

    Between two turns the loop looks after its connections: what needs no turnstile is answered meanwhile.
    """

    def __init__(self, at_once: int):
        self._at_once = at_once
        self._left = at_once  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    async def enter(self) -> None:
        """Returns when it is the caller's turn."""
        loop = asyncio.get_running_loop()
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn, loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._at_once
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # its caller has not gone meanwhile
                turn.set_result(None)
                self._left -= 1
        self._turning = self._left < self._at_once
        if self._turning:
            loop.call_soon(self._turn, loop)
