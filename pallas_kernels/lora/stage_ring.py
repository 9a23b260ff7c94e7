"""What the rings in shared memory of the kernels for large steps have in common. A slot holds 64 columns of a tile's
activations, or of y, and beside them as many rows of weights: base weights, or an adapter's B as chunks of its pages,
or A of four entries, see TileShrinks, granule by granule, or sums of some ranks of a token block.
"""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import expect, start_copy
from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_CHUNKS, STAGE_ROWS, SWIZZLED, ChunkSource
from pallas_kernels.lora.short_ring import WARP_CHUNKS, WARPS
from pallas_kernels.lora.tile_shrinks import PASS
from pallas_kernels.lora.windows import TILE, WINDOW

STAGES = 4
PIECE = 16
"""Ranks of a stage of sums."""
_MOST_SPLITS = 8
TILE_BYTES = 2 * TILE_RANKS * TILE_COLS
BASE_COPIES = 3
"""That each warp may start for a stage of base weights: activations, and weights to two places."""
_MOST_COPIES = 1 + STAGE_CHUNKS
"""That each warp may start for a stage: activations, and A's granules of an entry."""


def arrivals(source: ChunkSource) -> int:
    """Arrivals of a slot's barrier: one a warp, but interpreted copies arrive one by one."""
    assert WARP_CHUNKS * source.chunk <= STAGE_CHUNKS
    return WARPS if source.whole else WARPS * _MOST_COPIES


def shrink_types(dtype, *, whole: bool) -> tuple:
    """Scratch types of what shrink has in the slots: sums, A as wgmma reads it, and, unless it is the same, as granules
    are copied.
    """
    types = (
        plgpu.SMEM((STAGES, _MOST_SPLITS, WINDOW, PIECE), jnp.float32),
        plgpu.SMEM((STAGES * PASS * STAGE_ROWS, TILE_COLS), dtype, transforms=OPERAND),
        plgpu.SMEM((STAGES * PASS * STAGE_CHUNKS, 1, TILE_RANKS, TILE_COLS), dtype, transforms=SWIZZLED),
    )
    return types if whole else types[:2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRing:
    """rows: the slots' activations. operand, chunks: views of their weights, as wgmma reads and as chunks are copied.
    a_operand, a_chunks: likewise of A. sums: views of them as float32 [splits, 64, PIECE]. full, empty: their barriers.
    """

    source: ChunkSource
    rows: Any
    operand: Any
    chunks: Any
    a_operand: Any
    a_chunks: Any
    sums: Any
    full: Any
    empty: Any

    @property
    def tile_units(self) -> int:
        """Bytes of x, or of y, in a stage, as so many chunks."""
        return TILE * STAGE_ROWS // (TILE_RANKS * self.source.chunk * TILE_COLS)

    def claim(self, issued, units):
        """The slot of the `issued`-th stage, as soon as it is empty. units: as many bytes as so many chunks come to it
        from this warp.
        """
        return self.claim_bytes(issued, units * (self.source.chunk * TILE_BYTES))

    def claim_bytes(self, issued, num_bytes):
        slot = lax.rem(issued, jnp.int32(STAGES))

        @pl.when(issued >= STAGES)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        if self.source.whole:
            expect(self.full.at[slot], num_bytes)
        return slot

    def copy(self, source_ref, target, slot, predicate):
        """Starts a copy to a part of a slot that was claimed."""
        if self.source.whole:
            start_copy(source_ref, target, self.full.at[slot], predicate)
        else:
            self.source.copy_if(predicate, source_ref, target, self.full.at[slot])

    def arrive_for_missing(self, slot, copies: int):
        """Of a stage for which each warp starts so many: in interpret mode the barrier counts the most of any stage."""
        if not self.source.whole:
            for _ in range(_MOST_COPIES - copies):
                plgpu.barrier_arrive(self.full.at[slot])

    def a_row(self, slot, entry, s):
        """Row of `a_chunks` for the granule in place s of an entry."""
        return (slot * PASS + entry) * STAGE_CHUNKS + s

    def a(self, slot, entry):
        """A of an entry in a slot, [64 ranks, 64]."""
        first = pl.multiple_of((slot * PASS + entry) * STAGE_ROWS, STAGE_ROWS)
        return self.a_operand.at[pl.ds(first, STAGE_ROWS)]

    def chunk(self, slot, s):
        """Row of `chunks` for the chunk in place s of a stage of B."""
        raise NotImplementedError
