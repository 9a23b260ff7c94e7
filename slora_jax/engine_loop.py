"""The engine's thread: runs steps while there is work, and whatever other threads ask it to run between two steps."""

from collections.abc import Callable
from concurrent.futures import Future
import queue
import threading
from typing import Any

from slora_jax.core import EngineCore
from slora_jax.errors import SloraError

_IDLE_SECONDS = 0.002  # between two looks at a queue from which nothing may start yet


class EngineLoop:
    """Owns an EngineCore: nothing else may touch it while the loop lives."""

    def __init__(self, core: EngineCore):
        self._core = core
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slora-jax engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the loop's thread between two steps and returns its result or raises its error."""
        if threading.current_thread() is self._thread:
            return function()
        return self.submit(function).result()

    def submit(self, function: Callable[[], Any]) -> Future:
        """call without waiting. A future that is cancelled before the function's turn cancels it."""
        if self._closed.is_set():
            raise SloraError("the engine is closed")
        future: Future = Future()
        self._calls.put((function, future))
        return future

    def close(self) -> None:
        """Aborts all jobs and ends the thread. Harmless when called again."""
        if not self._closed.is_set():
            self._closed.set()
            self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        idle = False  # there is work, but quotas let nothing start just now
        while True:
            try:
                if self._core.has_work():
                    item = self._calls.get(block=idle, timeout=_IDLE_SECONDS)
                else:
                    item = self._calls.get()
            except queue.Empty:
                idle = not self._core.step()
                continue
            if item is None:
                break
            self._core.flush()  # before something that may take long
            self._serve(*item)
        for job in self._core.jobs():
            self._core.end(job, "abort")
        self._core.drain()
        while not self._calls.empty():
            if (item := self._calls.get()) and item[1].set_running_or_notify_cancel():
                item[1].set_exception(SloraError("the engine is closed"))

    @staticmethod
    def _serve(function: Callable[[], Any], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:  # handed to the caller, whose error it is
            future.set_exception(error)
