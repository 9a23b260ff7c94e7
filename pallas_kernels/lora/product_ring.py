"""The ring in shared memory of the kernel for base projections with their deltas. A slot has base weights of a tile's
outputs, or of half of them, or an adapter's B.
"""

import dataclasses
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_CHUNKS, STAGE_ROWS, SWIZZLED, ChunkSource
from pallas_kernels.lora.product_tiles import CHUNK, HALVES
from pallas_kernels.lora.stage_ring import STAGES, StageRing, shrink_types

COLUMNS = CHUNK * TILE_COLS
HALF = COLUMNS // HALVES


def weights_type(source: ChunkSource, dtype):
    """Scratch type: base weights or B of a tile as wgmma reads them, chunks of B as they are copied, base weights of
    half a tile, A, and sums, over the same bytes.
    """
    operand = plgpu.SMEM((STAGES * STAGE_ROWS, COLUMNS), dtype, transforms=OPERAND)
    shrink = shrink_types(dtype, whole=source.whole)
    if not source.whole:
        return operand, *shrink
    return plgpu.RefUnion(
        operand,
        plgpu.SMEM((STAGES * STAGE_CHUNKS, CHUNK, TILE_RANKS, TILE_COLS), dtype, transforms=SWIZZLED),
        plgpu.SMEM((HALVES * STAGES * STAGE_ROWS, HALF), dtype, transforms=OPERAND),
        *shrink,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductRing(StageRing):
    """halves: view of the weights, where base weights of half a tile are."""

    halves: Any

    @classmethod
    def of(cls, source: ChunkSource, rows, weights, full, empty) -> "ProductRing":
        if not source.whole:
            operand, sums, a = weights
            weights = operand, operand, operand, sums, a, a
        names = "operand", "chunks", "halves", "sums", "a_operand", "a_chunks"
        views = dict(zip(names, weights, strict=True))
        return cls(source=source, rows=rows, **views, full=full, empty=empty)

    def chunk(self, slot, s):
        return slot * STAGE_CHUNKS + s

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
