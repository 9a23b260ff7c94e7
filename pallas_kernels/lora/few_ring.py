"""The ring in shared memory of the kernel for few adapters.

A slot holds tiles of 64 rows and columns: activations of all tokens, and weights of each stripe of outputs. Or all of
them are A, each of a stage that comes later. Or a block's y and its 64 ranks of B: what B does not fill has other
weights or zeros, as it must be finite.
"""

import dataclasses
from typing import Any, Literal

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.geometry import TILE_COLS, ceil_div
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, ChunkSource
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
        slot = 2 * (1 + width) * STAGE_ROWS * TILE_COLS
        return cls(slots=min(shared_bytes // slot, _MOST_SLOTS), width=width, tiles=tiles)

    def types(self, dtype) -> dict[str, Any]:
        """Scratch types."""
        return dict(slots=self.tiles.ring(self.slots * (1 + self.width) * STAGE_ROWS, dtype))

    def rows(self, slot, tile):
        """Rows of a tile."""
        return pl.ds((slot * (1 + self.width) + tile) * STAGE_ROWS, STAGE_ROWS)

    def tokens(self, slot):
        """Rows of activations."""
        return self.rows(slot, 0)

    def weights(self, slot, stripe):
        """Rows of a stripe's weights."""
        return self.rows(slot, 1 + stripe)

    def a_tile(self, k):
        """Where A of the k-th stage of a share lies: in which slot, and which tile of it."""
        slot = lax.div(k, jnp.int32(1 + self.width))
        return slot, k - slot * (1 + self.width)

    @property
    def _copies(self) -> dict[Kind, int]:
        """That all warps may start in a stage of each kind, beside one for each granule: warps that start none for it
        arrive all the same, so that none is left behind.
        """
        tokens, granules = 1 + len(TOKEN_PARTS), ADAPTER_WARPS * WARP_GRANULES
        return dict(base=tokens + self.width, shrink=self.width * granules, delta=1 + (self.width - 1) * granules)

    @property
    def arrivals(self) -> int:
        """Arrivals of a slot's barrier: one a warp, but interpreted copies arrive one by one."""
        return WARPS if self.tiles.whole else ADAPTER_WARPS * WARP_GRANULES + max(self._copies.values())

    def missing(self, kind: Kind) -> int:
        """Arrivals that a kind of stage needs in interpret mode beside its copies'."""
        return 0 if self.tiles.whole else max(self._copies.values()) - self._copies[kind]
