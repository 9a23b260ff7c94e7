"""The server's state: the engine once it is there, its adapters, its callers, and whether new calls are taken."""

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import logging
import time
from typing import Literal

from slora_jax.engine import Engine
from slora_jax.requests import EmbeddingOutput, RequestOutput
from slora_jax.server.adapter_manager import AdapterManager
from slora_jax.server.config import ServerConfig
from slora_jax.server.errors import ApiError
from slora_jax.server.metrics import Metrics, Snapshot
from slora_jax.server.rates import TokenBucket
from slora_jax.server.tenants import Tenant, Tenants
from slora_jax.server.tracing import Tracing

logger = logging.getLogger(__name__)

_SNAPSHOT_SECONDS = 0.5  # how long a scrape waits for an engine that is in the middle of a step
_SHOWN_ADAPTERS = 500  # on the status page; GET /v1/adapters has all
_SCAN_SHARE = 0.05  # of a thread's time at most; two system calls an adapter


class Service:
    """One engine and what a server needs to know beside it. Belongs to one event loop.

    make_engine: makes the engine; it runs on a thread of its own while the server already says that it is loading.
    """

    def __init__(self, config: ServerConfig, make_engine: Callable[[], Engine]):
        self.config = config
        self.phase: Literal["loading", "ready", "draining"] = "loading"
        self.tenants = Tenants(config)
        self.metrics = Metrics(config.model_name)
        self.tracing = Tracing() if config.traces else None
        self.started = int(time.time())
        self.in_flight = 0  # completions
        self.loads = TokenBucket(config.max_loads_per_minute)
        self._make_engine = make_engine
        self._engine: Engine | None = None
        self._adapters: AdapterManager | None = None
        self._snapshot: Snapshot | None = None
        self._refresh: asyncio.Task[None] | None = None
        self._mean_latency = 1.0
        self._watcher: asyncio.Task[None] | None = None

    @property
    def engine(self) -> Engine:
        """ApiError 503 while it is loading."""
        if self._engine is None:
            raise ApiError(503, "the model is being loaded; try again soon", code="loading", retry_after=5)
        return self._engine

    @property
    def adapters(self) -> AdapterManager:
        """ApiError 503 while the engine is loading."""
        if self._adapters is None:
            raise ApiError(503, "the model is being loaded; try again soon", code="loading", retry_after=5)
        return self._adapters

    async def load(self) -> None:
        """Makes the engine, loads its adapters, and begins to watch for changes. Errors are those of both."""
        start = time.monotonic()
        engine = await asyncio.to_thread(self._make_engine)
        manager = AdapterManager(self.config, engine)
        try:
            await asyncio.to_thread(manager.restore)
            if self.config.warm_up:
                # in one call, because each call runs all steps that are compiled
                adapters = bool(self.config.adapters or self.config.load_root)
                greedy = self.config.warm_up == "greedy"
                await asyncio.to_thread(engine.warm_up, adapters=adapters, greedy_only=greedy)
        except BaseException:
            engine.close()
            raise
        self._engine, self._adapters = engine, manager
        self.phase = "ready" if self.phase == "loading" else self.phase
        self._watcher = asyncio.create_task(self._watch())
        logger.info(
            "ready", extra={"fields": {"seconds": round(time.monotonic() - start, 3), "adapters": manager.num_served}}
        )

    async def drain(self) -> None:
        """Takes no new calls and waits until those in flight are answered, drain_seconds at most."""
        self.phase = "draining"
        logger.info("draining", extra={"fields": {"in_flight": self.in_flight}})
        deadline = time.monotonic() + self.config.drain_seconds
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Ends whatever is still in flight, and the engine."""
        self.phase = "draining"
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    def check_accepting(self) -> None:
        """ApiError 503 unless new work is taken."""
        self.engine  # noqa: B018 - it raises while loading
        if self.phase == "draining":
            raise ApiError(503, "the server is shutting down; ask another", code="draining", retry_after=5)

    @contextlib.contextmanager
    def admit(self, tenant: Tenant, completions: int) -> Iterator[None]:
        """Holds a place for a call of so many completions. ApiError 429 or 503 if there is none."""
        self.check_accepting()
        limit = self.engine.settings.max_seqs + self.config.max_queue
        # a call that is larger than the queue is taken when nothing else is there
        if self.in_flight and self.in_flight + completions > limit:
            seconds = min(60.0, max(1.0, self._mean_latency))
            raise ApiError(429, "the queue is full; try again soon", code="queue_full", retry_after=seconds)
        with tenant.admit(completions):
            self.in_flight += completions
            try:
                yield
            finally:
                self.in_flight -= completions

    def finished(self, output: RequestOutput, tenant: Tenant) -> None:
        """Accounts for a request that has ended."""
        tokens = len(output.prompt_token_ids) + sum(len(c.token_ids) for c in output.completions)
        tenant.tokens.take(tokens)
        self.metrics.finished(output, tenant.key.name)
        if output.timings.latency is not None:
            self._mean_latency += 0.1 * (output.timings.latency - self._mean_latency)

    def embedded(self, output: EmbeddingOutput, tenant: Tenant) -> None:
        """finished, for an embedding."""
        tenant.tokens.take(len(output.prompt_token_ids))
        self.metrics.embedded(output, tenant.key.name)

    async def snapshot(self) -> Snapshot | None:
        """The engine's state now, or a moment ago if it is busy with a long step. None while it is loading."""
        if self._engine is None:
            return None
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(self._take_snapshot(self._engine, self.adapters))
        timeout = _SNAPSHOT_SECONDS if self._snapshot is not None else None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._refresh), timeout)
        return self._snapshot

    async def _take_snapshot(self, engine: Engine, adapters: AdapterManager) -> None:
        def take() -> Snapshot:
            return Snapshot(
                stats=engine.stats(),
                requests=engine.list_requests(),
                adapters=adapters.describe(limit=_SHOWN_ADAPTERS),
                num_adapters=adapters.num_served,
                pages=engine.page_map(),
                max_seqs=engine.settings.max_seqs,
                load_seconds=adapters.load_seconds,
                loads=adapters.loads,
                failures=adapters.failures,
            )

        self._snapshot = await asyncio.to_thread(take)

    async def _watch(self) -> None:
        took = 0.0
        while True:
            await asyncio.sleep(max(self.config.scan_seconds, took / _SCAN_SHARE))
            start = time.monotonic()
            try:
                await asyncio.to_thread(self.adapters.scan)
                took = time.monotonic() - start
                await asyncio.to_thread(self.tenants.reload)
            except Exception:  # watching goes on, whatever a disk or an adapter does
                logger.exception("the scan of the adapters' directory failed")
