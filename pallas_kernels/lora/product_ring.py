"""The ring in shared memory of the kernel for base projections with their deltas.

A slot holds 64 columns of a tile's activations, or of y, and beside them as many rows of weights: base weights of the
tile's outputs, base weights of half of them, or an adapter's B as chunks of its pages.
"""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.bulk_copy import start_copy
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_CHUNKS, STAGE_ROWS, SWIZZLED, ChunkSource
from pallas_kernels.lora.product_tiles import CHUNK, HALVES
from pallas_kernels.lora.short_ring import WARP_CHUNKS, WARPS
from pallas_kernels.lora.windows import TILE

COLUMNS = CHUNK * TILE_COLS
HALF = COLUMNS // HALVES
STAGES = 4
TILE_UNITS = TILE * STAGE_ROWS // (TILE_RANKS * COLUMNS)
"""Bytes of x, or of y, in a stage, as so many chunks."""


def weights_type(source: ChunkSource, dtype):
    """Scratch type: base weights or B of a tile as wgmma reads them, chunks of B as they are copied, and base weights
    of half a tile, over the same bytes.
    """
    operand = plgpu.SMEM((STAGES * STAGE_ROWS, COLUMNS), dtype, transforms=OPERAND)
    if not source.whole:
        return operand
    return plgpu.RefUnion(
        operand,
        plgpu.SMEM((STAGES * STAGE_CHUNKS, CHUNK, TILE_RANKS, TILE_COLS), dtype, transforms=SWIZZLED),
        plgpu.SMEM((HALVES * STAGES * STAGE_ROWS, HALF), dtype, transforms=OPERAND),
    )


def arrivals(source: ChunkSource) -> int:
    """Arrivals of a slot's barrier: one a warp, but interpreted copies arrive one by one, those of y and B."""
    return WARPS if source.whole else WARPS * (1 + WARP_CHUNKS * CHUNK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductRing:
    """rows: the slots' activations. operand, chunks, halves: views of their weights. full, empty: their barriers."""

    source: ChunkSource
    rows: Any
    operand: Any
    chunks: Any
    halves: Any
    full: Any
    empty: Any

    @classmethod
    def of(cls, source: ChunkSource, rows, weights, full, empty) -> "ProductRing":
        operand, chunks, halves = weights if source.whole else (weights, weights, weights)
        return cls(source=source, rows=rows, operand=operand, chunks=chunks, halves=halves, full=full, empty=empty)

    def claim(self, issued, units):
        """The slot of the `issued`-th stage, as soon as it is empty. units: as many bytes as so many chunks come to it
        from this warp.
        """
        slot = lax.rem(issued, jnp.int32(STAGES))

        @pl.when(issued >= STAGES)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        if self.source.whole:
            self.source.expect(self.full.at[slot], units)
        return slot

    def copy(self, source_ref, target, slot, predicate):
        """Starts a copy to a part of a slot that was claimed."""
        if self.source.whole:
            start_copy(source_ref, target, self.full.at[slot], predicate)
        else:
            self.source.copy_if(predicate, source_ref, target, self.full.at[slot])

    def arrive_for_missing(self, slot):
        """Of a stage of base weights, of three copies: in interpret mode the barrier counts those of B."""
        if not self.source.whole:
            for _ in range(arrivals(self.source) // WARPS - 3):
                plgpu.barrier_arrive(self.full.at[slot])

    def weights(self, slot):
        """A slot's weights, [64, COLUMNS]."""
        return self.operand.at[_rows(slot)]

    def half_weights(self, slot):
        """Where a slot has base weights of half a tile, [64, HALF]."""
        if not self.source.whole:
            return self.halves.at[_rows(slot), pl.ds(0, HALF)]
        return self.halves.at[pl.ds(slot * (HALVES * STAGE_ROWS), STAGE_ROWS)]

    def columns(self, half):
        """Of a slot: one half of its weights, [64, HALF]."""
        first = half * HALF
        columns = pl.ds(first if isinstance(half, int) else pl.multiple_of(first, HALF), HALF)
        return lambda slot: self.operand.at[_rows(slot), columns]


def _rows(slot):
    return pl.ds(slot * STAGE_ROWS, STAGE_ROWS)
