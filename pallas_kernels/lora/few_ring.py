"""The ring in shared memory of the kernel for few adapters.

A slot holds 64 columns of all tokens' activations and as many rows of the base weights of each stripe of outputs; or as
many columns of a block of A, to be multiplied with the activations of a slot before; or a block's y and its 64 ranks of
B. What B does not fill has other weights or zeros: it must be finite.
"""

import dataclasses
from typing import Any, Literal

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, ceil_div
from pallas_kernels.lora.config import FEW_TOKENS
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_CHUNKS, STAGE_ROWS, ChunkSource
from pallas_kernels.lora.short_ring import WARPS

TOKEN_PARTS = (32, 16, 8)
"""Tokens of the copies for a step of fewer than FEW_TOKENS."""
ADAPTER_WARPS = WARPS - 1
WARP_GRANULES = ceil_div(STAGE_CHUNKS, ADAPTER_WARPS)
_MOST_SLOTS = 12

Kind = Literal["base", "shrink", "delta"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRing:
    """Sizes of the ring. slots: how many. width: stripes. tiles: how tiles of the pool are copied."""

    slots: int
    width: int
    tiles: ChunkSource

    @classmethod
    def of(cls, width: int, tiles: ChunkSource, shared_bytes: int) -> "FewRing":
        """Of so many bytes at most."""
        slot = 2 * TILE_COLS * (FEW_TOKENS + width * STAGE_ROWS)
        return cls(slots=min(shared_bytes // slot, _MOST_SLOTS), width=width, tiles=tiles)

    def types(self, dtype) -> dict[str, Any]:
        """Scratch types of activations and weights."""
        return dict(
            x_ring=plgpu.SMEM((self.slots * FEW_TOKENS, TILE_COLS), dtype, transforms=OPERAND),
            w_ring=self.tiles.ring(self.slots * self.width * STAGE_ROWS, dtype),
        )

    def tokens(self, slot):
        """Rows of activations."""
        return pl.ds(slot * FEW_TOKENS, FEW_TOKENS)

    def weights(self, slot, stripe: int):
        """Rows of a stripe's weights."""
        return pl.ds((slot * self.width + stripe) * STAGE_ROWS, STAGE_ROWS)

    @property
    def _copies(self) -> dict[Kind, int]:
        """That all warps may start in a stage of each kind, beside one for each granule: warps that start none for it
        arrive all the same, so that none is left behind.
        """
        tokens, granules = 1 + len(TOKEN_PARTS), ADAPTER_WARPS * WARP_GRANULES
        return dict(base=tokens + self.width, shrink=0, delta=1 + (self.width - 1) * granules)

    @property
    def arrivals(self) -> int:
        """Arrivals of a slot's barrier: one a warp, but interpreted copies arrive one by one."""
        return WARPS if self.tiles.whole else ADAPTER_WARPS * WARP_GRANULES + max(self._copies.values())

    def missing(self, kind: Kind) -> int:
        """Arrivals that a kind of stage needs in interpret mode beside its copies'."""
        return 0 if self.tiles.whole else max(self._copies.values()) - self._copies[kind]
