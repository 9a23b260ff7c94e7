"""Gathered LoRA matmuls in plain XLA: the implementation on CPUs and older GPUs, and what the kernels are tested
against.

Work is cut into items of one rank granule and a block of tokens of one segment, and a loop with a dynamic trip count
walks over as many items as the batch really has: true ranks, nothing padded to the largest rank or segment.
"""

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry, ceil_div
from pallas_kernels.lora.table import AdapterTable, gather_tiles, section_starts

_BLOCK_TOKENS = 8
_ITEMS_PER_ITERATION = 16


def _pad_columns(x: Float[Array, "T c"], tiles: int) -> Float[Array, "T c2"]:
    return jnp.pad(x, ((0, 0), (0, tiles * TILE_COLS - x.shape[1])))


def _for_each_item(seg_start, seg_adapter, granules, body, init):
    """Folds ``body(carry, rows, adapter, granule) -> carry`` over all work items, a few at a time.

    granules: int32[S], how many granules each segment has (0 where it has no adapter).
    rows: int32[n, block], token rows of the items, past the last token where a block is not full.
    """
    num_tokens = jnp.iinfo(jnp.int32).max
    lengths = seg_start[1:] - seg_start[:-1]
    counts = -(-lengths // _BLOCK_TOKENS) * granules
    ends = jnp.cumsum(counts)

    def iteration(i, carry):
        item = i * _ITEMS_PER_ITERATION + jnp.arange(_ITEMS_PER_ITERATION, dtype=jnp.int32)
        live = item < ends[-1]
        seg = jnp.minimum(jnp.searchsorted(ends, item, side="right"), len(granules) - 1).astype(jnp.int32)
        within = item - (ends[seg] - counts[seg])
        block, granule = jnp.divmod(within, jnp.maximum(granules[seg], 1))
        rows = (seg_start[seg] + block * _BLOCK_TOKENS)[:, None] + jnp.arange(_BLOCK_TOKENS, dtype=jnp.int32)
        rows = jnp.where(live[:, None] & (rows < seg_start[seg + 1][:, None]), rows, num_tokens)
        return body(carry, rows, jnp.maximum(seg_adapter[seg], 0), jnp.where(live, granule, 0))

    return lax.fori_loop(0, -(-ends[-1] // _ITEMS_PER_ITERATION), iteration, init)


def _segment_granules(table: AdapterTable, seg_adapter, layer, modules) -> Int[Array, "S m"]:
    granules = table.granules[jnp.maximum(seg_adapter, 0), layer][:, jnp.array(modules)]
    return jnp.where(seg_adapter[:, None] >= 0, granules, 0)


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
    counts = _segment_granules(table, seg_adapter, layer, modules).sum(axis=1)
    y = _for_each_item(seg_start, seg_adapter, counts, body, y)
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
    """See lora_expand."""
    modules = GROUPS[group]
    y = y.reshape(y.shape[0], -1, TILE_RANKS)
    granules = table.granules[:, layer]
    b_start = section_starts(granules, geometry)[1]
    counts = _segment_granules(table, seg_adapter, layer, modules)
    deltas = []
    before = jnp.zeros_like(granules[:, 0])
    for i, m in enumerate(modules):
        out_tiles = geometry.out_tiles(m)
        first_tile = table.tile_start[:, layer] + b_start[m]

        def body(delta, rows, adapter, granule, out_tiles=out_tiles, first_tile=first_tile, before=before):
            tiles = (first_tile[adapter] + granule * out_tiles)[:, None] + jnp.arange(out_tiles, dtype=jnp.int32)
            b = gather_tiles(pages, table, adapter, tiles, geometry)
            part = jnp.einsum(
                "ntr,ncrj->ntcj",
                y.at[rows, (before[adapter] + granule)[:, None]].get(mode="fill", fill_value=0),
                b.astype(jnp.float32),
                precision=lax.Precision.HIGHEST,
            )
            return delta.at[rows].add(part.reshape(*rows.shape, -1), mode="drop")

        delta = jnp.zeros((out.shape[0], out_tiles * TILE_COLS), jnp.float32)
        delta = _for_each_item(seg_start, seg_adapter, counts[:, i], body, delta)
        deltas.append(delta[:, : geometry.out_sizes[m]])
        before = before + granules[:, m]
    delta = jnp.concatenate(deltas, axis=1)
    return (out.astype(jnp.float32) + delta).astype(out.dtype)
