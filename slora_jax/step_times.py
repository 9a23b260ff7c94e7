"""Where the seconds of steps go: the engine's thread by what it does, and the device."""

from collections.abc import Callable
import time
from typing import Any

PARTS = ("plan", "adapters", "build", "dispatch", "wait", "collect")


class StepTimes:
    """Sums over all steps, in seconds.

    host: of the engine's thread. plan: what the step computes; adapters: starting copies of adapters to pages; build:
    its arrays; dispatch: starting programs, and compiling them where that was not done ahead; wait: for the device;
    collect: taking results. Where the device is busy all the time, nearly all is in "wait"; where it is not, the rest
    is what keeps it waiting.
    device: from a step's dispatch, or the end of the step before if that was later, until its results were seen. Steps
    that compiled something are left out. It counts time in which the host was late to look as the device's.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.host = dict.fromkeys(PARTS, 0.0)
        self.device = 0.0
        self._clock = clock
        self._at = 0.0

    def begin(self) -> None:
        """The engine's thread turns to a step."""
        self._at = self._clock()

    def mark(self, part: str) -> None:
        """What was done since the last mark, or begin, was this part."""
        now = self._clock()
        self.host[part] += now - self._at
        self._at = now

    def as_dict(self) -> dict[str, Any]:
        """For Engine.stats."""
        return dict(host=dict(self.host), device=self.device)
