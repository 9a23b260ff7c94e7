"""LoRA by an einsum over all slots with a one-hot mask, as tpu-inference does it: every token is multiplied by every
slot's A, all but its own are masked, and the products by every B are summed. Its cost grows with the number of slots.
Slots and padding as in fixed-slots, in dense arrays.
"""

import argparse

import jax
from jax import numpy as jnp

from benchmarks.serving.baselines.dense_slots import open_dense
from benchmarks.serving.workloads import OpenSession
from slora_jax.traces import Setting


def delta(x: jax.Array, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    """See dense_slots.Delta."""
    mask = jax.nn.one_hot(slot, a.shape[0], dtype=x.dtype)  # a row of zeros for -1
    y = jnp.einsum("ti,sir->tsr", x, a, preferred_element_type=jnp.float32).astype(x.dtype) * mask[:, :, None]
    return jnp.einsum("tsr,sro->to", y, b, preferred_element_type=jnp.float32)


def open_session(args: argparse.Namespace, setting: Setting) -> OpenSession:
    return open_dense(args, setting, delta)
