"""The warpgroup that fills the rings of the kernel for few adapters. One warp copies base weights, activations and y,
one what shrink needs, the others B.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import expect
from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.config import FEW_TOKENS
from pallas_kernels.lora.few_copies import TILE_BYTES, FewCopies
from pallas_kernels.lora.few_items import FewItems
from pallas_kernels.lora.few_plan import A_TILE, B_TILE
from pallas_kernels.lora.few_ring import A_SLOTS, A_WARP, B_WARPS, BASE_WARP, TOKEN_PARTS, WARP_GRANULES, FewRing
from pallas_kernels.lora.few_stripes import PairStripes
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, drain


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewLoad(FewCopies):
    """x, w, ys: in global memory, see FewItems. slots, slot_tiles: of the large ring, as operands and for copies of
    granules' tiles. full: by warpgroup that multiplies, barriers of its stages. a_slots, a_tiles, a_full, a_empty: of
    the small ring.

    first, count: stages of the input that this thread block takes. a_first, a_count: its half, for shrink.
    stripes: of the outputs. deltas: blocks whose y this thread block multiplies with B. block_of: the n-th of these.
    wait_y: until the y of a block of the pair's module is there, to be called once.
    """

    ring: FewRing
    x: Any
    w: Any
    ys: Any
    slots: Any
    slot_tiles: Any
    full: tuple
    a_slots: Any
    a_tiles: Any
    a_full: Any
    a_empty: Any
    tokens: Any
    first: Any
    count: Any
    a_first: Any
    a_count: Any
    stripes: PairStripes
    items: FewItems
    deltas: Any
    block_of: Callable
    wait_y: Callable

    def run(self) -> None:
        """Loads all stages, and waits until they have been read."""

        pl.when(self.warp == BASE_WARP)(lambda: self._stages(self._base_stage, self._ys))
        pl.when(self.warp == A_WARP)(self._shrink_stages)
        pl.when(self.warp >= B_WARPS[0])(lambda: self._stages(self._nothing, self._b))

    def _stages(self, load_base: Callable, load_deltas: Callable) -> None:
        """Each is called with barriers and with the number of stages before."""
        passes = self.stripes.stripes.passes

        def load(number: int, deltas: bool):
            begin, stripe_count = self.stripes.passes[number]
            before = self.stripes.first_stages(number, self.count, self.deltas)[deltas]
            full = self.full[number % len(self.full)]

            @pl.when(stripe_count > 0)
            def _():
                if deltas:
                    load_deltas(number, begin, stripe_count, full, before)
                else:
                    pl.loop(0, self.count)(lambda k: load_base(k, begin, stripe_count, full, before + k))

        for number in range(passes + 1):
            if number < passes:
                load(number, deltas=False)
            if number:
                load(number - 1, deltas=True)
        drain(self.empty, self.stripes.first_stages(passes, self.count, self.deltas)[1], self.ring.slots)

    def _tokens(self, slots, rows, stage, barrier) -> None:
        """Activations: of a step with fewer tokens than fit in up to three copies, which end with the last token."""
        columns = pl.ds(stage * TILE_COLS, TILE_COLS)

        def copy(row, size, wanted):
            target = slots.at[pl.ds(rows.start + row, size)]
            self._copy(self.x.at[pl.ds(row, size), columns], target, barrier, wanted)

        self._if(self.tokens == FEW_TOKENS, lambda wanted: copy(0, FEW_TOKENS, wanted))
        for size in TOKEN_PARTS:
            before = self.tokens & (FEW_TOKENS - 2 * size)
            wanted = (self.tokens < FEW_TOKENS) & (self.tokens & size != 0)
            self._if(wanted, lambda wanted, before=before, size=size: copy(before, size, wanted))

    @property
    def _token_bytes(self):
        return lax.div(self.tokens, jnp.int32(TILE_RANKS)) * TILE_BYTES

    def _base_stage(self, k, begin, stripe_count, full, issued) -> None:
        """Base weights and activations."""
        num_bytes = self._token_bytes + stripe_count * STAGE_CHUNKS * TILE_BYTES
        slot, barrier = self._claim(issued, full, num_bytes)
        rows = pl.ds((self.first + k) * TILE_COLS, TILE_COLS)
        for i in range(self.ring.width):

            def copy_weights(wanted, i=i):
                outputs = pl.ds((self.stripes.first + begin + i) * TILE_COLS, TILE_COLS)
                target = self.slots.at[self.ring.weights(slot, i)]
                self._copy(self.w.at[self.layer, rows, outputs], target, barrier, wanted, read_once=True)

            self._if(i < stripe_count, copy_weights)
        self._tokens(self.slots, self.ring.tokens(slot), self.first + k, barrier)
        self._fill(barrier, "base")

    def _nothing(self, k, begin, stripe_count, full, issued) -> None:
        """For a stage to which this warp copies nothing."""
        del k, begin, stripe_count
        _, barrier = self._claim(issued, full, 0)
        if not self.ring.tiles.whole:
            for _ in range(WARP_GRANULES):
                plgpu.barrier_arrive(barrier)

    def _ys(self, number: int, begin, stripe_count, full, before) -> None:
        del begin, stripe_count

        @pl.loop(0, self.deltas)
        def _(n):
            slot, barrier = self._claim(before + n, full, STAGE_CHUNKS * TILE_BYTES)
            block = self.block_of(n)
            if number == 0:
                self.wait_y(block)
            source = self.ys.at[self.items.y_rows(self.stripes.place, block, self.items.summands)]
            self._copy(source, self.slots.at[self.ring.tokens(slot)], barrier, jnp.bool_(True))
            self._fill(barrier, "delta")

    def _shrink_stages(self) -> None:
        """Activations and A of the pair's items."""
        span = self.ring.tiles.geometry.in_tiles(self.stripes.modules[0])

        def item_body(j, before):
            item = self.items.item(j)
            first, count = self.items.stages(item.share, self.a_count)
            granules = self._granules(item.module, item.block, A_TILE, list(range(STAGE_CHUNKS)))
            used = [is_used > 0 for _, _, is_used, *_ in granules]
            num_bytes = self._token_bytes + sum(jnp.where(u, TILE_BYTES, 0) for u in used)

            @pl.loop(0, count)
            def _(k):
                slot = lax.rem(before + k, jnp.int32(A_SLOTS))
                pl.when(before + k >= A_SLOTS)(lambda: plgpu.barrier_wait(self.a_empty.at[slot]))
                barrier = self.a_full.at[slot]
                if self.ring.tiles.whole:
                    expect(barrier, num_bytes)
                stage = self.a_first + first + k
                self._tokens(self.a_slots, self.ring.a_tokens(slot), stage, barrier)
                for g, (granule, wanted) in enumerate(zip(granules, used, strict=True)):

                    def copy(wanted, g=g, granule=granule):
                        row = (slot * 2 + 1) * STAGE_CHUNKS + g
                        self._copy_tile(granule, stage, span, self.a_tiles, row, barrier, wanted)

                    self._if(wanted, copy)

            return before + count

        drain(self.a_empty, lax.fori_loop(0, self.items.count, item_body, jnp.int32(0)), A_SLOTS)

    def _b(self, number: int, begin, stripe_count, full, before) -> None:
        """Where its tiles lie is read one block ahead."""
        span = max(self.ring.tiles.geometry.out_tiles(m) for m in self.stripes.modules)
        mine = [self.warp - B_WARPS[0] + len(B_WARPS) * i for i in range(WARP_GRANULES)]

        def fetch(n):
            n = jnp.maximum(jnp.minimum(n, self.deltas - 1), 0)
            return self._granules(self.stripes.module, self.block_of(n), B_TILE, mine)

        def block_body(n, granules):
            ahead = fetch(n + 1)
            used = [is_used > 0 for _, _, is_used, *_ in granules]
            num_bytes = sum(jnp.where(u, TILE_BYTES, 0) for u in used) * stripe_count
            slot, barrier = self._claim(before + n, full, num_bytes)
            for i in range(self.ring.width):
                for g, granule, wanted in zip(mine, granules, used, strict=True):

                    def copy(wanted, i=i, g=g, granule=granule):
                        row = (slot * (1 + self.ring.width) + 1 + i) * STAGE_CHUNKS + g
                        self._copy_tile(granule, begin + i, span, self.slot_tiles, row, barrier, wanted)

                    self._if(wanted & (i < stripe_count), copy)
            return ahead

        lax.fori_loop(0, self.deltas, block_body, fetch(jnp.int32(0)))
