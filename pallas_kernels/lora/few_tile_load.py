"""The warpgroup that fills the ring of the kernel for few adapters that takes tiles of 128 tokens. One warp copies base
weights, activations and y, two copy A and B, and one waits for y.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS
from pallas_kernels.lora.few_copies import TILE_BYTES, FewCopies
from pallas_kernels.lora.few_items import WindowItems
from pallas_kernels.lora.few_plan import A_TILE, B_TILE
from pallas_kernels.lora.few_ring import A_WARP, B_WARPS, BASE_WARP, WARP_GRANULES
from pallas_kernels.lora.few_stripes import PairStripes
from pallas_kernels.lora.few_tile_ring import WINDOWS, FewTileSlots
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, drain
from pallas_kernels.lora.windows import TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewTileLoad(FewCopies):
    """x, w, ys: in global memory. slots: of the ring. tile: of the tokens. count: stages of the input. stripes: of the
    outputs. windows: the items of each half of the tile's tokens, alike but for where y is. deltas: blocks of ranks.
    has_y: barriers of these, for which the others wait for `await_y`.
    """

    slots: FewTileSlots
    x: Any
    w: Any
    ys: Any
    tile: Any
    count: Any
    stripes: PairStripes
    windows: list[WindowItems]
    deltas: Any
    has_y: Any
    await_y: Callable

    def begin(self) -> None:
        """Loads what shrink needs, after some base weights, and more of these."""
        pl.when(self.warp == BASE_WARP)(lambda: self._begin(self._item_tokens, self._base_stage))
        pl.when(self.warp >= B_WARPS[0])(lambda: self._begin(self._a, self._nothing))

    def finish(self) -> None:
        """Loads all other stages, and waits until they have been read."""
        pl.when(self.warp == BASE_WARP)(lambda: self._finish(self._base_stage, lambda: self._ys))
        pl.when((self.warp == A_WARP) & (self.stripes.passes[0][1] > 0))(self.await_y)
        pl.when(self.warp >= B_WARPS[0])(lambda: self._finish(self._nothing, self._b))

    @property
    def _halfway(self):
        return lax.div(self.count, jnp.int32(2))

    def _begin(self, load_item: Callable, load_base: Callable) -> None:
        """Each is called with the number of stages before."""
        (begin, stripe_count), *_ = self.stripes.passes
        ahead, end = (jnp.where(stripe_count > 0, n, 0) for n in (self.ring.ahead(self.count), self._halfway))
        width = self.ring.width
        pl.loop(0, ahead)(lambda k: load_base(k, begin, width, k))
        issued = lax.fori_loop(0, self.windows[0].count, load_item, ahead)
        pl.loop(ahead, end)(lambda k: load_base(k, begin, width, issued - ahead + k))

    def _finish(self, load_base: Callable, deltas: Callable) -> None:
        """deltas: what loads these; called before base weights, so that it can read where B lies."""
        issued = self.windows[0].all_stages(self.count)
        for number, (begin, stripe_count) in enumerate(self.stripes.passes):
            for width in self.ring.widths(number):

                @pl.when(self.ring.takes(number, stripe_count, width))
                def _(number=number, begin=begin, stripe_count=stripe_count, width=width, issued=issued):
                    first, load_deltas = jnp.int32(0) if number else self._halfway, deltas()
                    pl.loop(first, self.count)(lambda k: load_base(k, begin, width, issued + k))
                    load_deltas(number, begin, stripe_count, width, issued + self.count)

            issued += jnp.where(stripe_count > 0, self.count + self.deltas, 0)
        drain(self.empty, issued, self.ring.slots)

    def _item(self, j):
        """The j-th item, its first stage of the input, and how many it has."""
        item = self.windows[0].item(j)
        return item, *self.windows[0].stages(item.share, self.count)

    def _tokens(self, slot, stage, barrier) -> None:
        rows, columns = pl.ds(self.tile * TILE, TILE), pl.ds(stage * TILE_COLS, TILE_COLS)
        self._copy(self.x.at[rows, columns], self.slots.rows.at[slot], barrier, jnp.bool_(True))

    def _item_tokens(self, j, before):
        first, count = self._item(j)[1:]

        @pl.loop(0, count)
        def _(k):
            slot, barrier = self._claim(before + k, self.slots.full, WINDOWS * STAGE_CHUNKS * TILE_BYTES)
            self._tokens(slot, first + k, barrier)
            self._fill(barrier, "item")

        return before + count

    def _a(self, j, before):
        item, first, count = self._item(j)
        span = self.ring.tiles.geometry.in_tiles(self.stripes.modules[0])
        mine = self._mine()
        granules = self._granules(item.module, item.block, A_TILE, mine)
        used = [is_used > 0 for _, _, is_used, *_ in granules]
        num_bytes = sum(jnp.where(u, TILE_BYTES, 0) for u in used)

        @pl.loop(0, count)
        def _(k):
            slot, barrier = self._claim(before + k, self.slots.full, num_bytes)
            for g, granule, wanted in zip(mine, granules, used, strict=True):

                def copy(wanted, g=g, granule=granule):
                    self._copy_tile(granule, first + k, span, *self.slots.a_place(slot, g), barrier, wanted)

                self._if(wanted, copy)

        return before + count

    def _mine(self) -> list:
        """Granules of a block that this warp copies."""
        return [self.warp - B_WARPS[0] + len(B_WARPS) * i for i in range(WARP_GRANULES)]

    def _base_stage(self, k, begin, width: int, issued) -> None:
        """Weights of so many stripes, whether all are needed or not."""
        slot, barrier = self._claim(issued, self.slots.full, (WINDOWS + width) * STAGE_CHUNKS * TILE_BYTES)
        rows = pl.ds(k * STAGE_ROWS, STAGE_ROWS)
        outputs = pl.ds((self.stripes.first + begin) * TILE_COLS, width * TILE_COLS)
        self._copy(self.w.at[self.layer, rows, outputs], self.slots.weights(slot, width), barrier, jnp.bool_(True))
        self._tokens(slot, k, barrier)
        self._fill(barrier, "base")

    def _nothing(self, k, begin, width: int, issued) -> None:
        """For a stage to which this warp copies nothing."""
        del k, begin, width
        _, barrier = self._claim(issued, self.slots.full, 0)
        if not self.ring.tiles.whole:
            for _ in range(WARP_GRANULES):
                plgpu.barrier_arrive(barrier)

    def _ys(self, number: int, begin, stripe_count, width: int, before) -> None:
        del begin, stripe_count, width

        @pl.loop(0, self.deltas)
        def _(block):
            slot, barrier = self._claim(before + block, self.slots.full, WINDOWS * STAGE_CHUNKS * TILE_BYTES)
            if number == 0:
                plgpu.barrier_wait(self.has_y.at[block])
            for window, items in enumerate(self.windows):
                source = self.ys.at[items.y_rows(self.stripes.place, block, items.summands)]
                self._copy(source, self.slots.window(slot, window), barrier, jnp.bool_(True))
            self._fill(barrier, "delta")

    def _b(self) -> Callable:
        """Where its tiles lie is read one block ahead, of the first block now."""

        def fetch(n):
            block = jnp.maximum(jnp.minimum(n, self.deltas - 1), 0)
            return self._granules(self.stripes.module, block, B_TILE, self._mine())

        return functools.partial(self._load_b, fetch, fetch(jnp.int32(0)))

    def _load_b(self, fetch: Callable, first, number: int, begin, stripe_count, width: int, before) -> None:
        del number
        span = max(self.ring.tiles.geometry.out_tiles(m) for m in self.stripes.modules)
        mine = self._mine()

        def block_body(n, granules):
            ahead = fetch(n + 1)
            used = [is_used > 0 for _, _, is_used, *_ in granules]
            num_bytes = sum(jnp.where(u, TILE_BYTES, 0) for u in used) * stripe_count
            slot, barrier = self._claim(before + n, self.slots.full, num_bytes)
            for i in range(width if self.ring.tiles.whole else self.ring.width):
                for g, granule, wanted in zip(mine, granules, used, strict=True):

                    def copy(wanted, i=i, g=g, granule=granule):
                        place = self.slots.b_place(slot, g, i, width)
                        self._copy_tile(granule, begin + i, span, *place, barrier, wanted)

                    self._if(wanted & (i < stripe_count), copy)
            return ahead

        lax.fori_loop(0, self.deltas, block_body, first)
