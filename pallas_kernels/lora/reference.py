"""Gathered LoRA matmuls in plain XLA: the implementation on CPUs and older GPUs, and what the kernels are tested
against.

Work is cut into items of some tiles of one adapter and a block of tokens of one segment, and a loop with a dynamic trip
count walks over as many items as the batch really has: true ranks, nothing padded to the largest rank or segment.
"""

import math

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry, ceil_div
from pallas_kernels.lora.table import AdapterTable, gather_tiles, section_starts

_BLOCK_TOKENS = 8
_ITEMS_PER_ITERATION = 16
_FEW_ITEMS_PER_ITERATION = 4  # for a step of one block of tokens, which has few items: one sequence that decodes


def _pad_columns(x: Float[Array, "T c"], tiles: int) -> Float[Array, "T c2"]:
    return jnp.pad(x, ((0, 0), (0, tiles * TILE_COLS - x.shape[1])))


def _for_each_item(num_tokens: int, seg_start, seg_adapter, units, body, init):
    """Folds ``body(carry, rows, adapter, unit) -> carry`` over all work items, a few at a time.

    units: int32[S], how many units of work a block of tokens of each segment has (0 where it has no adapter).
    rows: int32[n, block], token rows of the items, past the last token where a block is not full.
    """
    per_block = min(_BLOCK_TOKENS, num_tokens)
    per_iteration = _ITEMS_PER_ITERATION if num_tokens > _BLOCK_TOKENS else _FEW_ITEMS_PER_ITERATION
    counts = -(-(seg_start[1:] - seg_start[:-1]) // per_block) * units
    ends = jnp.cumsum(counts)
    segments = jnp.stack([ends - counts, units, seg_start[:-1], seg_start[1:], seg_adapter], axis=1)

    def iteration(i, carry):
        item = i * per_iteration + jnp.arange(per_iteration, dtype=jnp.int32)
        live = item < ends[-1]
        seg = jnp.minimum(jnp.sum(ends[None] <= item[:, None], axis=1), len(units) - 1)
        first, per_row, start, stop, adapter = segments[seg].T
        block, unit = jnp.divmod(item - first, jnp.maximum(per_row, 1))
        rows = (start + block * per_block)[:, None] + jnp.arange(per_block, dtype=jnp.int32)
        rows = jnp.where(live[:, None] & (rows < stop[:, None]), rows, jnp.iinfo(jnp.int32).max)
        return body(carry, rows, jnp.maximum(adapter, 0), jnp.where(live, unit, 0))

    return lax.fori_loop(0, -(-ends[-1] // per_iteration), iteration, init)


def _of_segments(units: Int[Array, "A"], seg_adapter: Int[Array, "S"]) -> Int[Array, "S"]:
    return jnp.where(seg_adapter >= 0, units[jnp.maximum(seg_adapter, 0)], 0)


def shrink(
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
) -> Float[Array, "T R"]:
    """See lora_shrink. Returns [T, modules x max_rank in granules]: a token's ranks of the group's modules one after
    another, times their scaling, in the leading columns; the others are zero.
    """
    modules = GROUPS[group]
    in_tiles = geometry.in_tiles(modules[0])
    columns = len(modules) * ceil_div(max_rank, TILE_RANKS)
    blocks = _pad_columns(x, in_tiles).reshape(x.shape[0], in_tiles, TILE_COLS)
    granules = table.granules[:, layer]
    first_tile = table.tile_start[:, layer] + section_starts(granules, geometry)[0][list(GROUPS).index(group)]
    ends = jnp.cumsum(granules[:, jnp.array(modules)], axis=1)
    scaling = table.scaling[:, layer][:, jnp.array(modules)]

    def body(y, rows, adapter, granule):
        tiles = (first_tile[adapter] + granule * in_tiles)[:, None] + jnp.arange(in_tiles, dtype=jnp.int32)
        a = gather_tiles(pages, table, adapter, tiles, geometry)
        part = jnp.einsum(
            "ntcj,ncrj->ntr",
            blocks.at[rows].get(mode="fill", fill_value=0),
            a,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST,
        )
        module = jnp.minimum(jnp.sum(granule[:, None] >= ends[adapter], axis=1), len(modules) - 1)
        part *= scaling[adapter, module][:, None, None]
        return y.at[rows, granule[:, None]].set(part, mode="drop")

    y = jnp.zeros((x.shape[0], columns, TILE_RANKS), jnp.float32)
    counts = _of_segments(ends[:, -1], seg_adapter)
    y = _for_each_item(len(x), seg_start, seg_adapter, counts, body, y)
    return y.reshape(x.shape[0], columns * TILE_RANKS)


def expand(
    out: Float[Array, "T c"],
    y: Float[Array, "T R"],
    pages: Float[Array, "L P E"],
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    geometry: Geometry,
) -> Float[Array, "T c"]:
    """See lora_expand. A unit of work is one granule of a module by a run of its output's tiles, as long as divides the
    outputs of all modules of the group: their tiles of B, which lie one after another, are then so many units.
    """
    modules = GROUPS[group]
    out_tiles = [geometry.out_tiles(m) for m in modules]
    width = math.gcd(*out_tiles)
    per_granule = jnp.array(out_tiles, jnp.int32) // width
    y = y.reshape(y.shape[0], -1, TILE_RANKS)
    granules = table.granules[:, layer]
    first_tile = table.tile_start[:, layer] + section_starts(granules, geometry)[1][modules[0]]
    granules = granules[:, jnp.array(modules)]
    units = granules * per_granule
    # of each module: its first unit, its first granule, and how many units of the output come before it
    before = jnp.stack([jnp.cumsum(n, axis=1) - n for n in (units, granules)], axis=2)
    left = jnp.cumsum(per_granule) - per_granule

    def body(delta, rows, adapter, unit):
        tiles = (first_tile[adapter] + unit * width)[:, None] + jnp.arange(width, dtype=jnp.int32)
        b = gather_tiles(pages, table, adapter, tiles, geometry)
        module = jnp.sum(unit[:, None] >= before[adapter, 1:, 0], axis=1)
        first_unit, first_granule = before[adapter, module].T
        granule, column = jnp.divmod(unit - first_unit, per_granule[module])
        part = jnp.einsum(
            "ntr,ncrj->ntcj",
            y.at[rows, (first_granule + granule)[:, None]].get(mode="fill", fill_value=0),
            b.astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        at = (rows, (left[module] + column)[:, None])
        return delta.at[at].add(part.reshape(*rows.shape, -1), mode="drop")

    delta = jnp.zeros((out.shape[0], sum(out_tiles) // width, width * TILE_COLS), jnp.float32)
    counts = _of_segments(units.sum(axis=1), seg_adapter)
    delta = _for_each_item(len(out), seg_start, seg_adapter, counts, body, delta).reshape(out.shape[0], -1)
    starts = [sum(out_tiles[:i]) * TILE_COLS for i in range(len(modules))]
    parts = [delta[:, at : at + geometry.out_sizes[m]] for at, m in zip(starts, modules, strict=True)]
    return (out.astype(jnp.float32) + jnp.concatenate(parts, axis=1)).astype(out.dtype)
