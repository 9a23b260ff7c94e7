"""Follows the adapters of the requests in flight through the tiers: disk, host memory, pages.

The loader reads them, the scheduler gives them pages and says what is copied in which step; this sees to it that each
knows what it has to, and that an adapter that cannot be read ends the requests that wait for it, and no others.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
import itertools
from typing import Any

from slora_jax.adapter_loader import AdapterLoader, Outcome
from slora_jax.adapter_pages import adapter_owner
from slora_jax.adapters import AdapterShape
from slora_jax.errors import AdapterError, SloraError
from slora_jax.jobs import Job
from slora_jax.page_loads import Load
from slora_jax.placement import HostImage
from slora_jax.registry import AdapterRecord, AdapterRegistry
from slora_jax.runner import Chunks
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import AdapterUse

_AHEAD = 64  # waiting sequences whose adapters are read ahead

Send = Callable[[HostImage, int, int], Chunks]
"""Begins to copy pages `start` to `stop` of an image to the device."""

Write = Callable[[Chunks, Sequence[int]], None]
"""Writes pieces of an image, sent or not, to the ids of all of its adapter's pages."""


class AdapterTiers:
    """Owned by the engine's thread.

    send, write: bring part of an image to its pages. end: ends a job that waits, with an error. page_seconds: to copy a
    page.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        loader: AdapterLoader,
        scheduler: Scheduler,
        send: Send,
        write: Write,
        end: Callable[[Job, str], None],
        page_seconds: float = 0.0,
    ):
        self.loader = loader
        self.shapes: dict[str, AdapterShape] = {}  # digest -> of adapters that jobs in flight use
        self._registry = registry
        self._scheduler = scheduler
        self._sent: dict[tuple[str, int], Chunks] = {}  # digest and first page -> what the next step's plan has written
        self._written: list[Chunks] = []  # what the last steps' loads took of the device's memory
        self._send = send
        self._write = write
        self._end = end
        self._page_seconds = page_seconds
        self._jobs: dict[AdapterRecord, set[Job]] = {}
        self._users: Counter[str] = Counter()  # jobs by digest, where it is known
        self._pinned: dict[AdapterRecord, None] = {}
        self._prefetched: dict[AdapterRecord, list[Future[None]]] = {}  # and who waits until they are in host memory
        self.page_loads = 0
        self._pages = scheduler.adapters
        self._pages.is_ready = lambda use: loader.is_ready(use.source)

    def use(self, record: AdapterRecord) -> AdapterUse:
        """What the scheduler needs to know of an adapter. From any thread."""
        pages = self.loader.images.num_pages(record.shape)
        return AdapterUse(record.identity, pages, pages * self._page_seconds, record)

    def start(self, job: Job) -> None:
        """A job begins to wait."""
        if job.adapter is not None:
            self._jobs.setdefault(job.adapter, set()).add(job)
            if job.adapter.digest is not None:
                self._name(job, job.adapter.digest)

    def finish(self, job: Job) -> None:
        """A job has ended."""
        record = job.adapter
        if record is None or job not in self._jobs.get(record, ()):
            return
        self._jobs[record].remove(job)
        if not self._jobs[record]:
            del self._jobs[record]
        if record.digest is not None:
            self._users[record.digest] -= 1
        self.release(record)

    @property
    def pinned(self) -> list[AdapterRecord]:
        """From any thread."""
        return list(self._pinned)

    def release(self, *records: AdapterRecord) -> None:
        """Frees what is kept of contents that no name points at and no job uses any more."""
        for record in records:
            self._release(record)

    def _release(self, record: AdapterRecord) -> None:
        if not record.registered:
            self._pinned.pop(record, None)
            self._settle(record, AdapterError("the adapter was removed before it was read"))
        digest = record.digest
        if digest is None or self._users[digest]:
            return
        del self._users[digest]
        self.shapes.pop(digest, None)
        if not self._registry.has_digest(digest):
            self._scheduler.forget_adapter(digest)
            weights = record.weights_digest
            assert weights is not None
            copied = any(use.source.weights_digest == weights for use in self._pages.loads.adapters())
            if not copied and not self._registry.has_weights(weights):
                self.loader.forget(weights)

    def poll(self) -> None:
        """Takes in what was read since the last call."""
        for outcome in self.loader.finished():
            if outcome.error is None:
                self._read(outcome)
            else:
                self._failed(outcome.record, outcome.error)

    def look_ahead(self) -> None:
        """Has the adapters read that will be needed next. To be called when a plan's loads were written: from then on
        only those that are under way keep their place in host memory.
        """
        pages = self._pages
        if not (pages.loads or self._scheduler.waiting or pages.prefetches or self._pinned or self._prefetched):
            return
        copied = [use.source for use in pages.loads.adapters()]
        ahead = (use.source for use in self._scheduler.upcoming(_AHEAD))
        later = [use.source for use in pages.prefetches.values()]
        self.loader.want(itertools.chain(copied, self._pinned, ahead, self._prefetched, later))

    def send(self, loads: Sequence[Load]) -> None:
        """Begins to copy to the device what the next plan says to write, without waiting for it.

        The memory of what was written is given back only now, for this to take: otherwise the step's own temporary
        memory would, and move, and every CUDA graph with it (see slora_jax/staging.py).
        """
        if loads:
            self._written.clear()
        for load in loads:
            self._sent[load.adapter.digest, load.start] = self._send(self._image(load), load.start, load.stop)

    def write(self, loads: Sequence[Load]) -> None:
        """Writes what a plan says to its pages, sent or not, without waiting for the device."""
        sent, self._sent = self._sent, {}  # what is not to be written any more is dropped
        for load in loads:
            chunks = sent.pop((load.adapter.digest, load.start), None)
            if chunks is None:
                chunks = list(self._image(load).between(load.start, load.stop))
            else:
                self._written.append(chunks)
            self._write(chunks, self._scheduler.pool.pages(adapter_owner(load.adapter.digest)))
            self.page_loads += load.last
            if load.last and load.adapter.source not in self._pinned:
                self._pages.prefetches.pop(load.adapter.digest, None)

    def _image(self, load: Load) -> HostImage:
        image = self.loader.image(load.adapter.source)
        assert image is not None, "an image that is being copied was evicted"
        return image

    def prefetch(self, record: AdapterRecord) -> "Future[None]":
        """Has an adapter read, and written to pages when some are free. The future ends when it is in host memory."""
        future: Future[None] = Future()
        self._prefetched.setdefault(record, []).append(future)
        if self.loader.is_ready(record):
            self._settle(record)
        self.look_ahead()
        return future

    def pin(self, record: AdapterRecord, pinned: bool) -> None:
        """Keeps an adapter in host memory, and in pages as long as any idle one can go instead."""
        record.pinned = pinned
        if pinned:
            self._pinned[record] = None
        else:
            self._pinned.pop(record, None)
        if record.digest is not None:
            self._pin_pages(record.digest)

    def close(self) -> None:
        """Ends the loader's threads, and tells those who wait for a prefetch. When the engine's thread has ended."""
        self.loader.close()
        for record in list(self._prefetched):
            self._settle(record, SloraError("the engine is closed"))

    def in_use(self, record: AdapterRecord) -> bool:
        """Whether a job in flight began with it."""
        return record in self._jobs

    def snapshot(self) -> tuple[set[str], set[str]]:
        """Digests of the adapters that lie in pages, and digests of the weights that lie in host memory."""
        return self._pages.all_resident(), self.loader.tier.keys()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Hits, loads and evictions of each tier since the start, and what is there now."""
        tier, counters, pages = self.loader.tier, self.loader.counters, self._pages
        return dict(
            pages=dict(
                hits=pages.hits,
                misses=pages.misses,
                loads=self.page_loads,
                evictions=pages.evictions,
                adapters=len(pages.all_resident()),
            ),
            host=dict(
                loads=counters["images"],
                evictions=tier.evictions,
                adapters=len(tier),
                bytes=tier.used,
                budget=tier.budget,
            ),
            disk=dict(reads=counters["reads"], failures=counters["failures"], load_seconds=counters["seconds"]),
        )

    def _name(self, job: Job, digest: str) -> None:
        """Tells a job and its sequences what contents they use."""
        assert job.adapter is not None
        job.output.adapter_digest = digest
        self._users[digest] += 1
        self.shapes[digest] = job.adapter.shape
        for generation in job.generations:
            if generation.seq.group != digest:
                generation.seq.name_adapter(digest)

    def _read(self, outcome: Outcome) -> None:
        record = outcome.record
        record.error = None
        if record.digest is None:
            self._registry.read(record, outcome.digest, outcome.weights_digest)
            for job in self._jobs.get(record, ()):
                self._name(job, outcome.digest)
            if record.pinned:
                self._pin_pages(outcome.digest)
        self._settle(record)
        self.release(record)  # nobody may want it any more

    def _failed(self, record: AdapterRecord, error: str) -> None:
        """A job goes on where the weights are in pages."""
        record.error = error
        resident = record.digest is not None and self._pages.resident(record.digest)
        if not resident:
            for job in list(self._jobs.get(record, ())):
                self._end(job, f"adapter {job.request.adapter!r}: {error}")
        self._pinned.pop(record, None)
        record.pinned = False
        self._pages.prefetches.pop(record.identity, None)
        self._settle(record, AdapterError(error))

    def _pin_pages(self, digest: str) -> None:
        records = [record for record in self._pinned if record.digest == digest]
        self._pages.pin(digest, bool(records))
        if records:
            self._pages.prefetches[digest] = self.use(records[0])
        else:
            self._pages.prefetches.pop(digest, None)

    def _settle(self, record: AdapterRecord, error: Exception | None = None) -> None:
        """Answers those who wait for a prefetch."""
        futures = self._prefetched.pop(record, [])
        if futures and error is None and record.digest is not None:
            if not self._pages.resident(record.digest):
                self._pages.prefetches[record.digest] = self.use(record)
        for future in futures:
            if not future.set_running_or_notify_cancel():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
