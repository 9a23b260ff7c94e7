"""Looks into a running engine: its steps, its pages, and whether anything is compiled.

The only file of the benchmark that touches what is private to the engine.
"""

from collections.abc import Iterable, Mapping
import threading
import time

import jax
from jaxtyping import Float
import numpy as np

from pallas_kernels.geometry import TILE
from slora_jax import Adapter, Engine
from slora_jax.runner import Runner
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import Sequence
from slora_jax.step_plan import StepPlan
from slora_jax.twin import StepLog, step_work

_COMPILED = "/jax/core/compile/backend_compile_duration"  # also where the program came from the persistent cache
_FIRST_SAMPLES = 0.02  # seconds between them
_MAP_ROWS = 256  # groups of pages in a page map


def engine_scheduler(engine: Engine) -> Scheduler:
    return engine._core.scheduler


def adapter_bytes(adapters: Iterable[Adapter], engine: Engine) -> dict[str, int]:
    """Bytes of each adapter's tiles in the pool, by digest."""
    geometry, item = engine.model.config.geometry, engine._core.runner.dtype.itemsize
    return {a.digest: a.num_tiles(geometry) * TILE * item for a in adapters}


def forget_everything(engine: Engine, adapters: Iterable[Adapter]) -> None:
    """Frees the pages that idle adapters and prefixes hold, so that the next measurement starts cold."""

    def forget() -> None:
        for adapter in adapters:
            engine._core.scheduler.forget_adapter(adapter.digest)
        prefixes = engine._core.scheduler.prefixes
        if prefixes is not None:
            prefixes.forget(None)

    engine._loop.call(forget)


def abort_everything(engine: Engine) -> None:
    """Ends all requests at once."""

    def abort() -> None:
        for job in engine._core.jobs():
            engine._core.end(job, "abort")

    engine._loop.call(abort)


def engine_runner(engine: Engine) -> Runner:
    return engine._core.runner


class Compiles:
    """Counts programs that are compiled, or read from the persistent cache, while it is open."""

    def __init__(self):
        self.count = 0
        self.seconds = 0.0

    def _listen(self, event: str, duration_secs: float, **_) -> None:
        if event == _COMPILED:
            self.count += 1
            self.seconds += duration_secs

    def __enter__(self) -> "Compiles":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exc) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


class Probe:
    """Logs an engine's steps, and what its pages hold every `sample_seconds` or more often, while it is open.

    start: zero of the clock, of time.monotonic. adapter_bytes: of weights, by digest.
    """

    def __init__(self, engine: Engine, adapter_bytes: Mapping[str, int], start: float, sample_seconds: float):
        self.steps = StepLog()
        self.pages: list[dict[str, float]] = []
        self.page_map: list[tuple[float, str]] = []
        self.running: list[int] = []
        self.loaded_for: set[str] = set()  # ids of requests that started in the step that loaded their adapter
        self._engine = engine
        self._bytes = adapter_bytes
        self._start = start
        self._sample_seconds = sample_seconds
        self._planned: dict[int, float] = {}
        self._last = 0.0
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="page sampler", daemon=True)

    def __enter__(self) -> "Probe":
        self._engine._loop.call(self._attach)
        self._sampler.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        self._sampler.join()
        self._engine._loop.call(self._detach)

    def _attach(self) -> None:
        """Puts itself between the engine and its scheduler, whose two calls are the borders of a step."""
        scheduler = self._engine._core.scheduler
        schedule, complete = scheduler.schedule, scheduler.complete
        runner = self._engine._core.runner
        buckets, page_bytes = runner.builder.buckets, runner.page_bytes

        def watched_schedule(*args, **kwargs) -> StepPlan:
            now = time.monotonic()
            plan = schedule(*args, **kwargs)
            if plan.chunks:
                self._planned[id(plan)] = now
            return plan

        def watched_complete(plan: StepPlan, *args, **kwargs) -> None:
            now = time.monotonic()
            began = max(self._planned.pop(id(plan), now), self._last)
            load = sum(load.num_pages for load in plan.loads) * page_bytes
            loaded = {load.adapter.digest for load in plan.loads}
            self.loaded_for |= {
                _request_id(c.seq) for c in plan.chunks if c.seq.adapter and c.seq.adapter.digest in loaded
            }
            work = step_work(plan.chunks, self._bytes.__getitem__, load, buckets)
            self.steps.add(now - self._start, now - began, work)
            self._last = now
            return complete(plan, *args, **kwargs)

        scheduler.schedule, scheduler.complete = watched_schedule, watched_complete  # type: ignore[method-assign]

    def _detach(self) -> None:
        scheduler = self._engine._core.scheduler
        del scheduler.schedule, scheduler.complete

    def _sample(self) -> None:
        pause = max(0.0, self._start - time.monotonic())
        while not self._stop.wait(pause):
            # densely at first, so that a short run shows something too
            pause = min(self._sample_seconds, max(_FIRST_SAMPLES, pause * 1.2))
            stats = self._engine.stats()
            now = time.monotonic() - self._start
            self.pages.append(dict(seconds=now, **stats["pages"]))
            self.running.append(stats["running"])
            self.page_map.append((now, draw(self._engine.page_map())))


def _request_id(seq: Sequence) -> str:
    assert isinstance(seq.seq_id, tuple)  # made by Admission: (request id, completion, number)
    return seq.seq_id[0]


def draw(pages: list[str | None]) -> str:
    """A page map in few characters: of each group of neighbours what most of them hold, "k" keys and values, "a"
    adapters, "." nothing.
    """
    codes = np.array([0 if p is None else 1 if p == "kv" else 2 for p in pages])
    groups: list[Float[np.ndarray, n]] = np.array_split(codes, min(_MAP_ROWS, len(codes)))
    return "".join(".ka"[np.bincount(group, minlength=3).argmax()] for group in groups)
