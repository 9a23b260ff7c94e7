"""Residual add and RMS norm on Hopper: one row a thread block, held in registers between its one read and its write."""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.vectors_sm90 import chunk_layout, load, unsupported_row

_MAX_ROW = 16384
"""A thread holds a 128th of a row, and of the weight, in registers."""


def unsupported(hidden: int, dtype) -> str | None:
    """Why the kernel cannot take this input, or None if it can."""
    if hidden > _MAX_ROW:
        return f"rows of {hidden} elements do not fit into a thread block's registers (at most {_MAX_ROW})"
    return unsupported_row(hidden, dtype)


def _kernel(layer_ref, x_ref, *refs, hidden: int, eps: float, add: bool):
    delta_ref, weight_ref, sum_ref, out_ref = refs if add else (None, refs[0], None, refs[1])
    row = lax.axis_index("row")
    chunk, layout = chunk_layout(hidden)
    # the last chunk ends with the row; what it shares with the one before is written twice and counted once
    starts = [min(start, hidden - chunk) for start in range(0, hidden, chunk)]
    x = [load(x_ref.at[row, pl.ds(start, chunk)], layout) for start in starts]
    if add:
        delta = [load(delta_ref.at[row, pl.ds(start, chunk)], layout) for start in starts]
    weight = [load(weight_ref.at[layer_ref[0], pl.ds(start, chunk)], layout) for start in starts]
    if add:
        rounded = [(a + b).astype(out_ref.dtype) for a, b in zip(x, delta, strict=True)]
        for start, value in zip(starts, rounded, strict=True):
            sum_ref[row, pl.ds(start, chunk)] = value
        x = [value.astype(jnp.float32) for value in rounded]
    squares = [value * value for value in x]
    if shared := -hidden % chunk:
        column = plgpu.broadcasted_iota(jnp.int32, (chunk,), 0, layout=layout)
        squares[-1] = jnp.where(column >= shared, squares[-1], 0.0)
    scale = lax.rsqrt(jnp.sum(functools.reduce(jnp.add, squares)) / hidden + eps)
    for start, value, w in zip(starts, x, weight, strict=True):
        normed = (value * scale).astype(out_ref.dtype).astype(jnp.float32)
        out_ref[row, pl.ds(start, chunk)] = (normed * w).astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))  # a model's unrolled layers share one lowering
def add_rms_norm_sm90(
    x: Float[Array, "T H"],
    delta: Float[Array, "T H"] | None,
    weight: Float[Array, "L H"],
    *,
    layer: int | Int[Array, ""],
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "T H"], Float[Array, "T H"]]:
    """As pallas_kernels.add_rms_norm.add_rms_norm."""
    add = delta is not None
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def add_rms_norm(*refs):  # profilers show this name
        _kernel(*refs, hidden=x.shape[1], eps=eps, add=add)

    # the whole weight and a layer index, not weight[layer]: XLA would copy the slice in a launch of its own
    results = plgpu.kernel(
        add_rms_norm,
        out_type=(out, out) if add else (out,),
        grid=(x.shape[0],),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(jnp.asarray(layer, jnp.int32).reshape(1), x, *([delta] if add else []), weight)
    return (results[0], results[1]) if add else (x, results[0])
