"""One adapter merged into the base model's weights, served without any LoRA work: what n = 1 could be at best."""

import argparse

import jax
from jax import numpy as jnp
import numpy as np

from benchmarks.serving.baselines.no_adapters import BaseSession
from benchmarks.serving.session import Session
from benchmarks.serving.workloads import OpenSession
from pallas_kernels.geometry import MODULES
from slora_jax import Adapter, ModelConfig, SloraError
from slora_jax.loading import LoadedModel
from slora_jax.traces import Setting


def columns(config: ModelConfig) -> dict[str, tuple[str, int, int]]:
    """Where each module's outputs lie: parameter, first column, columns."""
    q, kv, h, f = config.q_size, config.kv_size, config.hidden_size, config.mlp_size
    return {
        "q": ("wqkv", 0, q),
        "k": ("wqkv", q, kv),
        "v": ("wqkv", q + kv, kv),
        "o": ("wo", 0, h),
        "gate": ("wgu", 0, f),
        "up": ("wgu", f, f),
        "down": ("wdown", 0, h),
    }


def merge(model: LoadedModel, adapter: Adapter) -> None:
    """Adds an adapter to a model's parameters, in place: the old ones are used up."""

    def add(weight, a, b, layer, start, scaling):
        delta = scaling * (a.T.astype(jnp.float32) @ b.T.astype(jnp.float32))
        part = jax.lax.dynamic_slice(weight, (layer, 0, start), (1, *delta.shape))
        return jax.lax.dynamic_update_slice(weight, part + delta[None].astype(weight.dtype), (layer, 0, start))

    jitted = jax.jit(add, donate_argnums=0)
    for module in adapter.targets:
        name, start, _ = columns(model.config)[module]
        index = MODULES.index(module)
        for layer in np.flatnonzero(adapter.ranks[:, index]).tolist():
            factors = adapter.a(layer, module), adapter.b(layer, module)
            scaling = adapter.scaling[layer, index]
            model.params[name] = jitted(model.params[name], *factors, layer, start, scaling)


def _prepare(model: LoadedModel, adapters: dict[str, Adapter]) -> tuple[LoadedModel, dict[str, Adapter]]:
    for adapter in adapters.values():
        merge(model, adapter)
    return model, {}


def open_session(args: argparse.Namespace, setting: Setting) -> OpenSession:
    def open(*, adapters: int, longest: int, base: bool = False) -> Session:
        if adapters != 1 or base:
            raise SloraError(f"system merged serves exactly one adapter, not {adapters}; use --adapters 1")
        return BaseSession(args, setting, adapters=1, longest=longest, base=True, prepare=_prepare)

    return open
