"""Something that goes on beside a measurement."""

from collections.abc import Callable, Iterator
import contextlib
import threading


@contextlib.contextmanager
def every(seconds: float, call: Callable[[], object], name: str) -> Iterator[None]:
    """Calls a function this often while the context lasts, on a thread of this name; a first time after `seconds`."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(seconds):
            call()

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
