"""The ring in shared memory of the kernel for gate and up with their deltas. A slot has base weights of gate and of up,
or an adapter's B of one of them.
"""

import dataclasses

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_CHUNKS, STAGE_ROWS, SWIZZLED, ChunkSource
from pallas_kernels.lora.stage_ring import STAGES, StageRing, shrink_types

CHUNK = 2
"""Tiles of weights that a bulk copy of B moves: a product's tile has as many of gate, and as many of up."""
COLUMNS = CHUNK * TILE_COLS
MATRICES = 2


def weights_type(source: ChunkSource, dtype):
    """Scratch type: gate's and up's weights of a slot, one after the other, as wgmma reads them, chunks of B as they
    are copied, A, and sums, over the same bytes.
    """
    operand = plgpu.SMEM((STAGES * MATRICES * STAGE_ROWS, COLUMNS), dtype, transforms=OPERAND)
    shrink = shrink_types(dtype, whole=source.whole)
    if not source.whole:
        return operand, *shrink
    chunks = (STAGES * MATRICES * STAGE_CHUNKS, CHUNK, TILE_RANKS, TILE_COLS)
    return plgpu.RefUnion(operand, plgpu.SMEM(chunks, dtype, transforms=SWIZZLED), *shrink)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedRing(StageRing):
    @classmethod
    def of(cls, source: ChunkSource, rows, weights, full, empty) -> "GatedRing":
        if not source.whole:
            operand, sums, a = weights
            weights = operand, operand, sums, a, a
        views = dict(zip(("operand", "chunks", "sums", "a_operand", "a_chunks"), weights, strict=True))
        return cls(source=source, rows=rows, **views, full=full, empty=empty)

    def weights(self, slot, matrix: int):
        """A slot's weights of gate (0) or up (1), [64, 128]. B of either is where gate's are."""
        first = (slot * MATRICES + matrix) * STAGE_ROWS
        return self.operand.at[pl.ds(first, STAGE_ROWS)]

    def chunk(self, slot, s):
        return slot * (MATRICES * STAGE_CHUNKS) + s
