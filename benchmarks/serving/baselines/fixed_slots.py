"""The engine with unified paging off: a fixed number of slots (--slots) for adapters in memory of their own, every
adapter padded with zeros to the largest rank, as vLLM and SGLang have it. Kernels, scheduler and all else are the
engine's, and they read and compute the padding too. To start a request whose adapter is not in a slot, the engine also
wants one slot's worth of KV pages to be free, which costs this system a little of its memory.
"""

import argparse
from collections.abc import Mapping
import contextlib
from unittest import mock

from benchmarks.serving.baselines.split_pool import pool_of_slots, seat_by_slot
from benchmarks.serving.session import Session, adapter_name, make_adapters
from benchmarks.serving.workloads import OpenSession
from slora_jax import Adapter, Engine, EngineConfig
from slora_jax import engine as engine_module
from slora_jax.loading import LoadedModel
from slora_jax.runner import Runner
from slora_jax.traces import Setting


def split_engine(
    model: LoadedModel,
    config: EngineConfig,
    adapters: Mapping[str, Adapter],
    *,
    slots: int,
    slot_pages: int,
    runner: Runner | None = None,
) -> Engine:
    """An engine over a SplitPool. runner: see Engine."""

    with mock.patch.object(engine_module, "PagePool", pool_of_slots(slots, slot_pages)):
        engine = Engine(model, config, adapters, runner=runner)
    seat_by_slot(engine._core.scheduler)
    return engine


def open_session(args: argparse.Namespace, setting: Setting) -> OpenSession:
    rank = max(setting.ranks)
    padded = Setting(setting.shape, (rank,), setting.targets)

    def make(model: LoadedModel, config: EngineConfig, adapters: Mapping[str, Adapter], stack: contextlib.ExitStack):
        pages = max((a.num_pages(model.config.geometry) for a in adapters.values()), default=2)
        # a slot of one page would be taken for one that holds nothing
        return split_engine(model, config, adapters, slots=args.slots, slot_pages=max(pages, 2))

    def prepare(model: LoadedModel, adapters: dict[str, Adapter]) -> tuple[LoadedModel, dict[str, Adapter]]:
        # zeros cost what other numbers cost, so adapters of the largest rank stand for padded ones
        made = make_adapters(model, padded, len(adapters))
        return model, {adapter_name(i): made[adapter_name(i)] for i in range(len(adapters))}

    def open(*, adapters: int, longest: int, base: bool = False) -> Session:
        return Session(args, setting, adapters=adapters, longest=longest, base=base, make=make, prepare=prepare)

    return open
