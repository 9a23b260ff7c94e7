"""The ring in shared memory of the kernel for few adapters.

A slot holds 64 columns of all tokens' activations, as many rows of the base weights of each stripe of outputs, and as
many columns of all A. After the last columns, stages with 64 ranks of B instead of base weights. A is read once: when a
pair goes through the input again it has y.
"""

import dataclasses
from typing import Any

from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, ceil_div
from pallas_kernels.lora.config import FEW_TOKENS, MOST_FEW
from pallas_kernels.lora.few_plan import GRANULES
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_CHUNKS, STAGE_ROWS, ChunkSource
from pallas_kernels.lora.short_ring import WARPS

HALVES = MOST_FEW // STAGE_ROWS
"""Parts of all ranks."""
TOKEN_PARTS = (32, 16, 8)
"""Tokens of the copies for a step of fewer than FEW_TOKENS."""
ADAPTER_WARPS = WARPS - 1
WARP_GRANULES = ceil_div(GRANULES, ADAPTER_WARPS)
_MOST_SLOTS = 8


def delta_stages(granules):
    """Stages of B of so many granules, and parts of 64 ranks of A. One even if there are none: y is zero then."""
    return jnp.where(granules > STAGE_CHUNKS, HALVES, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRing:
    """Sizes of the ring. most: slots. parts: of A, 64 ranks each, of which a slot has one or two: then there are fewer
    slots. width: stripes. tiles: how tiles of the pool are copied.
    """

    most: int
    parts: int
    width: int
    tiles: ChunkSource

    @classmethod
    def of(cls, width: int, tiles: ChunkSource, shared_bytes: int, stages: int) -> "FewRing":
        """The most slots of which nearly two thirds are left for twice as many ranks. stages: of the input, at least:
        no slot has B before it had base weights, as what B does not fill must be finite.
        """
        part = 2 * TILE_COLS * STAGE_ROWS
        slot = 2 * TILE_COLS * (FEW_TOKENS + width * STAGE_ROWS)
        fitting = [n for n in range(2, _MOST_SLOTS + 1) if (shared_bytes - n * slot) // part // HALVES >= 0.6 * n]
        most = min(fitting[-1], stages)
        # more parts than slots, as every product takes two; twice as many are enough
        return cls(most=most, parts=min((shared_bytes - most * slot) // part, HALVES * most), width=width, tiles=tiles)

    @property
    def least(self) -> int:
        """Slots for adapters of any number of granules."""
        return min(self.most, self.parts // HALVES)

    def slots(self, granules):
        """Slots for adapters of so many granules."""
        return jnp.where(granules > STAGE_CHUNKS, self.least, self.most)

    def types(self, dtype) -> dict[str, Any]:
        """Scratch types of activations, weights and A."""
        return dict(
            x_ring=plgpu.SMEM((self.most * FEW_TOKENS, TILE_COLS), dtype, transforms=OPERAND),
            w_ring=self.tiles.ring(self.most * self.width * STAGE_ROWS, dtype),
            a_ring=self.tiles.ring(self.parts * STAGE_ROWS, dtype),
        )

    def tokens(self, slot):
        """Rows of activations."""
        return pl.ds(slot * FEW_TOKENS, FEW_TOKENS)

    def weights(self, slot, stripe: int):
        """Rows of a stripe's weights."""
        return pl.ds((slot * self.width + stripe) * STAGE_ROWS, STAGE_ROWS)

    def ranks(self, slot, granules, half: int):
        """Rows of A."""
        return pl.ds((slot * delta_stages(granules) + half) * STAGE_ROWS, STAGE_ROWS)

    @staticmethod
    def y(half: int):
        """Rows of A where y lies when all A was read."""
        return pl.ds(half * STAGE_ROWS, STAGE_ROWS)

    @property
    def _copies(self) -> tuple[int, int]:
        """That all warps may start, in a stage with base weights and in one with B."""
        granules = ADAPTER_WARPS * WARP_GRANULES
        return self.width + 1 + len(TOKEN_PARTS) + granules, self.width * granules

    @property
    def arrivals(self) -> int:
        """Arrivals of a slot's barrier: one a warp, but interpreted copies arrive one by one."""
        return WARPS if self.tiles.whole else max(self._copies)

    def missing(self, *, is_b: bool) -> int:
        """Arrivals that a kind of stage needs in interpret mode beside its copies'."""
        return 0 if self.tiles.whole else max(self._copies) - self._copies[is_b]
