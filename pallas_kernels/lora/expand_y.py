"""What stands between shrink and expand: y as the operand of expand's products, prepared one item ahead of them."""

import functools

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_RANKS
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.mosaic_common import STAGE_ROWS, drain, for_items

_WGMMA = plgpu.Layout.WGMMA
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def prepare_y(
    items: ExpandItems,
    num_items,
    describe,
    y_ref,
    scaling,
    shifted,
    y_smem,
    full,
    empty,
    *,
    rank_tiles: int,
    by_rows: bool,
):
    """The role of one warpgroup: for every item sums y's splits in order, scales, and lays y out as wgmma's B operand,
    a tile for each 64 ranks or packed chunk.

    shifted: shared memory [rows, tokens]; y_smem: two buffers of tiles, handed over by the barriers full and empty.
    """
    zero = jnp.int32(0)
    shape = (STAGE_ROWS, shifted.shape[1])
    shift_rows = shifted.shape[0] - STAGE_ROWS
    row_index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_WGMMA)
    shifted[:STAGE_ROWS] = plgpu.layout_cast(jnp.zeros(shape, shifted.dtype), _WGMMA)
    plgpu.commit_smem()

    def load_parts(item: ExpandItem, rank_tile):
        window = pl.ds(item.y_row + rank_tile * STAGE_ROWS, STAGE_ROWS)
        parts = (y_ref.at[item.block, s, window] for s in range(y_ref.shape[1]))
        return [plgpu.load(part, layout=_WGMMA, optimized=False) for part in parts]

    def lay_out(item: ExpandItem, buffer, rank_tile, parts):
        """Writes the tiles of y of 64 ranks: one, or one for each packed chunk."""
        scale = scaling[item.block, items.layer, item.module]
        total = functools.reduce(jnp.add, parts or load_parts(item, rank_tile))
        live = row_index < item.granules * TILE_RANKS - rank_tile * STAGE_ROWS
        total = jnp.where(live, total * scale, 0.0)
        shifted[pl.ds(shift_rows, STAGE_ROWS)] = total.astype(shifted.dtype)
        plgpu.commit_smem()

        def tile_body(i, _):
            shift = i * item.height * TILE_RANKS
            tile = plgpu.load(shifted.at[pl.ds(shift_rows - shift, STAGE_ROWS)], layout=_WGMMA)
            tile = plgpu.layout_cast(tile, _TRANSPOSED)
            if by_rows:
                row = pl.multiple_of(i * TILE_RANKS, TILE_RANKS)
                y_smem.at[buffer, rank_tile, pl.ds(row, TILE_RANKS)].T[...] = tile
            else:
                y_smem.at[buffer, rank_tile + i].T[...] = tile
            return ()

        lax.fori_loop(0, item.packed, tile_body, ())
        plgpu.commit_smem()  # before `shifted` is written again

    def item_body(item: ExpandItem, following: ExpandItem, carry):
        prepared, parts = carry
        buffer = lax.rem(prepared, 2)
        # on their way while this item is laid out, where the registers can hold them
        next_parts = load_parts(following, 0) if by_rows else []

        @pl.when(item.length > 0)
        def _():
            @pl.when(prepared >= 2)
            def _():
                plgpu.barrier_wait(empty.at[buffer])

            lay_out(item, buffer, 0, parts)

            def rank_body(rank_tile, _):
                lay_out(item, buffer, rank_tile, [])
                return ()

            if rank_tiles > 1:
                lax.fori_loop(1, item.rank_tiles, rank_body, ())
            plgpu.barrier_arrive(full.at[buffer])

        return prepared + jnp.where(item.length > 0, 1, 0), next_parts

    first_parts = load_parts(describe(zero), 0) if by_rows else []
    prepared, _ = for_items(num_items, describe, item_body, (zero, first_parts))
    drain(empty, prepared, 2)
