"""The warpgroup that fills the ring of the kernel for few adapters. One warp copies what any step has, and does not
wait to know about adapters; the others copy these.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.bulk_copy import expect, start_copy
from pallas_kernels.lora.config import FEW_TOKENS
from pallas_kernels.lora.few_plan import GRANULES
from pallas_kernels.lora.few_ring import ADAPTER_WARPS, TOKEN_PARTS, WARP_GRANULES, FewRing, delta_stages
from pallas_kernels.lora.few_stripes import PairStripes
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS

_TILE_BYTES = 2 * TILE_RANKS * TILE_COLS


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewLoad:
    """Of one warp. x, w, pool, a_tiles, b_tiles, ranks: in global memory, see FewPlan. x_ring, w_ring, w_tiles, a_ring,
    known: what copies write. full: by warpgroup that multiplies, barriers of its stages. empty: barriers of all.
    has_known: the barrier for `known`.

    first, count: stages of the input that this thread block takes. granules: of the adapters. stripes: of the outputs.
    """

    ring: FewRing
    warp: Any
    x: Any
    w: Any
    pool: Any
    a_tiles: Any
    b_tiles: Any
    ranks: Any
    x_ring: Any
    w_ring: Any
    w_tiles: Any
    a_ring: Any
    known: Any
    full: tuple
    empty: Any
    has_known: Any
    layer: Any
    tokens: Any
    first: Any
    count: Any
    granules: Any
    stripes: PairStripes

    def run(self) -> None:
        """Loads all stages, and waits until they have been read."""
        pl.when(self.warp == 0)(lambda: self._passes(self._base_pass))

        @pl.when(self.warp > 0)
        def _():
            # A pair without stripes waits for nothing, and so must not ask for anything.
            @pl.when((self.warp == 1) & (self.stripes.pass_of(0)[1] > 0))
            def _():
                if self.ring.tiles.whole:
                    expect(self.has_known, 4 * self.known.size)
                self._copy(self.ranks.at[self.layer, self.stripes.module], self.known, self.has_known, jnp.bool_(True))

            self._passes(self._adapter_pass)

    def _passes(self, load: Callable) -> None:
        """``load(number, first stripe, stripes, barriers, stages before)`` for each pass."""
        each = self.count + delta_stages(self.granules)
        issued = jnp.int32(0)
        for number in range(self.stripes.stripes.passes):
            begin, count = self.stripes.pass_of(number)

            @pl.when(count > 0)
            def _(number=number, begin=begin, count=count):
                load(number, begin, count, self.full[number % len(self.full)], number * each)

            issued += jnp.where(count > 0, each, 0)
        slots = self.ring.slots(self.granules)

        @pl.loop(jnp.maximum(issued - slots, 0), issued)
        def _(i):
            plgpu.barrier_wait(self.empty.at[lax.rem(i, slots)])

    def _claim(self, issued, full, num_bytes):
        """The slot of the `issued`-th stage, as soon as it is empty, and its barrier. num_bytes: that this warp will
        copy to it.
        """
        slots = self.ring.slots(self.granules)
        slot = lax.rem(issued, slots)

        @pl.when(issued >= slots)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        return slot, self._announce(full.at[slot], num_bytes)

    def _announce(self, barrier, num_bytes):
        """The barrier of a slot to which this warp will copy so much (in interpret mode copies announce themselves)."""
        if self.ring.tiles.whole:
            expect(barrier, num_bytes)
        return barrier

    def _if(self, wanted, copy: Callable) -> None:
        """``copy(predicate)``, which in interpret mode is called in any case: its copies arrive one by one."""
        if self.ring.tiles.whole:
            pl.when(wanted)(lambda: copy(jnp.bool_(True)))
        else:
            copy(wanted)

    def _copy(self, source, target, barrier, wanted) -> None:
        if self.ring.tiles.whole:
            start_copy(source, target, barrier, wanted)
        else:
            self.ring.tiles.copy_if(wanted, source, target, barrier)

    def _fill(self, barrier, *, is_b: bool) -> None:
        for _ in range(self.ring.missing(is_b=is_b)):
            plgpu.barrier_arrive(barrier)

    def _base_pass(self, number: int, begin, count, full, issued) -> None:
        """Base weights and activations."""
        num_bytes = (lax.div(self.tokens, jnp.int32(TILE_RANKS)) + count * STAGE_CHUNKS) * _TILE_BYTES

        def stage(k, slot, barrier):
            columns = pl.ds((self.first + k) * TILE_COLS, TILE_COLS)
            for i in range(self.ring.width):

                def copy_weights(wanted, i=i):
                    outputs = pl.ds((self.stripes.first + begin + i) * TILE_COLS, TILE_COLS)
                    target = self.w_ring.at[self.ring.weights(slot, i)]
                    self._copy(self.w.at[self.layer, columns, outputs], target, barrier, wanted)

                self._if(i < count, copy_weights)
            self._tokens(slot, columns, barrier)
            self._fill(barrier, is_b=False)

        ahead: Any = 0
        if number == 0:  # how many slots there are in all need not be known yet
            ahead = jnp.minimum(self.ring.least, self.count)
            pl.loop(0, ahead)(lambda k: stage(k, k, self._announce(full.at[k], num_bytes)))
        pl.loop(ahead, self.count)(lambda k: stage(k, *self._claim(issued + k, full, num_bytes)))

        @pl.loop(0, delta_stages(self.granules))
        def _(h):
            _, barrier = self._claim(issued + self.count + h, full, 0)
            self._fill(barrier, is_b=True)

    def _tokens(self, slot, columns, barrier) -> None:
        """Activations: of a step with fewer tokens than fit in up to three copies, which end with the last token."""

        def copy(row, size, wanted):
            target = self.x_ring.at[pl.ds(slot * FEW_TOKENS + row, size)]
            self._copy(self.x.at[pl.ds(row, size), columns], target, barrier, wanted)

        self._if(self.tokens == FEW_TOKENS, lambda wanted: copy(0, FEW_TOKENS, wanted))
        for size in TOKEN_PARTS:
            before = self.tokens & (FEW_TOKENS - 2 * size)
            wanted = (self.tokens < FEW_TOKENS) & (self.tokens & size != 0)
            self._if(wanted, lambda wanted, before=before, size=size: copy(before, size, wanted))

    def _adapter_pass(self, number: int, begin, count, full, issued) -> None:
        """A in the first pass, and B: every third granule. Where A's tiles lie is read one stage ahead; where B's do is
        read before the first stage, and in the first cache when it is needed.
        """
        ring, place = self.ring, self.stripes.place
        mine = [self.warp - 1 + ADAPTER_WARPS * i for i in range(WARP_GRANULES)]
        granules = sum(jnp.where(g < self.granules, 1, 0) for g in mine)

        def a_places(stage):
            return [self.a_tiles[self.layer, place, jnp.minimum(g, GRANULES - 1), self.first + stage] for g in mine]

        def b_places(g):
            stripes = [begin + jnp.minimum(i, count - 1) for i in range(ring.width)]
            return [self.b_tiles[self.layer, place, jnp.minimum(g, GRANULES - 1), stripe] for stripe in stripes]

        least = functools.reduce(jnp.minimum, [place for g in mine for place in b_places(g)])
        # No place is negative, which the compiler does not know: it leaves the reads in.
        issued += jnp.where(least < 0, 1, 0)

        def stage_body(k, indices):
            ahead = a_places(jnp.minimum(k + 1, self.count - 1))
            slot, barrier = self._claim(issued + k, full, granules * _TILE_BYTES)
            for g, index in zip(mine, indices, strict=True):

                def copy_granule(wanted, g=g, index=index):
                    row = slot * delta_stages(self.granules) * STAGE_CHUNKS + jnp.minimum(g, GRANULES - 1)
                    ring.tiles.copy(self.pool, index, self.a_ring, row, barrier, wanted)

                self._if(g < self.granules, copy_granule)
            return ahead

        if number == 0:
            lax.fori_loop(0, self.count, stage_body, a_places(jnp.int32(0)))
        else:

            @pl.loop(0, self.count)
            def _(k):
                _, barrier = self._claim(issued + k, full, 0)
                if not ring.tiles.whole:
                    for _ in mine:
                        plgpu.barrier_arrive(barrier)

        @pl.loop(0, delta_stages(self.granules))
        def _(h):
            rows = [g - h * STAGE_CHUNKS for g in mine]
            wanted = [
                (g < self.granules) & (row >= 0) & (row < STAGE_CHUNKS) for g, row in zip(mine, rows, strict=True)
            ]
            here = sum(jnp.where(w, 1, 0) for w in wanted)
            slot, barrier = self._claim(issued + self.count + h, full, here * count * _TILE_BYTES)
            for g, row, w in zip(mine, rows, wanted, strict=True):
                for i, index in enumerate(b_places(g)):

                    def copy_tile(wanted, i=i, row=row, index=index):
                        to = (slot * ring.width + i) * STAGE_CHUNKS + jnp.clip(row, 0, STAGE_CHUNKS - 1)
                        ring.tiles.copy(self.pool, index, self.w_tiles, to, barrier, wanted)

                    self._if(w & (i < count), copy_tile)
