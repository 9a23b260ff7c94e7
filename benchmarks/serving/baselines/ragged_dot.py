"""LoRA by lax.ragged_dot over fixed slots, as SkyRL's JAX engine does it: tokens are sorted by slot, each slot's tokens
are a group, and the result is brought back in order. Slots and padding as in fixed-slots, in dense arrays.
"""

import argparse

import jax
from jax import lax
from jax import numpy as jnp

from benchmarks.serving.baselines.dense_slots import open_dense
from benchmarks.serving.workloads import OpenSession
from slora_jax.traces import Setting


def delta(x: jax.Array, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    """See dense_slots.Delta."""
    group = jnp.maximum(slot, 0)
    order = jnp.argsort(group)
    sizes = jnp.bincount(group, length=a.shape[0]).astype(jnp.int32)
    y = lax.ragged_dot(x[order], a, sizes, preferred_element_type=jnp.float32).astype(x.dtype)
    out = lax.ragged_dot(y, b, sizes, preferred_element_type=jnp.float32)
    out = jnp.zeros_like(out).at[order].set(out)
    return jnp.where(slot[:, None] >= 0, out, 0)


def open_session(args: argparse.Namespace, setting: Setting) -> OpenSession:
    return open_dense(args, setting, delta)
