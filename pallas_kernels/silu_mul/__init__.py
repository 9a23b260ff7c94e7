"""The gated activation of a Llama MLP."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, use_mosaic
from pallas_kernels.silu_mul import kernel_sm90

__all__ = ["silu_mul"]


def silu_mul(gate_up: Float[Array, "T F2"], *, implementation: Implementation = "auto") -> Float[Array, "T F"]:
    """``silu(gate) * up`` of ``gate_up = [gate | up]``, halves of F columns each, in gate_up's dtype.

    Raises UnsupportedInput if implementation is "mosaic" and there is no kernel for this width and dtype.
    """
    size = gate_up.shape[1] // 2
    if use_mosaic("silu_mul", implementation, lambda: kernel_sm90.unsupported(size, gate_up.dtype)):
        return kernel_sm90.silu_mul_sm90(gate_up)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up
