"""Rotary embedding and write_kv on Hopper: heads pass once through registers, from qkv to q and to their page.

A *tile* is a few heads of one token. Its two halves of the head dimension are two arrays of the same layout, so that a
thread holds both elements of every pair it rotates. Keys and values are one run of 2 K heads, in qkv as in a page.
With few tokens a thread block has one tile, with many all tiles of a token.
"""

from collections.abc import Iterator
import functools
import itertools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import TiledLayout
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import PAGE_TOKENS, Geometry, ceil_div
from pallas_kernels.vectors_sm90 import WARPGROUP, load

_WARPS = 4
_VECTOR = 8
"""Most elements of a thread's load: 16 bytes."""
_BLOCKS = 2048
"""About as many thread blocks as run at once."""
_IN_FLIGHT = 4
"""Tiles whose loads a block starts together."""


def _block_columns(head_dim: int) -> int:
    """Columns of half a head over which a warpgroup is spread at a time; it repeats over the rest."""
    half = head_dim // 2
    return half & -half


def tile_heads(heads: int, head_dim: int) -> int:
    """Heads of a tile, of `heads` in a run: a power of two. The run's last tile may overlap the one before."""
    return min(1 << (heads.bit_length() - 1), WARPGROUP * _VECTOR // _block_columns(head_dim))


def unsupported(geometry: Geometry, dtype, pages_dtype) -> str | None:
    """Why the kernel cannot take this input, or None if it can."""
    dim = geometry.head_dim
    if jnp.dtype(dtype).itemsize != 2 or jnp.dtype(dtype) != jnp.dtype(pages_dtype):
        return f"qkv is {jnp.dtype(dtype).name} and the pages {jnp.dtype(pages_dtype).name}, not the same two-byte type"
    if dim % 16 or dim > 256:
        return f"head_dim is {dim}, not a multiple of 16 up to 256"
    for name, heads in (("query", geometry.num_heads), ("key and value", 2 * geometry.num_kv_heads)):
        if tile_heads(heads, dim) * _block_columns(dim) < WARPGROUP:
            return f"{heads} {name} heads of {dim} are too few for a warpgroup"
    return None


def _tile_layout(heads: int, head_dim: int):
    """Layout of [heads, head_dim / 2]: each thread a run of columns, consecutive threads consecutive runs."""
    columns = _block_columns(head_dim)
    vector, in_warp = heads * columns // WARPGROUP, max(heads // _WARPS, 1)
    tiling = Tiling(((heads, columns), (in_warp, heads * columns // _WARPS // in_warp), (vector,)))
    # dimensions after tiling: warps down, warps across, heads of a warp, vectors of a head, elements of a vector
    layout = TiledLayout(tiling, (-5, -4), (-3, -2), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _tiles(heads: int, size: int) -> Iterator[int]:
    """First head of each tile of `size` heads."""
    return (min(start, heads - size) for start in range(0, heads, size))


def _rounded(product):
    """In a sum of two products the compiler fuses one with the addition. This says which one it may not, so that all
    variants of the kernel give the same bits.
    """
    return lax.optimization_barrier(product)


def _kernel(layer_ref, ids_ref, slots_ref, cos_ref, sin_ref, qkv_ref, *refs, geometry: Geometry, num_pages, eps, split):
    *norm_refs, pages_ref, q_ref = refs
    heads, kv_heads, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    half, dtype = dim // 2, q_ref.dtype
    halves = (pl.ds(0, half), pl.ds(half, half))
    token = lax.axis_index("token")
    layer, page, slot = layer_ref[0], ids_ref[token], slots_ref[token]

    def vector(ref, row, columns, layout):
        return load(ref.at[row, columns], layout.reduce(0))

    def read(first, size):
        layout = _tile_layout(size, dim)
        x = [load(qkv_ref.at[token, pl.ds(first, size), columns], layout) for columns in halves]
        return x, [vector(ref, token, pl.ds(0, half), layout) for ref in (cos_ref, sin_ref)]

    def rotate(x, angles, norm_ref):
        shape = x[0].shape
        layout = _tile_layout(shape[0], dim)
        if norm_ref is not None:
            total = jnp.sum(x[0] * x[0] + _rounded(x[1] * x[1]), axis=1)
            scale = lax.broadcast_in_dim(lax.rsqrt(total / dim + eps), shape, (0,))
            for i, columns in enumerate(halves):
                weight = lax.broadcast_in_dim(vector(norm_ref, layer, columns, layout), shape, (1,))
                normed = (x[i] * scale).astype(dtype).astype(jnp.float32)
                x[i] = (normed * weight).astype(dtype).astype(jnp.float32)
        cos, sin = (lax.broadcast_in_dim(a, shape, (1,)) for a in angles)
        return [x[0] * cos - _rounded(x[1] * sin), x[1] * cos + _rounded(x[0] * sin)]

    def write_q(first, size, x, angles):
        for columns, value in zip(halves, rotate(x, angles, norm_refs[0] if norm_refs else None), strict=True):
            q_ref[token, pl.ds(first, size), columns] = value.astype(dtype)

    def write_kv(first, size, x, angles):
        """Heads of the run of keys and values; only keys are rotated."""
        only_values = isinstance(first, int) and first >= kv_heads
        rotated = x if only_values else rotate(list(x), angles, norm_refs[1] if norm_refs else None)
        if not only_values:
            head = first + plgpu.broadcasted_iota(jnp.int32, x[0].shape, 0, layout=_tile_layout(size, dim))
            rotated = [jnp.where(head < kv_heads, new, old) for new, old in zip(rotated, x, strict=True)]

        @pl.when((page >= 0) & (page < num_pages))
        def _():
            for columns, value in zip(halves, rotated, strict=True):
                pages_ref[layer * num_pages + page, pl.ds(first, size), slot, columns] = value.astype(dtype)

    # (number of heads, heads of a tile, first head in qkv, what to do with a tile)
    runs = [
        (count, tile_heads(count, dim), before, write)
        for count, before, write in ((heads, 0, write_q), (2 * kv_heads, heads, write_kv))
    ]
    if split:
        part = lax.axis_index("part")
        for count, size, before, write in runs:

            @pl.when((part >= 0) & (part < ceil_div(count, size)))
            def _(part=part, count=count, size=size, before=before, write=write):
                first = jnp.minimum(part * size, count - size)
                write(first, size, *read(before + first, size))

            part -= ceil_div(count, size)
        return
    for count, size, before, write in runs:
        for some in itertools.batched(_tiles(count, size), _IN_FLIGHT):
            tiles = [read(before + first, size) for first in some]
            for first, tile in zip(some, tiles, strict=True):
                write(first, size, *tile)


_STATIC = ("geometry", "norm_eps", "split", "interpret")


@functools.partial(jax.jit, static_argnames=_STATIC)  # so that a model's unrolled layers share one lowering
def rope_write_kv_sm90(
    qkv: Float[Array, "T c"],
    cos: Float[Array, "T d"],
    sin: Float[Array, "T d"],
    pages: Float[Array, "L P E"],
    page_ids: Int[Array, "T"],
    slots: Int[Array, "T"],
    *,
    layer: int | Int[Array, ""],
    geometry: Geometry,
    norms: tuple[Float[Array, "L D"], Float[Array, "L D"]] | None = None,
    norm_eps: float = 0.0,
    split: bool | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "T N D"], Float[Array, "L P E"]]:
    """As pallas_kernels.rope_write_kv.rope_write_kv. split: one tile a thread block, if not the default."""
    num_layers, num_pages, _ = pages.shape
    num_tokens, dim = qkv.shape[0], geometry.head_dim
    runs = (geometry.num_heads, 2 * geometry.num_kv_heads)
    parts = sum(ceil_div(heads, tile_heads(heads, dim)) for heads in runs)
    if split is None:
        split = num_tokens * parts <= _BLOCKS
    ref = jax.new_ref(pages.reshape(num_layers * num_pages, runs[1], PAGE_TOKENS, dim))

    def rope_write_kv(*refs):  # profilers show this name
        _kernel(*refs, geometry=geometry, num_pages=num_pages, eps=norm_eps, split=split)

    q = plgpu.kernel(
        rope_write_kv,
        out_type=jax.ShapeDtypeStruct((num_tokens, runs[0], dim), qkv.dtype),
        grid=(num_tokens, parts if split else 1),
        grid_names=("token", "part"),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        page_ids,
        slots,
        cos,
        sin,
        qkv.reshape(num_tokens, sum(runs), dim),
        *(norms or ()),
        ref,
    )
    return q, jax.freeze(ref).reshape(pages.shape)
