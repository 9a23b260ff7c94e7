"""What stands between shrink and expand: y as the operand of expand's products, prepared one item ahead of them."""

from collections.abc import Callable
import functools

import jax
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
    fetch,
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
    ready: Callable[[ExpandItem], None] | None = None,
):
    """The role of one warpgroup: for every item sums y's splits in order, scales, and lays y out as wgmma's B operand,
    a tile for each 64 ranks or packed chunk.

    by_rows: in blocks of eight tokens, a tile holds the copies for all packed chunks side by side. ready: waits until
    an item's y is there. shifted: shared memory [rows, tokens]; y_smem: two buffers of tiles, handed over by the
    barriers full and empty.
    """
    zero = jnp.int32(0)
    shape = (STAGE_ROWS, shifted.shape[1])
    shift_rows = shifted.shape[0] - STAGE_ROWS
    packed_limit = y_smem.shape[2] // TILE_RANKS if by_rows else 0
    row_index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_WGMMA)
    shifted[:STAGE_ROWS] = plgpu.layout_cast(jnp.zeros(shape, shifted.dtype), _WGMMA)
    plgpu.commit_smem()

    def load_scale(item: ExpandItem):
        return scaling[item.block, items.layer, item.module]

    def load_parts(item: ExpandItem, rank_tile):
        window = pl.ds(item.y_row + rank_tile * STAGE_ROWS, STAGE_ROWS)
        parts = (y_ref.at[item.block, s, window] for s in range(y_ref.shape[1]))
        return [plgpu.load(part, layout=_WGMMA, optimized=False) for part in parts]

    def lay_out(item: ExpandItem, buffer, rank_tile, scale, parts):
        """Writes the tiles of y of 64 ranks: one, or one for each packed chunk."""
        total = functools.reduce(jnp.add, parts or load_parts(item, rank_tile))
        live = row_index < item.granules * TILE_RANKS - rank_tile * STAGE_ROWS
        total = jnp.where(live, total * scale, 0.0)
        shifted[pl.ds(shift_rows, STAGE_ROWS)] = total.astype(shifted.dtype)
        plgpu.commit_smem()
        if by_rows:
            # All copies, needed or not: side by side they take no longer than one.
            shifts = [jnp.minimum(i * item.height * TILE_RANKS, shift_rows) for i in range(packed_limit)]
            tiles = [plgpu.load(shifted.at[pl.ds(shift_rows - shift, STAGE_ROWS)], layout=_WGMMA) for shift in shifts]
            for i, tile in enumerate(tiles):
                columns = pl.ds(i * TILE_RANKS, TILE_RANKS)
                y_smem.at[buffer, rank_tile, columns].T[...] = plgpu.layout_cast(tile, _TRANSPOSED)
            plgpu.commit_smem()  # before `shifted` is written again
            return

        def tile_body(i, _):
            shift = i * item.height * TILE_RANKS
            tile = plgpu.load(shifted.at[pl.ds(shift_rows - shift, STAGE_ROWS)], layout=_WGMMA)
            y_smem.at[buffer, rank_tile + i].T[...] = plgpu.layout_cast(tile, _TRANSPOSED)
            return ()

        lax.fori_loop(0, item.packed, tile_body, ())
        plgpu.commit_smem()  # before `shifted` is written again

    def parts_of(item: ExpandItem):
        """On their way while another item is laid out, where the registers can hold them."""
        if not by_rows:
            return []
        if ready is not None:
            ready(item)
        return load_parts(item, 0)

    def item_body(item: ExpandItem, following: Callable[[], ExpandItem], carry):
        prepared, scale, parts = carry
        buffer = lax.rem(prepared, 2)
        # Who has to wait for y should not keep back the item that is at hand.
        next_parts = [] if ready is not None else parts_of(following())

        @pl.when(item.length > 0)
        def _():
            @pl.when(prepared >= 2)
            def _():
                plgpu.barrier_wait(empty.at[buffer])

            with jax.named_scope("lay_out_y"):
                lay_out(item, buffer, 0, scale, parts)

            def rank_body(rank_tile, _):
                lay_out(item, buffer, rank_tile, scale, [])
                return ()

            if rank_tiles > 1:
                lax.fori_loop(1, item.rank_tiles, rank_body, ())
            plgpu.barrier_arrive(full.at[buffer])

        if ready is not None:
            next_parts = parts_of(following())
        return prepared + jnp.where(item.length > 0, 1, 0), load_scale(following()), next_parts

    @pl.when(num_items > 0)
    def _():
        first = describe(zero, fetch(zero))
        carry = zero, load_scale(first), parts_of(first)
        prepared, *_ = for_items(num_items, fetch, describe, item_body, carry)
        drain(empty, prepared, 2)
