"""The ring in shared memory of the kernel for few adapters that takes tiles of 128 tokens.

A slot holds 64 columns of a tile's activations and as many rows of base weights; or of a block of 64 ranks y and B, for
the same outputs, where what B does not fill has base weights of before, as it must be finite; or, for shrink,
activations and as many columns of a block of A.
"""

import dataclasses
from typing import Any

from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.few_ring import B_WARPS, WARP_GRANULES, Kind
from pallas_kernels.lora.mosaic_common import OPERAND, SHARED_BYTES, STAGE_CHUNKS, STAGE_ROWS, SWIZZLED, ChunkSource
from pallas_kernels.lora.windows import TILE, WINDOW

WINDOWS = TILE // WINDOW
"""Of a tile: each is a warpgroup's."""
_RESULTS = 2 * TILE * TILE_COLS


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewTileRing:
    """slots: how many. width: stripes of outputs in each. tiles: how tiles of the pool are copied."""

    slots: int
    width: int
    tiles: ChunkSource

    @classmethod
    def of(cls, width: int, tiles: ChunkSource, stages: int) -> "FewTileRing":
        """As many slots as fit beside a stripe of outputs. stages: of the input: no slot has B before it had base
        weights.
        """
        slot = 2 * TILE_COLS * (TILE + width * STAGE_ROWS)
        return cls(slots=min((SHARED_BYTES - _RESULTS) // slot, stages), width=width, tiles=tiles)

    def widths(self, number: int) -> list[int]:
        """Stripes that a thread block takes together in such a pass, the larger first: it need not take all that fit
        in a slot, if it is not the first pass and if those of fewer lie there in whole rows.
        """
        fewer = self.width - 1
        has_rows = fewer and self.width * STAGE_ROWS % (fewer * TILE_RANKS) == 0
        return [self.width, fewer] if number and has_rows else [self.width]

    def takes(self, number: int, stripe_count, width: int):
        """Whether so many stripes are taken so many at a time."""
        widths = self.widths(number)
        least, most = (0 if width == widths[-1] else widths[-1]), width
        return (stripe_count > least) & (stripe_count <= most)

    def types(self, dtype) -> dict[str, Any]:
        """Scratch types. Weights lie as B's tiles are copied, and as wgmma reads those of so many stripes, or A, which
        has one column of tiles.
        """
        rows = self.slots * STAGE_ROWS
        weights: Any = plgpu.SMEM((rows, self.width * TILE_COLS), dtype, transforms=OPERAND)
        if self.tiles.whole:
            tiles = (self.width * rows // TILE_RANKS, 1, TILE_RANKS, TILE_COLS)
            views = [
                plgpu.SMEM((self.width * rows // n, n * TILE_COLS), dtype, transforms=OPERAND) for n in self._views
            ]
            weights = plgpu.RefUnion(plgpu.SMEM(tiles, dtype, transforms=SWIZZLED), *views)
        return dict(
            rows=plgpu.SMEM((self.slots, TILE, TILE_COLS), dtype, transforms=OPERAND),
            weights=weights,
            full=plgpu.Barrier(num_arrivals=self.arrivals, num_barriers=self.slots),
            empty=plgpu.Barrier(num_arrivals=WINDOWS, num_barriers=self.slots),
            results=plgpu.SMEM((WINDOWS, WINDOW, TILE_COLS), dtype, transforms=OPERAND),
        )

    @property
    def _views(self) -> list[int]:
        """Columns of tiles of the views of weights."""
        return sorted({*self.widths(1), 1})

    @property
    def _copies(self) -> dict[Kind, int]:
        """As in FewRing: that all warps may start in a stage of each kind, beside one for each granule."""
        return dict(item=1, base=2, delta=WINDOWS + (self.width - 1) * STAGE_CHUNKS)

    @property
    def arrivals(self) -> int:
        """Of a slot's barrier: one a warp, but interpreted copies arrive one by one."""
        return 1 + len(B_WARPS) if self.tiles.whole else len(B_WARPS) * WARP_GRANULES + max(self._copies.values())

    def ahead(self, stages):
        """Of so many stages of base weights, those before shrink's: they are multiplied while it is read where A lies.
        Enough for all slots come after it.
        """
        return jnp.minimum(self.slots - 1, stages - self.slots)

    def missing(self, kind: Kind) -> int:
        """Arrivals that a kind of stage needs in interpret mode beside its copies'."""
        return 0 if self.tiles.whole else max(self._copies.values()) - self._copies[kind]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewTileSlots:
    """What is in the ring: activations, weights as they are copied tile by tile and by columns of tiles, barriers."""

    ring: FewTileRing
    rows: Any
    chunks: Any
    views: dict[int, Any]
    full: Any
    empty: Any

    @classmethod
    def of(cls, ring: FewTileRing, rows, weights, full, empty) -> "FewTileSlots":
        chunks, *views = weights if ring.tiles.whole else [weights] * (1 + len(ring._views))
        by_width = dict(zip(ring._views, views, strict=True))
        return cls(ring=ring, rows=rows, chunks=chunks, views=by_width, full=full, empty=empty)

    def window(self, slot, window):
        """Activations, or y, of half of the tile's tokens."""
        first = window * WINDOW
        return self.rows.at[slot, pl.ds(first if isinstance(first, int) else pl.multiple_of(first, WINDOW), WINDOW)]

    def weights(self, slot, width: int):
        """Of so many stripes, [64, outputs]."""
        view = self.views[width]
        if not self.ring.tiles.whole:
            return view.at[pl.ds(slot * STAGE_ROWS, STAGE_ROWS), pl.ds(0, width * TILE_COLS)]
        return view.at[pl.ds(slot * (self.ring.width * STAGE_ROWS // width), STAGE_ROWS)]

    def a(self, slot):
        """[64 ranks, 64]."""
        return self.weights(slot, 1)

    def a_place(self, slot, granule) -> tuple[Any, Any]:
        """Where a tile of A is copied to: a view and its row in it, in tiles."""
        return self._place(slot, granule, 0, granule)

    def b_place(self, slot, granule, stripe: int, width: int) -> tuple[Any, Any]:
        """Where a tile of B is, of so many stripes."""
        return self._place(slot, granule, stripe, granule * width + stripe)

    def _place(self, slot, granule, column: int, within) -> tuple[Any, Any]:
        if self.ring.tiles.whole:
            return self.chunks, slot * (self.ring.width * STAGE_CHUNKS) + within
        return self.chunks.at[:, pl.ds(column * TILE_COLS, TILE_COLS)], slot * STAGE_CHUNKS + granule
