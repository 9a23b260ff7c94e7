"""How much a caller may ask for: a token bucket."""

from collections.abc import Callable
import math
import time


class TokenBucket:
    """Gives out `per_minute` units a minute and holds a minute's worth at most. None gives without end.

    clock: seconds that only grow.
    """

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic):
        self.per_minute = per_minute
        self._clock = clock
        self._level = per_minute or 0.0
        self._at = clock()

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there, 0.0 if it is. More than a minute's worth counts as a minute's worth."""
        if self.per_minute is None:
            return 0.0
        self._fill()
        missing = min(amount, self.per_minute) - self._level
        if missing <= 0:
            return 0.0
        return missing * 60.0 / self.per_minute if self.per_minute else math.inf

    def take(self, amount: float) -> None:
        """Takes `amount`, even if that leaves a debt: what an answer cost is known only at its end."""
        if self.per_minute is not None:
            self._fill()
            self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        assert self.per_minute is not None
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60.0)
        self._at = now
