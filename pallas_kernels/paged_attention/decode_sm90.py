"""Attention of one query a sequence over the pages, for Hopper: pages are read once, by TMA, a tile (16 tokens) a copy.

A context of several splits leaves float32 partial results, which combine_sm90 merges.
"""

import functools

import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import PAGE_TOKENS, Geometry, ceil_div
from pallas_kernels.paged_attention import decode_schedule as schedule
from pallas_kernels.paged_attention.combine_sm90 import combine
from pallas_kernels.paged_attention.config import DecodeConfig, decode_config, query_rows
from pallas_kernels.paged_attention.decode_kernel_sm90 import decode_kernel


def unsupported(geometry: Geometry, dtype, config: DecodeConfig | None = None) -> str | None:
    """Why the decode kernel cannot take this input, or None if it can."""
    config = config or decode_config(geometry)
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it works in bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if geometry.head_dim not in (64, 128, 256):
        return f"it has head_dim 64, 128 and 256, not {geometry.head_dim}"
    if (group := geometry.num_heads // geometry.num_kv_heads) > 16:
        return f"it takes at most 16 query heads a kv head, not {group}"
    if geometry.num_heads * geometry.head_dim % 128:
        return f"heads x head_dim = {geometry.num_heads} x {geometry.head_dim} is not a multiple of 128"
    if not config.fits(geometry):
        return f"{config} needs too much shared memory"
    return None


def _pack_queries(q: Float[Array, "T N D"], kv_heads: int, rows: int):
    """[blocks, rows, D] view of q in which a kv head's query heads lie in one block; a copy only if it must be padded.

    Returns the view and the heads that a kv head has in it.
    """
    tokens, heads, dim = q.shape
    group = heads // kv_heads
    if rows % group == 0 and heads % rows == 0:
        return q.reshape(tokens * heads // rows, rows, dim), group
    padded = jnp.pad(q.reshape(tokens, kv_heads, group, dim), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    return padded.reshape(tokens * kv_heads, rows, dim), rows


def decode_into(
    out_ref,
    q: Float[Array, "T N D"],
    pages: Float[Array, "L P E"],
    page_tables: Int[Array, "B Pmax"],
    q_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""],
    geometry: Geometry,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    config: DecodeConfig | None = None,
    interpret: bool = False,
) -> None:
    """Writes the rows of out_ref [T, N, D] whose sequence has one token in this step, and zeros in the padding rows."""
    config = config or decode_config(geometry)
    tokens, heads, dim = q.shape
    num_seqs, max_pages = page_tables.shape
    kv_heads, rows = geometry.num_kv_heads, query_rows(geometry)
    num_workers = schedule.sm_count() * config.blocks_per_sm
    num_layers, num_pages, _ = pages.shape
    # the page table's width bounds the splits: fewer change no cut, they only save room for partial results
    max_splits = min(config.max_splits, ceil_div(max_pages * PAGE_TOKENS, config.min_split))
    single = max_pages * PAGE_TOKENS <= config.unsplit
    seqs, workers = schedule.decode_schedule(
        q_start,
        kv_lens,
        page_tables,
        num_workers=num_workers,
        kv_heads=kv_heads,
        block=config.block_kv,
        min_split=config.min_split,
        unsplit=config.unsplit,
        max_splits=max_splits,
        sliding_window=sliding_window,
    )
    queries, packed = _pack_queries(q, kv_heads, rows)
    slots = 1 if single else num_seqs * max_splits
    part, lse = plgpu.kernel(
        functools.partial(
            decode_kernel,
            geometry=geometry,
            config=config,
            tokens=tokens,
            num_pages=num_pages,
            num_workers=num_workers,
            packed=packed,
            rows=rows,
            scale=sm_scale,
            window=sliding_window,
            soft_cap=soft_cap,
            single=single,
            max_splits=max_splits,
            interpret=interpret,
        ),
        out_type=(
            jax.ShapeDtypeStruct((slots * heads, dim), jnp.float32),
            jax.ShapeDtypeStruct((slots * kv_heads, rows), jnp.float32),
        ),
        grid=(num_workers,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        workers,
        seqs,
        page_tables,
        queries,
        pages.reshape(num_layers * num_pages * 2 * kv_heads, PAGE_TOKENS, dim),
        out_ref,
    )
    if not single:
        combine(out_ref, part, lse, seqs, geometry=geometry, max_splits=max_splits, packed=packed, interpret=interpret)


_STATIC = ("geometry", "sm_scale", "sliding_window", "soft_cap", "config", "interpret")


@functools.partial(jax.jit, static_argnames=_STATIC)  # so that a model's unrolled layers share one lowering
def decode_sm90(
    q: Float[Array, "T N D"],
    pages: Float[Array, "L P E"],
    page_tables: Int[Array, "B Pmax"],
    q_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""],
    **kwargs,
) -> Float[Array, "T N D"]:
    """Attention of every sequence that has exactly one token in this step.

    Padding rows are zero; rows of sequences with several tokens are unspecified. Keywords as in decode_into.
    """
    out_ref = jax.new_ref(jnp.empty(q.shape, q.dtype))
    decode_into(out_ref, q, pages, page_tables, q_start, kv_lens, layer=layer, **kwargs)
    return jax.freeze(out_ref)
