"""Runs a trace through the engine's scheduler and page pool on a clock that a cost model drives."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from pallas_kernels.geometry import MODULES, PAGE_TOKENS, TILE, TILE_RANKS, ceil_div
from slora_jax.buckets import Buckets
from slora_jax.errors import CapacityError
from slora_jax.model_config import ModelConfig
from slora_jax.page_loads import PageLoads
from slora_jax.page_pool import PagePool
from slora_jax.page_uses import used_pages
from slora_jax.policies import Quotas, make_policy
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import AdapterUse
from slora_jax.sequence import Sequence as Seq
from slora_jax.step_plan import StepPlan
from slora_jax.traces import Setting, TraceRequest
from slora_jax.twin.cost import ITEM_BYTES, CostModel, StepWork, step_work
from slora_jax.twin.metrics import Record
from slora_jax.twin.steps import StepLog

_PREFIX = (1 << 31) - 1  # the token of prefixes; the others are the numbers of requests
_IDLE_SECONDS = 0.002  # between two looks at a queue from which nothing may start yet, as in the engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """What is simulated. Defaults are an engine's on a GPU (see EngineConfig), but for `overlap`.

    config: sizes of the base model. setting: ranks and targets of the adapters. cost: how long a step takes.
    page_pool_bytes: of pages whose elements take `item_bytes`. buckets: to which steps are padded; None: not at all.
    prompt_gap, adapter_chunk_bytes, adapter_step_bytes: see EngineConfig; by None adapters come to their pages as a
    whole, any number before a step.
    overlap: each step is planned while the one before it runs, as an engine plans them, so that who comes meanwhile
    waits for two steps; otherwise when the device is free, which no engine is fast enough for.
    log_steps: keep what each step had to do and how long it took. sample_seconds: between two looks at what the pages
    hold.
    """

    config: ModelConfig
    setting: Setting
    cost: CostModel
    page_pool_bytes: int = 100 << 30
    max_seqs: int = 256
    max_step_tokens: int = 2048
    policy: str = "fcfs"
    policy_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quotas: Quotas | None = None
    prefix_caching: bool = True
    prompt_gap: int = 0
    adapter_chunk_bytes: int | None = None
    adapter_step_bytes: int | None = None
    buckets: Buckets | None = None
    overlap: bool = False
    item_bytes: int = ITEM_BYTES
    log_steps: bool = False
    sample_seconds: float = 1.0

    @property
    def page_bytes(self) -> int:
        return self.config.num_layers * self.config.geometry.page_elements * self.item_bytes

    def loads(self) -> PageLoads:
        """How adapters come to their pages."""
        chunk, step = (
            None if size is None else max(1, size // self.page_bytes)
            for size in (self.adapter_chunk_bytes, self.adapter_step_bytes)
        )
        return PageLoads(None if chunk is None else 1 << chunk.bit_length() - 1, step)

    def adapter(self, index: int) -> AdapterUse:
        """What the scheduler knows of adapter `index`."""
        pages = ceil_div(self._tiles(index), self.config.geometry.tiles_per_page_id)
        return AdapterUse(f"adapter-{index}", pages, self.cost.load_byte * pages * self.page_bytes)

    def adapter_bytes(self, index: int) -> int:
        """Bytes of the adapter's tiles, which a step reads."""
        return self._tiles(index) * TILE * self.item_bytes

    def _tiles(self, index: int) -> int:
        geometry, ranks = self.config.geometry, self.setting.ranks
        modules = [MODULES.index(target) for target in self.setting.targets]
        per_granule = sum(geometry.in_tiles(m) + geometry.out_tiles(m) for m in modules)
        return ceil_div(ranks[index % len(ranks)], TILE_RANKS) * per_granule * geometry.num_layers


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """records: one for each request of the trace, in its order. counters: steps, loads and so on. pages: what the
    pages held, one row a sample: seconds and used_pages(). steps: if they were asked for.
    """

    records: list[Record]
    counters: dict[str, float]
    pages: list[dict[str, float]]
    steps: StepLog


def simulate(
    simulation: Simulation,
    trace: Sequence[TraceRequest],
    *,
    make_pool: Callable[[int], PagePool] = PagePool,
    prepare: Callable[[Scheduler], None] | None = None,
) -> SimulationResult:
    """Runs a trace, whose arrivals must not go back in time, to its end. The texts of different requests differ from
    their first token on, or after their prefix.

    make_pool, prepare: for memories of other kinds: the pool of a number of pages, and what is done to the scheduler
    before the first request. Raises CapacityError if a request cannot fit in the pool.
    """
    run = _Run(simulation, trace, make_pool)
    if prepare is not None:
        prepare(run.scheduler)
    return run.run()


class _Started(NamedTuple):
    """A step, what it has to do, how long the device takes for it, and when it ends."""

    plan: StepPlan
    work: StepWork
    seconds: float
    end: float


class _Run:
    def __init__(self, simulation: Simulation, trace: Sequence[TraceRequest], make_pool: Callable[[int], PagePool]):
        self.sim, cost = simulation, simulation.cost
        self.now = 0.0
        pages = simulation.page_pool_bytes // simulation.page_bytes
        if not pages:
            raise CapacityError(f"page_pool_bytes {simulation.page_pool_bytes} is less than one page of this model")
        self.scheduler = Scheduler(
            make_pool(pages),
            max_seqs=simulation.max_seqs,
            max_step_tokens=simulation.max_step_tokens,
            policy=make_policy(simulation.policy, simulation.policy_options),
            quotas=simulation.quotas,
            prefix_page_cost=(cost.token + cost.prompt_token) * PAGE_TOKENS if simulation.prefix_caching else None,
            prompt_gap=simulation.prompt_gap,
            loads=simulation.loads(),
            clock=lambda: self.now,
        )
        self.records = [Record(request) for request in trace]
        self.arrivals = deque(range(len(trace)))
        self.adapters: dict[int, AdapterUse] = {}
        self.bytes: dict[str, int] = {}  # of weights, by digest
        self.counters: dict[str, float] = dict(steps=0, busy_seconds=0.0, prompt_tokens=0, decode_tokens=0, loads=0)
        self.pages: list[dict[str, float]] = []
        self.steps = StepLog()
        self.next_sample = 0.0
        self.free = 0.0  # when the device has done what it was given

    def run(self) -> SimulationResult:
        scheduler, pending = self.scheduler, None
        while self.arrivals or pending or scheduler.has_work():
            if not (pending or scheduler.has_work()):
                self.now = max(self.now, self.records[self.arrivals[0]].request.arrival)
            while self.arrivals and self.records[self.arrivals[0]].request.arrival <= self.now:
                self._add(self.arrivals.popleft())
            plan = scheduler.schedule()
            for drop in plan.dropped:
                self.records[self._index(drop.seq)].aborted = True
            started = self._start(plan) if plan.chunks else None
            done, pending = (pending, started) if self.sim.overlap else (started, None)
            if done:
                self._take(done)
            elif not started and scheduler.has_work():
                self.now += _IDLE_SECONDS
        if scheduler.prefixes is not None:
            self.counters["prefix_hit_tokens"] = scheduler.prefixes.hit_tokens
        return SimulationResult(self.records, self.counters, self.pages, self.steps)

    @staticmethod
    def _index(seq: Seq) -> int:
        assert isinstance(seq.seq_id, int)
        return seq.seq_id

    def _add(self, index: int) -> None:
        request = self.records[index].request
        if request.adapter is not None and request.adapter not in self.adapters:
            use = self.adapters[request.adapter] = self.sim.adapter(request.adapter)
            self.bytes[use.digest] = self.sim.adapter_bytes(request.adapter)
        seq = Seq(
            seq_id=index,
            tokens=[_PREFIX] * request.prefix_len + [index] * (request.prompt_len - request.prefix_len),
            prompt_len=request.prompt_len,
            max_tokens=request.output_len,
            adapter=None if request.adapter is None else self.adapters[request.adapter],
            adapter_name=None if request.adapter is None else str(request.adapter),
            tenant=request.tenant,
            priority=request.priority,
            arrival=request.arrival,
        )
        try:
            self.scheduler.add(seq)
        except ValueError as error:
            raise CapacityError(f"request {index} of the trace can never run: {error}") from None

    def _start(self, plan: StepPlan) -> _Started:
        loads = sum(use.num_pages for use in plan.loads) * self.sim.page_bytes
        work = step_work(plan.chunks, lambda digest: self.bytes[digest], loads, self.sim.buckets)
        for chunk in plan.chunks:
            record = self.records[self._index(chunk.seq)]
            record.scheduled = self.now if record.scheduled is None else record.scheduled
        seconds = self.sim.cost.seconds(work)
        self.free = max(self.free, self.now) + seconds
        return _Started(plan, work, seconds, self.free)

    def _take(self, step: _Started) -> None:
        """Takes a step's results when it ends."""
        plan, work, seconds, self.now = step
        if self.sim.log_steps:
            self.steps.add(self.now, seconds, work)
        if self.now >= self.next_sample:
            self.pages.append(dict(seconds=self.now, **used_pages(self.scheduler.pool)))
            self.next_sample = self.now + self.sim.sample_seconds
        sampled = [chunk.seq for chunk in plan.chunks if chunk.samples]
        self.scheduler.complete(plan, seconds)
        for seq in sampled:
            self._push(seq)
        self.counters["steps"] += 1
        self.counters["busy_seconds"] += seconds
        self.counters["prompt_tokens"] += work.prompt_tokens
        self.counters["decode_tokens"] += work.decode_tokens
        self.counters["loads"] += sum(load.last for load in plan.loads)

    def _push(self, seq: Seq) -> None:
        """A token was sampled for the sequence."""
        record = self.records[self._index(seq)]
        seq.push(self._index(seq))
        if record.first_token is None:
            record.first_token = self.now
        if seq.output_len == seq.max_tokens:
            record.finished = self.now
            record.preemptions = seq.preemptions
            self.scheduler.remove(seq)
