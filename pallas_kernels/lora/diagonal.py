"""The blocks of the diagonal of a product in which several splits share a stage: one split's partial sums each."""

from jax import numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_RANKS
from pallas_kernels.lora.lanes import WARP_ROWS, Lane, i32, less, scalars

ROW_BYTES = 4 * TILE_RANKS
_utils = mgpu.utils


def each_pair(total, height, granules, places, first, stride: int, store):
    """Calls ``store(byte offset, pair)`` for every two values of a thread that a split needs, inside inline_mgpu.

    total: fragmented [64, 8 n] in the WGMMA layout; block i of its diagonal, 8 height rows of a split each, belongs at
    offset (first + i) stride, a row of eight float32 each. height, granules, places, first: int32 scalars; places:
    blocks in use.
    """
    lane = Lane.here()
    granule = arith.muli(lane.warp, i32(WARP_ROWS // TILE_RANKS))
    place = arith.divui(granule, height)
    granule = arith.subi(granule, arith.muli(place, height))
    row = arith.addi(arith.muli(granule, i32(TILE_RANKS)), arith.divui(lane.lane, i32(4)))
    offset = arith.addi(
        arith.addi(arith.muli(arith.addi(first, place), i32(stride)), arith.muli(row, i32(ROW_BYTES))),
        arith.muli(lane.column, i32(4)),
    )
    blocks = total.registers.reshape(-1, 2)
    with _utils.when(arith.andi(less(granule, granules), less(place, places))):
        for h in range(2):
            pair = blocks[0, h]
            for i in range(1, len(blocks)):
                chosen = arith.cmpi(arith.CmpIPredicate.eq, place, i32(i))
                pair = arith.select(chosen, blocks[i, h], pair)
            store(arith.addi(offset, i32(h * TILE_RANKS * ROW_BYTES)), pair)


def store_diagonal(total, item, number, y, *, interpret: bool) -> None:
    """Stores the partial sums of a set's splits. total: float32 [64, 8 n]. item: a ShrinkItem, number: of the set. y:
    float32 [splits, rows, 8] in global memory, from the item's first rank on.
    """
    offset = number * item.packed
    first, places = item.first_split + offset, item.num_splits - offset
    if interpret:
        for i in range(total.shape[1] // TILE_RANKS):
            block = total[:, i * TILE_RANKS : (i + 1) * TILE_RANKS]

            @pl.when((i < item.packed) & (i < places))
            def _(i=i, block=block):
                y[first + i] = jnp.roll(block, -i * item.height * TILE_RANKS, axis=0)

        return

    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, splat, splat, splat, splat, plgpu.RefType()))
    def run(ctx, total, height, granules, places, first, y):
        del ctx
        base, byte = _utils.memref_ptr(y), ir.IntegerType.get_signless(8)
        strides, _ = ir.MemRefType(y.type).get_strides_and_offset()

        def store(offset, pair):
            llvm.store(pair, _utils.getelementptr(base, [offset], byte))

        height, granules, places, first = scalars(height, granules, places, first)
        each_pair(total, height, granules, places, first, 4 * strides[0], store)

    run(total, item.height, item.granules, places, first, y)
