"""What stands between shrink and expand: y as the operand of expand's products, prepared one item ahead of them."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_RANKS
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.lanes import Lane, i32, one_of, scalars
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_ROWS, drain, for_items

_WGMMA = plgpu.Layout.WGMMA
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def total_of(granules, rank_tile, scale, parts: list, dtype):
    """Sum of the splits of 64 ranks in order, scaled; zero past the module's own ranks, of which there are `granules`
    times eight.
    """
    total = functools.reduce(jnp.add, parts)
    row = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=_WGMMA)
    live = row < granules * TILE_RANKS - rank_tile * STAGE_ROWS
    return jnp.where(live, total * scale, 0.0).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTiles:
    """Of blocks of eight tokens: a tile [8 n, 64] has y once for each of the n chunks of outputs that share a stage,
    where that chunk's ranks are in the stage, and zero elsewhere.
    """

    y_smem: Any
    interpret: bool

    def lay_out(self, item: ExpandItem, buffer, rank_tile, scale, parts: list) -> None:
        total = total_of(item.granules, rank_tile, scale, parts, self.y_smem.dtype)
        target = self.y_smem.at[buffer, rank_tile]
        copies = target.shape[0] // TILE_RANKS
        # What is rolled around is past the ranks of one chunk and so zero.
        shift = item.height * TILE_RANKS
        if self.interpret:
            for i in range(copies):
                rolled = plgpu.layout_cast(jnp.roll(total, i * shift, axis=0), _TRANSPOSED)
                target.at[pl.ds(i * TILE_RANKS, TILE_RANKS)].T[...] = rolled
        else:
            _scatter_copies(total, shift, target, copies)
        plgpu.commit_smem()


def _scatter_copies(total, shift, target, copies: int) -> None:
    @plgpu.inline_mgpu(arg_types=(_WGMMA, plgpu.Layout.WG_SPLAT, plgpu.RefType(OPERAND)))
    def run(ctx, total, shift, target):
        # Token t of copy i is row t of tile i, 64 ranks of two bytes, whose 16-byte parts are swizzled by the row's
        # number.
        del ctx
        lane, base, (shift,) = Lane.here(), mgpu.utils.memref_ptr(target), scalars(shift)
        for h, pair in enumerate(total.registers.reshape(2)):
            for i in range(copies):
                rank = arith.addi(lane.row, arith.addi(i32(8 * h), arith.muli(shift, i32(i))))
                rank = arith.andi(rank, i32(STAGE_ROWS - 1))
                part, within = arith.divui(rank, i32(8)), arith.remui(rank, i32(8))
                for j in range(2):
                    row = arith.addi(lane.column, i32(j))
                    place = arith.addi(arith.muli(arith.xori(part, row), i32(8)), within)
                    place = arith.addi(place, arith.addi(arith.muli(row, i32(STAGE_ROWS)), i32(512 * i)))
                    value = one_of(pair, j)
                    llvm.store(value, mgpu.utils.getelementptr(base, [place], value.type))

    run(total, shift, target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTiles:
    """Of longer blocks: a tile for each chunk of outputs that shares a stage. shifted: shared memory [rows, tokens]."""

    y_smem: Any
    shifted: Any

    @classmethod
    def start(cls, y_smem, shifted) -> "PackedTiles":
        shape = (STAGE_ROWS, shifted.shape[1])
        shifted[:STAGE_ROWS] = plgpu.layout_cast(jnp.zeros(shape, shifted.dtype), _WGMMA)
        plgpu.commit_smem()
        return cls(y_smem=y_smem, shifted=shifted)

    def lay_out(self, item: ExpandItem, buffer, rank_tile, scale, parts: list) -> None:
        shifted, shift_rows = self.shifted, self.shifted.shape[0] - STAGE_ROWS
        shifted[pl.ds(shift_rows, STAGE_ROWS)] = total_of(item.granules, rank_tile, scale, parts, shifted.dtype)
        plgpu.commit_smem()

        def tile_body(i, _):
            shift = i * item.height * TILE_RANKS
            tile = plgpu.load(shifted.at[pl.ds(shift_rows - shift, STAGE_ROWS)], layout=_WGMMA)
            self.y_smem.at[buffer, rank_tile + i].T[...] = plgpu.layout_cast(tile, _TRANSPOSED)
            return ()

        lax.fori_loop(0, item.packed, tile_body, ())
        plgpu.commit_smem()  # before `shifted` is written again


def prepare_y(items: ExpandItems, num_items, fetch, describe, y_ref, scaling, tiles, full, empty, *, ahead: bool):
    """The role of one warpgroup, where y comes from global memory: lays out every item's, and hands the two buffers
    over by the barriers full and empty. ahead: load an item's y while another one is laid out, if the registers can
    hold it.
    """
    zero, rank_tiles = jnp.int32(0), tiles.y_smem.shape[1]

    def load_scale(item: ExpandItem):
        return scaling[item.block, items.layer, item.module]

    def load_parts(item: ExpandItem, rank_tile):
        window = pl.ds(item.y_row + rank_tile * STAGE_ROWS, STAGE_ROWS)
        parts = (y_ref.at[item.block, s, window] for s in range(y_ref.shape[1]))
        return [plgpu.load(part, layout=_WGMMA, optimized=False) for part in parts]

    def parts_of(item: ExpandItem):
        return load_parts(item, 0) if ahead else []

    def item_body(item: ExpandItem, following: Callable[[], ExpandItem], carry):
        prepared, scale, parts = carry
        buffer = lax.rem(prepared, 2)
        next_parts = parts_of(following())

        @pl.when(item.length > 0)
        def _():
            @pl.when(prepared >= 2)
            def _():
                plgpu.barrier_wait(empty.at[buffer])

            tiles.lay_out(item, buffer, 0, scale, parts or load_parts(item, 0))

            def rank_body(rank_tile, _):
                tiles.lay_out(item, buffer, rank_tile, scale, load_parts(item, rank_tile))
                return ()

            if rank_tiles > 1:
                lax.fori_loop(1, item.rank_tiles, rank_body, ())
            plgpu.barrier_arrive(full.at[buffer])

        return prepared + jnp.where(item.length > 0, 1, 0), load_scale(following()), next_parts

    @pl.when(num_items > 0)
    def _():
        first = describe(zero, fetch(zero))
        carry = zero, load_scale(first), parts_of(first)
        prepared, *_ = for_items(num_items, fetch, describe, item_body, carry)
        drain(empty, prepared, 2)
