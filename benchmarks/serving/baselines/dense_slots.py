"""Adapters as dense arrays, one for each projection: [layers, slots, inputs, rank] and [layers, slots, rank, outputs],
padded to the largest rank. The form that ragged_dot and one-hot LoRA need.

Each loaded adapter is also copied to the page pool, where nothing reads it: with more adapters than slots this system's
loads take twice the transfers they need, so compare it with --adapters of at most --slots.
"""

import argparse
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
from typing import Any
from unittest import mock

import jax
from jax import numpy as jnp
import numpy as np

from benchmarks.serving.baselines.fixed_slots import split_engine
from benchmarks.serving.session import Session
from benchmarks.serving.workloads import OpenSession
from pallas_kernels.geometry import GROUPS, MODULES
from slora_jax import Adapter, Engine, EngineConfig, step
from slora_jax.adapter_pages import adapter_owner
from slora_jax.loading import LoadedModel
from slora_jax.model import Llama
from slora_jax.model_config import ModelConfig
from slora_jax.traces import Setting

Delta = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""``delta(x [T, in], a [slots, in, R], b [slots, R, out], slot int32 [T]) -> [T, out]``; slot -1: no adapter."""


def empty(config: ModelConfig, setting: Setting, slots: int, dtype: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """A and B of every targeted module."""
    rank, layers = max(setting.ranks), config.num_layers
    arrays = {}
    for module in setting.targets:
        m = MODULES.index(module)
        a = jnp.zeros((layers, slots, config.in_sizes[m], rank), dtype)
        arrays[module] = a, jnp.zeros((layers, slots, rank, config.out_sizes[m]), dtype)
    return arrays


def dense_llama(delta: Delta) -> type[Llama]:
    """The model with its LoRA computed by `delta` from dense arrays, which come as the parameter "dense"."""

    class DenseLlama(Llama):
        def _project(self, x, pages, batch, layer, group):
            base = self._base(x, layer, group)
            if not batch.use_adapters:
                return base
            dense = self.get_variable("params", "dense")
            table = batch.adapters
            rows = jnp.arange(x.shape[0])
            segment = jnp.clip(jnp.searchsorted(batch.seg_start, rows, side="right") - 1, 0, len(batch.seg_adapter) - 1)
            adapter = batch.seg_adapter[segment]
            slot = jnp.where(adapter >= 0, table.pages[table.page_start[jnp.maximum(adapter, 0)]], -1)
            slot = jnp.where(rows < batch.q_start[-1], slot, -1)
            parts, at = [], 0
            for module in (MODULES[m] for m in GROUPS[group]):
                width = self.config.out_sizes[MODULES.index(module)]
                part = base[:, at : at + width]
                if module in dense:
                    a, b = dense[module]
                    part = part + delta(x, a[layer], b[layer], slot).astype(base.dtype)
                parts.append(part)
                at += width
            return jnp.concatenate(parts, axis=1)

    return DenseLlama


class DenseStore:
    """Writes adapters to their slots as the scheduler loads them."""

    def __init__(self, engine: Engine, adapters: Mapping[str, Adapter]):
        self._engine = engine
        self._by_digest = {a.digest: a for a in adapters.values()}
        self._write = jax.jit(lambda array, slot, value: array.at[:, slot].set(value), donate_argnums=0)
        scheduler = engine._core.scheduler
        schedule = scheduler.schedule

        def watched(*args, **kwargs):
            plan = schedule(*args, **kwargs)
            for digest in dict.fromkeys(load.adapter.digest for load in plan.loads):
                self._load(digest, scheduler.pool.pages(adapter_owner(digest))[0])
            return plan

        scheduler.schedule = watched  # type: ignore[method-assign]

    def _load(self, digest: str, slot: int) -> None:
        runner, adapter = self._engine._core.runner, self._by_digest[digest]
        dense = dict(runner.params["dense"])
        for module, (a, b) in dense.items():
            values = np.zeros(a.shape[:1] + a.shape[2:], a.dtype), np.zeros(b.shape[:1] + b.shape[2:], b.dtype)
            m = MODULES.index(module)
            for layer in np.flatnonzero(adapter.ranks[:, m]).tolist():
                rank = adapter.ranks[layer, m]
                values[0][layer, :, :rank] = adapter.a(layer, module).T
                values[1][layer, :rank] = adapter.b(layer, module).T * adapter.scaling[layer, m]
            dense[module] = self._write(a, slot, values[0]), self._write(b, slot, values[1])
        runner.params = runner.params | dict(dense=dense)


def open_dense(args: argparse.Namespace, setting: Setting, delta: Delta) -> OpenSession:
    """Opens sessions whose LoRA is computed by `delta`."""

    def make(model: LoadedModel, config: EngineConfig, adapters: Mapping[str, Adapter], stack: contextlib.ExitStack):
        stack.enter_context(mock.patch.object(step, "Llama", dense_llama(delta)))
        # the engine knows its programs on disk by their settings and shapes, which are those of another model
        config = dataclasses.replace(config, compile_cache_dir="")
        engine = split_engine(model, config, adapters, slots=args.slots, slot_pages=1)
        DenseStore(engine, adapters)
        return engine

    def prepare(model: LoadedModel, adapters: dict[str, Adapter]) -> tuple[LoadedModel, dict[str, Adapter]]:
        # before the engine is made, so that the pool is sized beside them
        model.params["dense"] = empty(model.config, setting, args.slots, model.params["embed"].dtype)
        return model, adapters

    def open(*, adapters: int, longest: int, base: bool = False) -> Session:
        return Session(args, setting, adapters=adapters, longest=longest, base=base, make=make, prepare=prepare)

    return open
