"""What the rings in shared memory of the kernels for large steps have in common. A slot holds 64 columns of a tile's
activations, or of y, and beside them as many rows of weights: base weights, or an adapter's B as chunks of its pages.
"""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import start_copy
from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.mosaic_common import STAGE_ROWS, ChunkSource
from pallas_kernels.lora.short_ring import WARP_CHUNKS, WARPS
from pallas_kernels.lora.windows import TILE

STAGES = 4
_BASE_COPIES = 3
"""That each warp may start for a stage of base weights: activations, and weights to two places."""


def arrivals(source: ChunkSource) -> int:
    """Arrivals of a slot's barrier: one a warp, but interpreted copies arrive one by one, those of y and B."""
    return WARPS if source.whole else WARPS * (1 + WARP_CHUNKS * source.chunk)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRing:
    """rows: the slots' activations. operand, chunks: views of their weights, as wgmma reads and as chunks are copied.
    full, empty: their barriers.
    """

    source: ChunkSource
    rows: Any
    operand: Any
    chunks: Any
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
        """Of a stage of base weights: in interpret mode the barrier counts the copies of B, which are more."""
        if not self.source.whole:
            for _ in range(arrivals(self.source) // WARPS - _BASE_COPIES):
                plgpu.barrier_arrive(self.full.at[slot])

    def chunk(self, slot, s):
        """Row of `chunks` for the chunk in place s of a stage of B."""
        raise NotImplementedError
