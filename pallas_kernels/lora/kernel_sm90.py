"""LoRA shrink and expand on Hopper GPUs: what the dispatcher calls.

The two are a pair. Between them stands ``y``, float32 ``[token blocks, splits, rows, block_tokens]``: for every token
block of the plan and every split of the input width the partial sums of its stacked ranks. Only expand reads it. A
large step is served by two pairs of launches, one for short segments (decoding) and one for long ones (prompts).
"""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.lora import kernel_few_sm90, kernel_few_tiles_sm90, kernel_gated_sm90, kernel_matmul_sm90
from pallas_kernels.lora.config import (
    FEW_TILE_TOKENS,
    MOST_FEW,
    SHORT_SEGMENT,
    SHORT_STEP,
    LoraConfig,
    chunk_tiles,
    default_config,
)
from pallas_kernels.lora.few_plan import make_few_plan
from pallas_kernels.lora.kernel_add_sm90 import add
from pallas_kernels.lora.kernel_expand_sm90 import expand
from pallas_kernels.lora.kernel_short_sm90 import short
from pallas_kernels.lora.kernel_shrink_sm90 import shrink
from pallas_kernels.lora.kernel_shrink_y_sm90 import shrink_y
from pallas_kernels.lora.plan import Half, by_length, group_loads, make_plan
from pallas_kernels.lora.table import AdapterTable
from pallas_kernels.lora.windows import WINDOW, make_tiles, touched_windows
from pallas_kernels.silu_mul.kernel_sm90 import silu_mul_again_sm90

_WHOLE_ROWS = 8
"""XLA pads matrix products to multiples of so many rows and slices the result. A kernel that changes such a slice in
place is fused with the slicing, and what it wrote is lost (jax 0.11.2 on an H100: two to seven tokens came out wrong).
"""

# One trace and one lowering for all layers of a step.
_STATIC = ("group", "geometry", "config", "chunk", "max_rank", "interpret")
_shrink = jax.jit(shrink, static_argnames=_STATIC)
_expand = jax.jit(expand, static_argnames=_STATIC)
_make_plan = jax.jit(make_plan, static_argnames=("num_tokens", "geometry", "block_tokens", "windows"))
_make_tiles = jax.jit(make_tiles, static_argnames=("num_tokens", "max_rank"))
_shrink_y = jax.jit(shrink_y, static_argnames=_STATIC)
_matmul = jax.jit(kernel_matmul_sm90.matmul, static_argnames=("group", "config", "interpret"))
_gated = jax.jit(kernel_gated_sm90.gated_matmul, static_argnames=("config", "interpret"))
_make_few_plan = jax.jit(make_few_plan, static_argnames=("blocks", "geometry", "lists", "tiles"))
_few = jax.jit(kernel_few_sm90.few_matmul, static_argnames=("group", "geometry", "interpret"))
_few_tiles = jax.jit(kernel_few_tiles_sm90.few_tile_matmul, static_argnames=("group", "geometry", "interpret"))
_touched_windows = jax.jit(touched_windows, static_argnames="num_tokens")
_add = jax.jit(add, static_argnames=("group", "config", "chunk", "max_rank"))
_short = jax.jit(short, static_argnames=("phase", "group", "config", "chunk", "max_rank", "interpret"))


def unsupported(tokens: jax.Array, pages: jax.Array, *, group: str, geometry: Geometry, max_rank: int) -> str | None:
    """Why the kernels cannot take this input, or None if they can. tokens: `x` of shrink or `out` of expand."""
    if pages.dtype != jnp.bfloat16:
        return f"pages are {pages.dtype}, not bfloat16"
    if tokens.dtype != jnp.bfloat16:
        return f"activations are {tokens.dtype}, not bfloat16"
    for size in (*geometry.in_sizes, *geometry.out_sizes):
        if size % TILE_COLS:
            return f"a width of {size} is not a multiple of {TILE_COLS}"
    if max_rank > 512:
        return f"max_rank is {max_rank}, more than 512"
    if pages.size // (TILE_COLS * 8) >= 2**31:
        return f"the pool holds {pages.size // (TILE_COLS * 8)} tiles, more than an int32 counts"
    if group not in GROUPS:
        return f"there is no group {group!r}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrices:
    """Where one of the two matrices of every adapter lies."""

    table: AdapterTable
    geometry: Geometry

    def half(
        self, seg_start, seg_adapter, num_tokens: int, config: LoraConfig, *, windows: bool = False, loads=None
    ) -> Half:
        options = dict(num_tokens=num_tokens, geometry=self.geometry, block_tokens=config.block_tokens)
        plan = _make_plan(self.table, seg_start, seg_adapter, **options, windows=windows, loads=loads)
        return Half(page_ids=self.table.pages, plan=plan, geometry=self.geometry)


def _pairs(num_tokens: int, seg_start, seg_adapter, geometry: Geometry, config):
    """(config, segments' adapters) of each launch or pair of launches: a large step has one for short segments and one
    for long ones. A launch passes over segments without an adapter.
    """
    if config is None:
        shortest, long = default_config(geometry, 1), default_config(geometry, num_tokens)
        config = shortest if num_tokens <= SHORT_STEP else (shortest, long)
    if isinstance(config, LoraConfig):
        return [(config, seg_adapter)]
    return list(zip(config, by_length(seg_start, seg_adapter), strict=True))


def _is_short(config: LoraConfig) -> bool:
    return config.block_tokens == TILE_RANKS


def shrink_sm90(
    x: Float[Array, "T c"],
    pages: Float[Array, "L P E"],
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    geometry: Geometry,
    max_rank: int,
    config: LoraConfig | tuple[LoraConfig, LoraConfig] | None = None,
    interpret=None,
) -> tuple[Float[Array, "_ _ _ _"], ...]:
    """Partial sums of ``x A^T`` for `expand_sm90`, which must be called with the same arguments: one array for each
    launch. config: for all segments, or for short and for long ones.
    """
    matrices, where = Matrices(table=table, geometry=geometry), jnp.asarray(layer, jnp.int32).reshape(1)
    found = []
    for one, adapters in _pairs(x.shape[0], seg_start, seg_adapter, geometry, config):
        half = matrices.half(seg_start, adapters, x.shape[0], one)
        chunk = chunk_tiles(geometry, one.chunk_tiles)
        options: dict[str, Any] = dict(group=group, config=one, chunk=chunk, max_rank=max_rank, interpret=interpret)
        if _is_short(one):
            found.append(_short("shrink", pages, where, half, x=x, **options))
        else:
            found.append(_shrink(x, pages, table.pages, half.plan, where, geometry=geometry, **options))
    return tuple(found)


def expand_sm90(
    out: Float[Array, "T c"],
    y: tuple[Float[Array, "_ _ _ _"], ...],
    pages: Float[Array, "L P E"],
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    geometry: Geometry,
    max_rank: int,
    config: LoraConfig | tuple[LoraConfig, LoraConfig] | None = None,
    interpret=None,
) -> Float[Array, "T c"]:
    """`out` with every token's ``scaling * y B^T`` added: float32 sums, one rounding. Tokens without an adapter are
    not touched.
    """
    matrices, where = Matrices(table=table, geometry=geometry), jnp.asarray(layer, jnp.int32).reshape(1)
    num_tokens = out.shape[0]
    out = _whole_rows(out)
    pairs = _pairs(num_tokens, seg_start, seg_adapter, geometry, config)
    for part, (one, adapters) in zip(y, pairs, strict=True):
        half = matrices.half(seg_start, adapters, num_tokens, one)
        chunk = chunk_tiles(geometry, one.chunk_tiles)
        options: dict[str, Any] = dict(group=group, config=one, chunk=chunk, max_rank=max_rank, interpret=interpret)
        if _is_short(one):
            out = _short("expand", pages, where, half, out=out, y=part, **options)
        else:
            out = _expand(out, part, pages, table.pages, half.plan, where, geometry=geometry, **options)
    return out[:num_tokens]


def add_sm90(
    out: Float[Array, "T c"],
    x: Float[Array, "T d"],
    pages: Float[Array, "L P E"],
    shrink: Matrices,
    expand: Matrices,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    max_rank: int,
    config: LoraConfig | tuple[LoraConfig, LoraConfig] | None = None,
) -> Float[Array, "T c"]:
    """`expand_sm90` of `shrink_sm90` in one launch for short segments; with one geometry bit for bit. shrink, expand:
    where A and B are.
    """
    where = jnp.asarray(layer, jnp.int32).reshape(1)
    num_tokens = out.shape[0]
    out = _whole_rows(out)
    # From one table for both plans: their orders must agree, and a device may have a part of A, but of B all ranks.
    loads = group_loads(expand.table)
    for one, adapters in _pairs(num_tokens, seg_start, seg_adapter, shrink.geometry, config):
        step = (seg_start, adapters, num_tokens, one)
        a, b = (m.half(*step, loads=loads if _is_short(one) else None) for m in (shrink, expand))
        chunk = min(chunk_tiles(half.geometry, one.chunk_tiles) for half in (a, b))
        options: dict[str, Any] = dict(group=group, config=one, chunk=chunk, max_rank=max_rank)
        if _is_short(one):
            out = _add(pages, where, a, b, x=x, out=out, **options)
        else:
            options["interpret"] = None
            y = _shrink(x, pages, a.page_ids, a.plan, where, geometry=a.geometry, **options)
            out = _expand(out, y, pages, b.page_ids, b.plan, where, geometry=b.geometry, **options)
    return out[:num_tokens]


def matmul_sm90(
    x: Float[Array, "T d"],
    weights: Float[Array, "L d c"],
    pages: Float[Array, "L P E"],
    shrink: Matrices,
    expand: Matrices,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    max_rank: int,
    interpret=None,
) -> Float[Array, "T c"]:
    """`add_sm90` to ``x @ weights[layer]``, for steps of many tokens: what long segments add is summed with the
    product, and never written.
    """
    where, (short, config, b, tiles, y) = _before_product(
        x,
        pages,
        shrink,
        expand,
        seg_start,
        seg_adapter,
        layer=layer,
        group=group,
        max_rank=max_rank,
        interpret=interpret,
    )
    out = _matmul(x, weights, y, pages, b, tiles, where, group=group, config=config, interpret=interpret)
    if interpret:
        return out
    options: dict[str, Any] = dict(layer=layer, group=group, max_rank=max_rank)
    options |= dict(config=default_config(shrink.geometry, 1))
    return add_sm90(out, x, pages, shrink, expand, seg_start, short, **options)


def few_sm90(
    x: Float[Array, "T d"],
    weights: Float[Array, "L d c"],
    pages: Float[Array, "L P E"],
    adapters: Matrices,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    most_ranks: int = MOST_FEW,
    interpret=None,
) -> Float[Array, "T c"]:
    """`matmul_sm90` for steps of few tokens whose adapters are few, see FewPlan: summed in another order. most_ranks:
    that all segments' adapters take in a module, see few_ranks.
    """
    where, geometry = jnp.asarray(layer, jnp.int32).reshape(1), adapters.geometry
    segments = adapters.table, seg_start, seg_adapter
    if x.shape[0] == FEW_TILE_TOKENS:
        options: dict[str, Any] = dict(lists=kernel_few_tiles_sm90.LISTS, tiles=kernel_few_tiles_sm90.TILES)
        options |= dict(blocks=kernel_few_tiles_sm90.few_tile_blocks(most_ranks), geometry=geometry)
        plan = _make_few_plan(*segments, **options)
        return _few_tiles(x, weights, pages, plan, where, group=group, geometry=geometry, interpret=interpret)
    plan = _make_few_plan(*segments, blocks=kernel_few_sm90.few_blocks(most_ranks), geometry=geometry)
    return _few(x, weights, pages, plan, where, group=group, geometry=geometry, interpret=interpret)


def gated_sm90(
    x: Float[Array, "T d"],
    weights: Float[Array, "L d F2"],
    pages: Float[Array, "L P E"],
    shrink: Matrices,
    expand: Matrices,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    max_rank: int,
    interpret=None,
) -> Float[Array, "T F"]:
    """`silu_mul` of `matmul_sm90` for the group "gu", with the same bits. Gate and up are written only around short
    segments, for which silu_mul is done again.
    """
    group = kernel_gated_sm90.GROUP
    where, (short, config, b, tiles, y) = _before_product(
        x,
        pages,
        shrink,
        expand,
        seg_start,
        seg_adapter,
        layer=layer,
        group=group,
        max_rank=max_rank,
        interpret=interpret,
    )
    windows = _touched_windows(seg_start, short, num_tokens=x.shape[0])
    h, gate_up = _gated(x, weights, y, pages, b, tiles, windows, where, config=config, interpret=interpret)
    if interpret:
        return h
    options: dict[str, Any] = dict(layer=layer, group=group, max_rank=max_rank)
    options |= dict(config=default_config(shrink.geometry, 1))
    gate_up = add_sm90(gate_up, x, pages, shrink, expand, seg_start, short, **options)
    return silu_mul_again_sm90(gate_up, h, windows)


def _before_product(x, pages, shrink, expand, seg_start, seg_adapter, *, layer, group, max_rank, interpret):
    """The layer as an array, and (short segments' adapters, config, where the long ones' B is, tiles, y of them)."""
    where, num_tokens = jnp.asarray(layer, jnp.int32).reshape(1), x.shape[0]
    short, long = by_length(seg_start, seg_adapter)
    config = dataclasses.replace(default_config(shrink.geometry, SHORT_SEGMENT + 1), block_tokens=WINDOW)
    a, b = (matrices.half(seg_start, long, num_tokens, config, windows=True) for matrices in (shrink, expand))
    options: dict[str, Any] = dict(group=group, config=config, interpret=interpret, geometry=a.geometry)
    options |= dict(chunk=chunk_tiles(a.geometry, config.chunk_tiles), max_rank=max_rank)
    tiles = _make_tiles(b.plan, num_tokens=num_tokens, max_rank=max_rank)
    y = _shrink_y(x, pages, a.page_ids, a.plan, b.plan, tiles, where, **options)
    return where, (short, config, b, tiles, y)


def _whole_rows(out: Float[Array, "T c"]) -> Float[Array, "T2 c"]:
    num_tokens = out.shape[0]
    if num_tokens > 1 and num_tokens % _WHOLE_ROWS:
        return jnp.pad(out, ((0, -num_tokens % _WHOLE_ROWS), (0, 0)))
    return out
