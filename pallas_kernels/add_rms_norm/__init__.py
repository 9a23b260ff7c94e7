"""Adds a block's output to the residual stream and normalises the sum for the next block."""

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.add_rms_norm import kernel_sm90
from pallas_kernels.dispatch import Implementation, use_mosaic

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Float[Array, "*n c"], weight: Float[Array, "c"], eps: float) -> Float[Array, "*n c"]:
    """Root mean square norm (arXiv 1910.07467) over the last axis, computed in float32; the weight multiplies the
    result in x's dtype, as Hugging Face's LlamaRMSNorm does.
    """
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight


def add_rms_norm(
    x: Float[Array, "T H"],
    delta: Float[Array, "T H"] | None,
    weight: Float[Array, "L H"],
    *,
    layer: int | Int[Array, ""],
    eps: float,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "T H"], Float[Array, "T H"]]:
    """``(x + delta, rms_norm(x + delta, weight[layer], eps))``, all in x's dtype.

    delta: None stands for zeros. Raises UnsupportedInput if implementation is "mosaic" and there is no kernel for this
    width and dtype.
    """
    if use_mosaic("add_rms_norm", implementation, lambda: kernel_sm90.unsupported(x.shape[1], x.dtype)):
        return kernel_sm90.add_rms_norm_sm90(x, delta, weight, layer=layer, eps=eps)
    if delta is not None:
        x = x + delta
    return x, rms_norm(x, weight[layer], eps)
