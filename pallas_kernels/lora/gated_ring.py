"""The ring in shared memory of the kernel for gate and up with their deltas.

A slot holds 64 columns of a tile's activations, or of y, and beside them as many rows of weights: base weights of gate
and of up, or an adapter's B of one of them as chunks of its pages.
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
from pallas_kernels.lora.short_ring import WARP_CHUNKS, WARPS
from pallas_kernels.lora.windows import TILE

CHUNK = 2
"""Tiles of weights that a bulk copy of B moves: a product's tile has as many of gate, and as many of up."""
COLUMNS = CHUNK * TILE_COLS
MATRICES = 2
STAGES = 4
TILE_UNITS = TILE * STAGE_ROWS // (TILE_RANKS * COLUMNS)
"""Bytes of x, or of y, in a stage, as so many chunks."""


def weights_type(source: ChunkSource, dtype):
    """Scratch type: gate's and up's weights of a slot, one after the other, as wgmma reads them, and chunks of B as
    they are copied, over the same bytes.
    """
    operand = plgpu.SMEM((STAGES * MATRICES * STAGE_ROWS, COLUMNS), dtype, transforms=OPERAND)
    if not source.whole:
        return operand
    chunks = (STAGES * MATRICES * STAGE_CHUNKS, CHUNK, TILE_RANKS, TILE_COLS)
    return plgpu.RefUnion(operand, plgpu.SMEM(chunks, dtype, transforms=SWIZZLED))


def arrivals(source: ChunkSource) -> int:
    """Arrivals of a slot's barrier: one a warp, but interpreted copies arrive one by one, those of y and B."""
    return WARPS if source.whole else WARPS * (1 + WARP_CHUNKS * CHUNK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedRing:
    """rows: the slots' activations. operand, chunks: views of their weights. full, empty: their barriers."""

    source: ChunkSource
    rows: Any
    operand: Any
    chunks: Any
    full: Any
    empty: Any

    @classmethod
    def of(cls, source: ChunkSource, rows, weights, full, empty) -> "GatedRing":
        operand, chunks = weights if source.whole else (weights, weights)
        return cls(source=source, rows=rows, operand=operand, chunks=chunks, full=full, empty=empty)

    def claim(self, issued, units):
        """The slot of the `issued`-th stage, as soon as it is empty. units: as many bytes as so many chunks come to it
        from this warp.
        """
        slot = lax.rem(issued, jnp.int32(STAGES))

        @pl.when(issued >= STAGES)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

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
            for _ in range(arrivals(self.source) // WARPS - 1 - MATRICES):
                plgpu.barrier_arrive(self.full.at[slot])

    def weights(self, slot, matrix: int):
        """A slot's weights of gate (0) or up (1), [64, 128]. B of either is where gate's are."""
        first = (slot * MATRICES + matrix) * STAGE_ROWS
        return self.operand.at[pl.ds(first, STAGE_ROWS)]

    def chunk(self, slot, s):
        """Row of `chunks` for the chunk in place s of a stage of B."""
        return slot * (MATRICES * STAGE_CHUNKS) + s
