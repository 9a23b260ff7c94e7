"""The rings in shared memory of the kernel for few adapters.

A slot of the large one holds activations of all tokens, 64 columns, and as many rows of the weights of each stripe of
outputs; or a block's y and its 64 ranks of B: what B does not fill has base weights of before, as it must be finite. A
slot of the small one holds activations and as many columns of a block of A, for shrink, which nothing else waits for.
"""

import dataclasses
from typing import Any, Literal

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, ChunkSource

TOKEN_PARTS = (32, 16, 8)
"""Tokens of the copies for a step of fewer than FEW_TOKENS."""
BASE_WARP, A_WARP = 0, 1
B_WARPS = (2, 3)
WARP_GRANULES = STAGE_CHUNKS // len(B_WARPS)
A_SLOTS = 4
_ASKED_BYTES = 96 * 1024
"""In flight at a time. Memory is not read faster with more, and whoever waits for something else waits behind it: with
192 KB a signal took 5 us to reach the other thread blocks.
"""
_LEAST_ASKED = 3
_TILE = 2 * STAGE_ROWS * TILE_COLS

Kind = Literal["item", "base", "delta"]
"""Of a stage; shrink's items have a ring of their own here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRing:
    """Sizes of the rings. slots: of the large one. held: of these, those whose products may go on when the next ones
    begin. width: stripes. tiles: how tiles of the pool are copied.
    """

    slots: int
    held: int
    width: int
    tiles: ChunkSource

    @classmethod
    def of(cls, width: int, tiles: ChunkSource, shared_bytes: int, stages: int) -> "FewRing":
        """Of so many bytes at most. stages: of the input, at least: no slot has B before it had base weights."""
        # Wide stages come so seldom that their products are over before the next: no slot is spent on that.
        slot, held = (1 + width) * _TILE, 1 if width < 3 else 0
        slots = min(max(_ASKED_BYTES // slot, _LEAST_ASKED) + held, (shared_bytes - A_SLOTS * 2 * _TILE) // slot)
        return cls(slots=min(slots, stages), held=held, width=width, tiles=tiles)

    def types(self, dtype) -> dict[str, Any]:
        """Scratch types, but for the barriers of the large ring."""
        return dict(
            slots=self.tiles.ring(self.slots * (1 + self.width) * STAGE_ROWS, dtype),
            a_slots=self.tiles.ring(A_SLOTS * 2 * STAGE_ROWS, dtype),
            a_full=plgpu.Barrier(num_arrivals=self.a_arrivals, num_barriers=A_SLOTS),
            a_empty=plgpu.Barrier(num_barriers=A_SLOTS),
        )

    def tokens(self, slot):
        """Rows of activations or y."""
        return pl.ds(slot * (1 + self.width) * STAGE_ROWS, STAGE_ROWS)

    def weights(self, slot, stripe):
        """Rows of a stripe's weights."""
        return pl.ds((slot * (1 + self.width) + 1 + stripe) * STAGE_ROWS, STAGE_ROWS)

    def a_tokens(self, slot):
        """Of the small ring: rows of activations."""
        return pl.ds(slot * 2 * STAGE_ROWS, STAGE_ROWS)

    def a_weights(self, slot):
        """Of the small ring: rows of A."""
        return pl.ds((slot * 2 + 1) * STAGE_ROWS, STAGE_ROWS)

    @property
    def _copies(self) -> dict[Kind, int]:
        """That all warps may start in a stage of each kind, beside one for each granule: warps that start none for it
        arrive all the same, so that none is left behind.
        """
        return dict(base=1 + len(TOKEN_PARTS) + self.width, delta=1 + (self.width - 1) * STAGE_CHUNKS)

    @property
    def arrivals(self) -> int:
        """Arrivals of a slot's barrier: one a warp, but interpreted copies arrive one by one."""
        return 1 + len(B_WARPS) if self.tiles.whole else STAGE_CHUNKS + max(self._copies.values())

    @property
    def a_arrivals(self) -> int:
        """Of a barrier of the small ring."""
        return 1 if self.tiles.whole else 1 + len(TOKEN_PARTS) + STAGE_CHUNKS

    def missing(self, kind: Kind) -> int:
        """Arrivals that a kind of stage needs in interpret mode beside its copies'."""
        return 0 if self.tiles.whole else max(self._copies.values()) - self._copies[kind]
