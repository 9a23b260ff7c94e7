"""Brings adapters to host memory ahead of their turn, on threads of its own."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
import dataclasses
import logging
import queue
import time

from slora_jax.adapters import Adapter, AdapterReader
from slora_jax.adapters.directory import SourceErrors, changed
from slora_jax.errors import SloraError
from slora_jax.host_tier import HostTier
from slora_jax.placement import HostImage, HostImages
from slora_jax.registry import AdapterRecord

logger = logging.getLogger(__name__)

_THREADS = 4  # hashing, laying out and copying are of one core each; more would take them from tokenizing


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """A read has ended: with the contents' digests, or with an error, one line for the requests that wait for it."""

    record: AdapterRecord
    digest: str = ""
    weights_digest: str = ""
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    digest: str
    weights_digest: str
    image: HostImage
    from_disk: bool
    seconds: float


class AdapterLoader:
    """Fills the host tier. Owned by the engine's thread, as the tier is; only reading, checking, hashing and laying out
    happen on threads of its own.

    wake: called, from any thread, when a read has ended and `finished` has something to give.
    """

    def __init__(self, budget: int, images: HostImages, reader: AdapterReader, wake: Callable[[], object]):
        self.tier = HostTier(budget)
        self.images = images
        self._reader = reader
        self._wake = wake
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="slora-jax adapters")
        self._reading: set[Hashable] = set()
        self._done: queue.SimpleQueue[tuple[AdapterRecord, Hashable, Future[_Read | str]]] = queue.SimpleQueue()
        self.counters: dict[str, float] = dict(reads=0, images=0, failures=0, seconds=0.0)

    def image(self, record: AdapterRecord) -> HostImage | None:
        """The record's image, if it lies in host memory."""
        return self.tier.get(record.weights_digest)

    def is_ready(self, record: AdapterRecord) -> bool:
        return self.image(record) is not None

    def want(self, records: Iterable[AdapterRecord]) -> None:
        """Says which adapters will be needed next, the most urgent first: those that are not there are read, and those
        that are there stay, as many as the budget holds.
        """
        keep: set[Hashable] = set()
        missing: list[tuple[AdapterRecord, Hashable, int]] = []
        room = self.tier.budget
        for record in records:
            key: Hashable = record.weights_digest or record.identity
            if key in keep:
                continue
            nbytes = self.images.nbytes(record.shape)
            if nbytes > room:
                break  # what comes later must not take its space
            room -= nbytes
            keep.add(key)
            if key in self.tier:
                self.tier.touch(key)
            elif key not in self._reading:
                missing.append((record, key, nbytes))
        for record, key, nbytes in missing:
            if not self.tier.reserve(key, nbytes, keep):
                break  # a read that nobody wants any more holds the space, and will end
            self._start(record, key)

    def finished(self) -> Iterator[Outcome]:
        """Takes in the reads that have ended since the last call."""
        while not self._done.empty():
            record, place, future = self._done.get()
            self._reading.discard(place)
            try:
                read = future.result()
            except CancelledError:
                self.tier.drop(place)
                continue
            if isinstance(read, str):
                self.tier.drop(place)
                self.counters["failures"] += 1
                yield Outcome(record, error=read)
            else:
                self.tier.fill(place, read.weights_digest, read.image)
                self.counters["images"] += 1
                self.counters["reads"] += read.from_disk
                self.counters["seconds"] += read.seconds
                yield Outcome(record, read.digest, read.weights_digest)

    def forget(self, weights_digest: str) -> None:
        """Frees the memory of weights that no name points at and no request uses."""
        self.tier.drop(weights_digest)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, record: AdapterRecord, key: Hashable) -> None:
        self._reading.add(key)
        future = self._threads.submit(self._try_to_read, record)

        def ended(future: "Future[_Read | str]") -> None:
            self._done.put((record, key, future))
            self._wake()

        future.add_done_callback(ended)

    def _try_to_read(self, record: AdapterRecord) -> _Read | str:
        """On one of the threads: what was read, or why it cannot be, in one line.

        The future gets no exception. Its traceback would lead to all that the read had in memory, in a cycle with the
        future, and stay until Python looks for cycles among everything there is, which it seldom does.
        """
        try:
            return self._read(record)
        except SloraError as error:
            return str(error)
        except Exception as error:  # whatever it is, it must end the requests that wait, and no others
            logger.exception("an adapter cannot be loaded")
            text = str(error).strip().splitlines() or [""]
            return f"cannot be loaded ({type(error).__name__}: {text[0]})"

    def _read(self, record: AdapterRecord) -> _Read:
        began = time.monotonic()
        if isinstance(record.contents, Adapter):
            adapter = record.contents
        else:
            adapter = self._reader.read(record.contents)
            if record.digest is not None and adapter.digest != record.digest:
                with SourceErrors(record.contents.path):
                    raise changed()
        image = self.images.make(adapter)
        from_disk = adapter is not record.contents
        return _Read(adapter.digest, adapter.weights_digest, image, from_disk, time.monotonic() - began)
