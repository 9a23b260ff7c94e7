"""Writes new keys and values into their pages on Hopper: two copies in and two out per token, in place."""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import PAGE_TOKENS, Geometry, ceil_div

_SMEM_BYTES = 192 * 1024


def unsupported(geometry: Geometry, dtype) -> str | None:
    """Why the kernel cannot take this input, or None if it can."""
    size = geometry.num_kv_heads * geometry.head_dim * jnp.dtype(dtype).itemsize
    if 2 * size > _SMEM_BYTES or geometry.num_kv_heads > 256 or geometry.head_dim > 256:
        return f"keys of a token, {geometry.num_kv_heads} heads of {geometry.head_dim}, are too large for one copy"
    if size % 128 or geometry.head_dim * jnp.dtype(dtype).itemsize % 16:
        return f"keys of a token have {size} bytes, not a multiple of 128"
    return None


def _kernel(layer_ref, ids_ref, slots_ref, k_ref, v_ref, pages_ref, smem, bar, *, num_pages: int, per_block: int):
    num_tokens, kv_heads, _ = k_ref.shape
    first = lax.axis_index("block") * per_block

    def of_tokens(step):
        for i in range(per_block):
            token = first + i
            inside = token < num_tokens
            page = ids_ref[jnp.minimum(token, num_tokens - 1)]
            pl.when(inside & (page >= 0) & (page < num_pages))(functools.partial(step, i, token, page))

    def load(i, token, page):
        plgpu.copy_gmem_to_smem(k_ref.at[token], smem.at[i, 0], bar.at[i])
        plgpu.copy_gmem_to_smem(v_ref.at[token], smem.at[i, 1], bar.at[i])

    def store(i, token, page):
        plgpu.barrier_wait(bar.at[i])
        row, slot = layer_ref[0] * num_pages + page, slots_ref[token]
        for kv in range(2):
            plgpu.copy_smem_to_gmem(smem.at[i, kv], pages_ref.at[row, pl.ds(kv * kv_heads, kv_heads), slot])

    of_tokens(load)
    of_tokens(store)
    plgpu.wait_smem_to_gmem(0)


def write_kv_sm90(
    pages: Float[Array, "L P E"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    page_ids: Int[Array, "T"],
    slots: Int[Array, "T"],
    *,
    layer: int | Int[Array, ""],
    geometry: Geometry,
    interpret: bool = False,
) -> Float[Array, "L P E"]:
    """As pallas_kernels.write_kv.write_kv; in place where `pages` is donated or already a temporary."""
    num_layers, num_pages, _ = pages.shape
    num_tokens, kv_heads, dim = k.shape
    token_bytes = 2 * kv_heads * dim * pages.dtype.itemsize
    per_block = max(1, min(ceil_div(num_tokens, 512), 8, _SMEM_BYTES // token_bytes))
    ref = jax.new_ref(pages.reshape(num_layers * num_pages, 2 * kv_heads, PAGE_TOKENS, dim))
    plgpu.kernel(
        functools.partial(_kernel, num_pages=num_pages, per_block=per_block),
        out_type=(),
        grid=(ceil_div(num_tokens, per_block),),
        grid_names=("block",),
        scratch_types=dict(
            smem=plgpu.SMEM((per_block, 2, kv_heads, dim), pages.dtype),
            bar=plgpu.Barrier(num_arrivals=2, num_barriers=per_block),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        page_ids,
        slots,
        k.astype(pages.dtype),
        v.astype(pages.dtype),
        ref,
    )
    return jax.freeze(ref).reshape(pages.shape)
