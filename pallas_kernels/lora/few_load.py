"""The ring in shared memory of the kernel for few adapters, and the warpgroup that fills it.

A slot holds up to 128 columns of all tokens' activations, as many rows of the base weights of each stripe of outputs,
and as many columns of all A. After the last columns, stages with 64 ranks of B instead of base weights.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.bulk_copy import expect, start_copy
from pallas_kernels.lora.config import FEW_TOKENS, MOST_FEW
from pallas_kernels.lora.few_plan import GRANULES
from pallas_kernels.lora.few_stripes import PairStripes
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_CHUNKS, STAGE_ROWS, ChunkSource, drain
from pallas_kernels.lora.short_ring import WARPS

_TOKEN_PARTS = (32, 16, 8)
"""Copies that a step of fewer than FEW_TOKENS tokens needs for its activations."""
TILE_BYTES = 2 * TILE_RANKS * TILE_COLS
_WARP_GRANULES = GRANULES // WARPS
_WARP_ROWS = STAGE_CHUNKS // WARPS
_TOKEN_WARP = WARPS - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRing:
    """Sizes of the ring: depth: columns of a stage, in tiles. width: stripes. a, b: how A and B are copied."""

    slots: int
    depth: int
    width: int
    a: ChunkSource
    b: ChunkSource

    @staticmethod
    def slot_bytes(depth: int, width: int) -> int:
        return 2 * depth * TILE_COLS * (FEW_TOKENS + width * STAGE_ROWS + MOST_FEW)

    @property
    def columns(self) -> int:
        return self.depth * TILE_COLS

    def types(self, dtype) -> dict[str, Any]:
        """Scratch types of activations, weights and A."""
        return dict(
            x_ring=plgpu.SMEM((self.slots * FEW_TOKENS, self.columns), dtype, transforms=OPERAND),
            w_ring=self.b.ring(self.slots * self.width * self.columns, dtype),
            a_ring=self.a.ring(self.slots * MOST_FEW, dtype),
        )

    def tokens(self, slot):
        """Rows of activations."""
        return pl.ds(slot * FEW_TOKENS, FEW_TOKENS)

    def weights(self, slot, stripe: int, rows: int):
        """The first rows of a stripe's weights."""
        first = (slot * self.width + stripe) * self.columns
        return pl.ds(first, rows)

    def ranks(self, slot, half: int):
        """64 rows of A."""
        return pl.ds(slot * MOST_FEW + half * STAGE_ROWS, STAGE_ROWS)

    @property
    def _copies(self) -> tuple[int, int]:
        """Of a warp, in a stage with base weights and in one with B: all that it may start."""
        base = self.width + 1 + len(_TOKEN_PARTS) + _WARP_GRANULES * self.depth
        return base, self.width * _WARP_ROWS

    @property
    def arrivals(self) -> int:
        """Arrivals of a slot's barrier: one a warp, but interpreted copies arrive one by one."""
        return WARPS * (1 if self.a.whole else max(self._copies))

    def missing(self, *, is_b: bool) -> int:
        """Arrivals of a warp that a kind of stage needs in interpret mode beside its copies'."""
        return 0 if self.a.whole else max(self._copies) - self._copies[is_b]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewLoad:
    """Of one warp. x, w, a_pool, b_pool, a_tiles, b_tiles: in global memory, see FewPlan. x_ring, w_ring, w_tiles,
    a_ring: what copies write. full: by warpgroup that multiplies, barriers of its stages. empty: barriers of all.

    first, count: stages of the input that this thread block takes. granules: of the adapters. stripes: of the outputs.
    """

    ring: FewRing
    warp: Any
    x: Any
    w: Any
    a_pool: Any
    b_pool: Any
    a_tiles: Any
    b_tiles: Any
    x_ring: Any
    w_ring: Any
    w_tiles: Any
    a_ring: Any
    full: tuple
    empty: Any
    layer: Any
    tokens: Any
    first: Any
    count: Any
    granules: Any
    stripes: PairStripes

    def run(self) -> None:
        """Loads all stages, and waits until they have been read."""
        each = self.count + delta_stages(self.granules)
        issued = jnp.int32(0)
        for number in range(self.stripes.stripes.passes):
            begin, count = self.stripes.pass_of(number)
            full = self.full[number % len(self.full)]

            @pl.when(count > 0)
            def _(number=number, begin=begin, count=count, full=full):
                self._base(begin, count, full, number * each)
                self._deltas(begin, count, full, number * each + self.count)

            issued += jnp.where(count > 0, each, 0)
        drain(self.empty, issued, self.ring.slots)

    def _claim(self, issued, full, num_bytes):
        """The slot of the `issued`-th stage, as soon as it is empty. num_bytes: that this warp will copy to it."""
        slot = lax.rem(issued, jnp.int32(self.ring.slots))

        @pl.when(issued >= self.ring.slots)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        if self.ring.a.whole:
            expect(full.at[slot], num_bytes)
        return slot

    def _if(self, wanted, copy: Callable) -> None:
        """``copy(predicate)``, which in interpret mode is called in any case: its copies arrive one by one."""
        if self.ring.a.whole:
            pl.when(wanted)(lambda: copy(jnp.bool_(True)))
        else:
            copy(wanted)

    def _copy(self, source, target, barrier, wanted) -> None:
        if self.ring.a.whole:
            start_copy(source, target, barrier, wanted)
        else:
            self.ring.a.copy_if(wanted, source, target, barrier)

    def _fill(self, barrier, *, is_b: bool) -> None:
        for _ in range(self.ring.missing(is_b=is_b)):
            plgpu.barrier_arrive(barrier)

    def _base(self, begin, count, full, issued) -> None:
        """The stages of the base projection. Where A's tiles lie is read one stage ahead."""
        ring, place, depth = self.ring, self.stripes.place, self.ring.depth
        mine = [self.warp + WARPS * i for i in range(_WARP_GRANULES)]
        tiles = sum(jnp.where(g < self.granules, 1, 0) for g in mine)
        tiles += jnp.where(self.warp < count, STAGE_CHUNKS, 0)
        tiles += jnp.where(self.warp == _TOKEN_WARP, lax.div(self.tokens, jnp.int32(TILE_RANKS)), 0)

        def places(stage):
            return [self.a_tiles[self.layer, place, g, (self.first + stage) * depth] for g in mine]

        def stage_body(k, indices):
            ahead = places(jnp.minimum(k + 1, self.count - 1))
            slot = self._claim(issued + k, full, tiles * (depth * TILE_BYTES))
            barrier = full.at[slot]
            columns = pl.ds((self.first + k) * ring.columns, ring.columns)
            for i in range(ring.width):

                def copy_weights(wanted, i=i):
                    outputs = pl.ds((self.stripes.first + begin + i) * TILE_COLS, TILE_COLS)
                    target = self.w_ring.at[ring.weights(slot, i, ring.columns)]
                    self._copy(self.w.at[self.layer, columns, outputs], target, barrier, wanted)

                self._if((self.warp == i) & (i < count), copy_weights)
            self._tokens(slot, columns, barrier)
            for g, index in zip(mine, indices, strict=True):

                def copy_granule(wanted, g=g, index=index):
                    chunk = lax.div(index, jnp.int32(depth)) if ring.a.whole else index
                    ring.a.copy(self.a_pool, chunk, self.a_ring, slot * GRANULES + g, barrier, wanted)

                self._if(g < self.granules, copy_granule)
            self._fill(barrier, is_b=False)
            return ahead

        lax.fori_loop(0, self.count, stage_body, places(jnp.int32(0)))

    def _tokens(self, slot, columns, barrier) -> None:
        """Activations: of a step with fewer tokens than fit in up to three copies, which end with the last token."""

        def copy(row, size, wanted):
            target = self.x_ring.at[pl.ds(slot * FEW_TOKENS + row, size)]
            self._copy(self.x.at[pl.ds(row, size), columns], target, barrier, wanted)

        mine = self.warp == _TOKEN_WARP
        self._if(mine & (self.tokens == FEW_TOKENS), lambda wanted: copy(0, FEW_TOKENS, wanted))
        for size in _TOKEN_PARTS:
            before = self.tokens & (FEW_TOKENS - 2 * size)
            wanted = mine & (self.tokens < FEW_TOKENS) & (self.tokens & size != 0)
            self._if(wanted, lambda wanted, before=before, size=size: copy(before, size, wanted))

    def _deltas(self, begin, count, full, issued) -> None:
        """The stages of B: a granule's tiles of all stripes, two granules for each warp."""
        ring, place = self.ring, self.stripes.place
        mine = [self.warp * _WARP_ROWS + i for i in range(_WARP_ROWS)]

        @pl.loop(0, delta_stages(self.granules))
        def _(h):
            here = self.granules - h * STAGE_CHUNKS
            rows = sum(jnp.where(row < here, 1, 0) for row in mine)
            indices = [
                [
                    self.b_tiles[self.layer, place, h * STAGE_CHUNKS + row, begin + jnp.minimum(i, count - 1)]
                    for row in mine
                ]
                for i in range(ring.width)
            ]
            slot = self._claim(issued + h, full, rows * count * TILE_BYTES)
            barrier = full.at[slot]
            for i, tiles in enumerate(indices):
                for row, tile in zip(mine, tiles, strict=True):

                    def copy_tile(wanted, i=i, row=row, tile=tile):
                        to = (slot * ring.width + i) * (ring.columns // TILE_RANKS) + row
                        ring.b.copy(self.b_pool, tile, self.w_tiles, to, barrier, wanted)

                    self._if((row < here) & (i < count), copy_tile)
            self._fill(barrier, is_b=True)


def delta_stages(granules):
    """Stages of B that so many granules take."""
    return lax.div(granules + (STAGE_CHUNKS - 1), jnp.int32(STAGE_CHUNKS))
