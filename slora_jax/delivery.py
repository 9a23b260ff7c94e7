"""Hands out answers: detokenises, looks for stop strings and calls the requests' sinks, on a thread of its own."""

from collections.abc import Callable, Sequence
import logging
import queue
import threading

from slora_jax.jobs import Generation
from slora_jax.requests import TokenLogprob

logger = logging.getLogger(__name__)


# What happened to a completion: (generation, token, log-probability, reason, error). A token was sampled, or it ended,
# or both. reason: the finish_reason if the engine computes no more of it, and "complete" where the form that its text
# shall have is. error: the text that goes with it. A plain tuple, because there is one for every token.
Event = tuple[Generation, int | None, TokenLogprob | None, str | None, str | None]


class Delivery:
    """One thread, so that the pieces of each answer keep their order.

    stopped: called when a stop string ended a completion that the engine still computes, before its last delta is
    handed out; on the delivery thread.
    """

    def __init__(self, stopped: Callable[[Generation], object]):
        self._stopped = stopped
        self._queue: queue.SimpleQueue[Sequence[Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slora-jax delivery", daemon=True)
        self._thread.start()

    def put(self, events: Sequence[Event]) -> None:
        """Queues events. Returns at once."""
        if events:
            self._queue.put(events)

    def close(self) -> None:
        """Hands out what was queued and ends the thread."""
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (events := self._queue.get()) is not None:
            for generation, token, logprob, reason, error in events:
                try:
                    generation.take(token, logprob, reason, error, self._stopped)
                except Exception:  # one answer that cannot be handed out must not hold up the others
                    logger.exception("request %s: a token was lost", generation.job.output.request_id)
