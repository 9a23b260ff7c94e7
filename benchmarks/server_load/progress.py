"""What a load test is doing, on standard error, so that a run that is cut off shows how far it came."""

import asyncio
from collections import Counter
import sys
import time

_SECONDS = 10.0


def say(text: str) -> None:
    """A line with the time of day, which is the same in all of the benchmark's processes."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def say_answered(outcome: Counter[str], requests: int) -> None:
    """Says every few seconds how many requests were answered, until it is cancelled."""
    while True:
        await asyncio.sleep(_SECONDS)
        say(f"measuring: {outcome.total()} of {requests} requests are answered")
