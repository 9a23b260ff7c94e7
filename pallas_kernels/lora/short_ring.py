"""The ring in shared memory of the kernel for short segments.

A slot holds eight chunks of weights and, at its side, four blocks of eight tokens: of activations while the kernel
shrinks, of base outputs while it expands. A block is as large as a chunk, so all of it is one array: first the slots'
chunks, then their sides.
"""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import expect
from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.lanes import Lane, i32
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_CHUNKS, STAGE_ROWS, SWIZZLED, ChunkSource
from pallas_kernels.vectors_sm90 import WARPGROUP

SIDE_BLOCKS = 4
WARPS = 4
WARP_CHUNKS = STAGE_CHUNKS // WARPS
"""Each warp of the loading warpgroup copies so many chunks of a stage, and one block of its side."""


def ring_type(source: ChunkSource, stages: int, dtype):
    """Scratch type: what wgmma reads, what chunks are copied to, and rows of base outputs, over the same bytes."""
    units, columns = stages * (STAGE_CHUNKS + SIDE_BLOCKS), source.chunk * TILE_COLS
    operand = plgpu.SMEM((units * TILE_RANKS, columns), dtype, transforms=OPERAND)
    if not source.whole:
        return operand
    return plgpu.RefUnion(
        operand,
        plgpu.SMEM((units, source.chunk, TILE_RANKS, TILE_COLS), dtype, transforms=SWIZZLED),
        plgpu.SMEM((units * TILE_RANKS, columns), dtype),
    )


def full_arrivals(source: ChunkSource, side: int) -> int:
    """Arrivals of a slot's barrier. side: copies to its side, in interpret mode."""
    return WARPS if source.whole else STAGE_CHUNKS * source.chunk + side


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortRing:
    """operand, chunks, rows: the ring's views. full, empty: barriers of the slots. Who waits for `full` must do so for
    every stage that is announced on it.
    """

    source: ChunkSource
    stages: int
    operand: Any
    chunks: Any
    rows: Any
    full: Any
    empty: Any

    @classmethod
    def of(cls, source: ChunkSource, stages: int, ring, full, empty) -> "ShortRing":
        operand, chunks, rows = ring if source.whole else (ring, ring, ring)
        return cls(source=source, stages=stages, operand=operand, chunks=chunks, rows=rows, full=full, empty=empty)

    @property
    def unit_bytes(self) -> int:
        return 2 * TILE_RANKS * self.source.chunk * TILE_COLS

    def _unit(self, slot, block):
        return self.stages * STAGE_CHUNKS + slot * SIDE_BLOCKS + block

    def side_row(self, slot, block):
        """First row of a block at a slot's side."""
        return self._unit(slot, block) * TILE_RANKS

    def side_block(self, slot, block):
        """A block at a slot's side as `copy_tokens` takes it."""
        if self.source.whole:
            return self.chunks.at[pl.ds(self._unit(slot, block), 1)]
        return self.operand.at[pl.ds(self.side_row(slot, block), TILE_RANKS)]

    def clear_side(self, slot, block):
        """Of the multiplying warpgroup: zeros in a block at a slot's side."""
        rows = pl.ds(pl.multiple_of(self.side_row(slot, block), TILE_RANKS), TILE_RANKS)
        target = self.operand.at[rows]
        if self.source.whole:
            _clear(target, self.unit_bytes // WARPGROUP)
        else:
            target[...] = jnp.zeros(target.shape, target.dtype)
        plgpu.commit_smem()

    def weights(self, slot):
        """A slot's chunks as an operand, [64, columns]."""
        return self.operand.at[pl.ds(pl.multiple_of(slot * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)]

    def sides(self, slot):
        """All blocks at a slot's side as an operand, [32, columns]."""
        rows = SIDE_BLOCKS * TILE_RANKS
        return self.operand.at[pl.ds(pl.multiple_of(self.side_row(slot, 0), TILE_RANKS), rows)]

    def expect(self, slot, num_bytes):
        """Announces what a warp copies to a slot (in interpret mode every copy announces itself)."""
        if self.source.whole:
            expect(self.full.at[slot], num_bytes)

    def wait_empty(self, issued):
        """Before the `issued`-th stage is loaded."""

        @pl.when(issued >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[lax.rem(issued, jnp.int32(self.stages))])


def _clear(target, thread_bytes: int) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(OPERAND),))
    def run(ctx, target):
        del ctx
        base, zero, thread = mgpu.utils.memref_ptr(target), i32(0), Lane.here().thread
        for i in range(thread_bytes // 4):
            place = arith.addi(thread, i32(i * WARPGROUP))
            llvm.store(zero, mgpu.utils.getelementptr(base, [place], zero.type))

    run(target)


def sync_warpgroup() -> None:
    """Threads of a warpgroup see what each of them wrote to shared memory; bulk copies and wgmma need commit_smem."""

    @plgpu.inline_mgpu()
    def run(ctx):
        del ctx
        mgpu.utils.warpgroup_barrier()

    run()
