"""An engine with random weights and as many adapters as a workload needs, and measurements on it."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from benchmarks.ceilings import measure_ceilings
from benchmarks.serving.probe import adapter_bytes, engine_scheduler, forget_everything
from benchmarks.serving.replay import Run, replay
from slora_jax import Adapter, Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapters import clone, random_adapter
from slora_jax.cli.workload import check_limits
from slora_jax.loading import LoadedModel, load_model
from slora_jax.model_config import ModelConfig
from slora_jax.progress import progress_bar
from slora_jax.shapes import named_shape
from slora_jax.traces import Setting, TraceRequest, prompt_tokens
from slora_jax.twin import Ceilings, Simulation, ideal_cost, simulate, summarise
from slora_jax.twin.cost import ITEM_BYTES

SHARED = (
    "Adapters of one rank share one buffer of weights in host memory. To the engine each is an adapter of its own, "
    "with its own digest, pages and transfers."
)


def adapter_name(index: int) -> str:
    return f"adapter-{index}"


@functools.lru_cache(maxsize=8)
def _weights(config: ModelConfig, rank: int, targets: tuple[str, ...], dtype: np.dtype) -> Adapter:
    return random_adapter(config, rank, targets, seed=rank, dtype=dtype)


def make_adapters(model: LoadedModel, setting: Setting, count: int) -> dict[str, Adapter]:
    """Adapter i of `count` has rank ``ranks[i % len(ranks)]``; those of one rank share their weights' memory."""
    dtype = model.params["embed"].dtype
    first = {rank: _weights(model.config, rank, setting.targets, dtype) for rank in set(setting.ranks[:count])}
    return {adapter_name(i): clone(first[setting.ranks[i % len(setting.ranks)]], i) for i in range(count)}


EngineMaker = Callable[[LoadedModel, EngineConfig, Mapping[str, Adapter], contextlib.ExitStack], Engine]


def random_model(args: argparse.Namespace, setting: Setting) -> LoadedModel:
    named_shape(setting.shape)  # an unknown name is told before anything is made
    dtype = EngineConfig(dtype=args.dtype).resolved().dtype
    with progress_bar("making the model", not args.quiet) as report:
        return load_model(f"random:{setting.shape}", dtype=dtype, progress=report)


class Session:
    """An engine that is compiled and ready.

    adapters: how many. longest: tokens of the longest prompt with its answer. base: whether requests without an adapter
    come too. make: builds the engine, for systems that differ from it; what it changes for the session's time it undoes
    by the ExitStack. prepare: changes model and adapters before that. model: None makes one.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        setting: Setting,
        *,
        adapters: int,
        longest: int,
        base: bool = False,
        make: EngineMaker = lambda model, config, adapters, stack: Engine(model, config, adapters),
        prepare: Callable[[LoadedModel, dict[str, Adapter]], tuple[LoadedModel, dict[str, Adapter]]] | None = None,
        model: LoadedModel | None = None,
    ):
        self.args = args
        self.setting = setting
        show = not args.quiet
        config = EngineConfig(
            dtype=args.dtype,
            max_model_len=args.max_model_len or longest,
            max_seqs=args.max_seqs,
            max_step_tokens=args.max_step_tokens,
            page_pool_bytes=args.page_pool,
            policy=args.policy,
            policy_options=dict(args.policy_option),
            prefix_caching=not args.no_prefix_caching,
            prompt_gap=args.prompt_gap,
            implementation=args.implementation,
            progress=show,
        ).resolved()
        check_limits(config.max_seqs, config.max_step_tokens)
        if model is None:
            model = random_model(args, setting)
        self.ceilings = measure_ceilings(config.dtype)  # before the pool takes the memory
        self.adapters = make_adapters(model, setting, adapters)
        if prepare is not None:
            model, self.adapters = prepare(model, self.adapters)
        self.model = model
        self.settings = config
        self._stack = contextlib.ExitStack()
        try:
            self.engine = make(model, config, self.adapters, self._stack)
            self._stack.callback(self.engine.close)
            self.bytes = adapter_bytes(self.adapters.values(), self.engine)
            self._warm_up(base or not self.adapters)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def _warm_up(self, base: bool) -> None:
        """Compiles everything that a measurement may run: all steps, and what a few real requests need besides."""
        users: list[str | None] = [None] if base else []
        users += list(self.adapters)[: len(self.setting.ranks)]  # so that weights of each rank are in host memory
        self.engine.warm_up(adapters=bool(self.adapters), base=base, greedy_only=True)
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        for user in users:  # one after another, so that steps with and without adapters both come
            self.engine.generate([Request(prompt_token_ids=[3, 4, 5], adapter=user, sampling=sampling)])

    def measure(
        self,
        trace: Sequence[TraceRequest],
        what: Mapping[str, Any],
        *,
        during: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        until: float | None = None,
        floor: bool = True,
    ) -> tuple[dict[str, Any], Run]:
        """Measures a trace from a cold pool. Returns the point for the result's JSON, and everything else of the run.

        what: names the point. until, during: see replay. floor: also simulate the trace on the ideal device.
        """
        forget_everything(self.engine, self.adapters.values())
        prompts = prompt_tokens(trace, self.model.config.vocab_size, self.args.seed)
        title = ", ".join(f"{name} {value}" for name, value in what.items()) or "measuring"
        run = replay(
            self.engine,
            trace,
            prompts,
            name=adapter_name,
            adapter_bytes=self.bytes,
            title=title,
            progress=not self.args.quiet,
            until=until,
            during=during,
        )
        figures = summarise(run.records, self.args.slo)
        uses = sum(r.adapter is not None for r in trace)
        point = dict(
            what,
            figures=figures,
            counters=run.counters | dict(adapter_hit_rate=1 - run.counters["loads"] / uses if uses else 0.0),
            most_running=max(run.running, default=0),
            step_times=run.steps.figures(),
            compiles=run.compiles,
        )
        if floor:
            ideal = self.floor(trace)
            point |= dict(floor=ideal, of_floor=figures["requests_per_second"] / ideal["requests_per_second"])
        point |= dict(pages=run.pages, page_map=[f"{t:.1f} {row}" for t, row in run.page_map])
        point |= dict(requests=_request_rows(run), steps=run.steps.to_json())
        return point, run

    def floor(self, trace: Sequence[TraceRequest]) -> dict[str, Any]:
        """Figures of the trace on the ideal device, under the same limits and policy."""
        return floor_figures(self.args, self.setting, trace, self.ceilings, **self.limits())

    def limits(self) -> dict[str, Any]:
        """The engine's, as the twin names them."""
        stats = self.engine.stats()
        return dict(
            max_seqs=self.settings.max_seqs,
            max_step_tokens=self.settings.max_step_tokens,
            page_pool_bytes=stats["num_pages"] * stats["page_bytes"],
            item_bytes=jnp.dtype(self.settings.dtype).itemsize,
        )

    def describe(self) -> dict[str, Any]:
        """What the points have in common, for the result's JSON."""
        buckets = self.engine._core.runner.builder.buckets
        return dict(
            setting=dataclasses.asdict(self.setting),
            weights="random",
            adapters=SHARED if len(self.adapters) > len(set(self.setting.ranks)) else "",
            engine=dict(
                **self.limits(),
                dtype=self.settings.dtype,
                seq_buckets=buckets.seqs,
                token_buckets=buckets.tokens,
                policy=self.settings.policy,
                policy_options=dict(self.settings.policy_options),
                prompt_gap=self.settings.prompt_gap,
                adapter_chunk_bytes=self.settings.adapter_chunk_bytes,
                adapter_step_bytes=self.settings.adapter_step_bytes,
                prefix_caching=engine_scheduler(self.engine).prefixes is not None,
                backend=jax.default_backend(),
            ),
        )


def floor_figures(
    args: argparse.Namespace,
    setting: Setting,
    trace: Sequence[TraceRequest],
    ceilings: Ceilings | None = None,
    **limits: Any,
) -> dict[str, Any]:
    """The trace on the ideal device: throughput and latencies. ceilings: None takes an H200's, in bfloat16."""
    config = named_shape(setting.shape)
    simulation = Simulation(
        config=config,
        setting=setting,
        cost=ideal_cost(config, ceilings, limits.get("item_bytes", ITEM_BYTES)),
        policy=args.policy,
        policy_options=dict(args.policy_option),
        prefix_caching=not args.no_prefix_caching,
        prompt_gap=args.prompt_gap,
        **limits,
    )
    result = simulate(simulation, trace)
    figures = summarise(result.records, args.slo)
    kept = ("requests_per_second", "steady_requests_per_second", "output_tokens_per_second", "ttft", "tpot", "latency")
    device = "this device" if ceilings else "one H200"
    top = dataclasses.asdict(ceilings or Ceilings())
    return dict(device=f"bytes and operations at the ceilings of {device}", ceilings=top) | {
        name: figures[name] for name in kept
    }


def _request_rows(run: Run) -> dict[str, Any]:
    """One string of numbers a request: enough to draw any distribution again."""
    rows = []
    for r in run.records:
        times = (r.request.arrival, r.scheduled, r.first_token, r.finished)
        numbers = (r.request.adapter, r.request.prompt_len, r.request.output_len, r.preemptions)
        cells = [*("-" if t is None else f"{t:.4f}" for t in times), *("-" if n is None else str(n) for n in numbers)]
        rows.append(" ".join(cells))
    columns = "arrival scheduled first_token finished adapter prompt_len output_len preemptions".split()
    return dict(columns=columns, rows=rows)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90 and p99."""
    if not values:
        return None
    return dict(zip(("p50", "p90", "p99"), np.percentile(values, (50, 90, 99)).tolist(), strict=True))
