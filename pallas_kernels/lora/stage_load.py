"""What the warpgroups that fill the rings of the kernels for large steps have in common.

Each warp copies a part of a stage, because of B the instructions that start ten copies take longer than these.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.mosaic_common import STAGE_ROWS, drain, having_read
from pallas_kernels.lora.plan import PAGE_START, TOKEN
from pallas_kernels.lora.product_tiles import ProductTiles
from pallas_kernels.lora.short_ring import WARP_CHUNKS
from pallas_kernels.lora.stage_ring import STAGES
from pallas_kernels.lora.windows import WINDOW, is_second


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageLoad:
    """warp: whose part this is. x: [T, in], w: [layers, in, out], y: [blocks, 64, modules * most_ranks * 64], zeros
    after the blocks in use. page_ids: of the adapters' B. first_block: of `Tiles`. All in global memory.
    """

    ring: Any
    items: ExpandItems
    order: ProductTiles
    warp: Any
    x: Any
    w: Any
    y: Any
    pool: Any
    page_ids: Any
    first_block: Any
    most_ranks: int

    def run(self) -> None:
        """Loads all stages of this program's tiles, and waits until they have been read."""
        zeros = self.first_block[self.order.tiles]
        body = lambda n, issued: self._tile(n, zeros, issued)  # noqa: E731
        drain(self.ring.empty, lax.fori_loop(0, self.order.count, body, jnp.int32(0)), STAGES)

    def _tile(self, n, zeros, issued):
        """Loads the n-th tile's stages after so many. Returns how many there are then."""
        raise NotImplementedError

    def _base_stages(self, load: Callable, fields: Callable, count):
        """Loads the stages of the base projection, ``load(k)`` each. Returns how many there are.

        fields: what the stages of deltas will need of the tile's k-th record, of which there are `count`. They are read
        beside the first stages, and in the first cache when they are needed.
        """
        steps = self.w.shape[1] // STAGE_ROWS

        def load_and_read(k, least):
            load(k)
            return functools.reduce(jnp.minimum, fields(k), least)

        first = jnp.minimum(count, steps)
        least = lax.fori_loop(0, first, load_and_read, jnp.int32(0))
        pl.loop(first, steps)(load)
        return having_read([least], steps)

    def _deltas(self, item_of: Callable, place, begin, end, zeros, issued):
        """Loads the stages of a module's deltas in a tile: of the blocks from `begin` to `end`, ``item_of(block)``
        each. place: of the module in the group. Returns how many stages there are then.
        """

        def block_body(block, issued):
            here, before, after = (
                [self.items.records[i, self.items.layer, field] for field in (TOKEN, PAGE_START)]
                for i in (block, jnp.maximum(block - 1, begin), jnp.minimum(block + 1, end - 1))
            )
            item = item_of(block)
            count = jnp.where(is_second(before, here) | (item.granules == 0), 0, item.rank_tiles)

            @pl.when(count > 0)
            def _():
                odd = lax.rem(lax.div(here[0], jnp.int32(WINDOW)), jnp.int32(2)) == 1
                other = jnp.where(is_second(here, after), block + 1, zeros)
                first, second = jnp.where(odd, zeros, block), jnp.where(odd, block, other)
                self._pair(item, place, first, second, issued)

            return issued + count

        return lax.fori_loop(begin, end, block_body, issued)

    def _pair(self, item: ExpandItem, place, first, second, issued):
        """Stages of a segment in a tile. first, second: where y of the tile's windows is: the first two warps'."""
        ring, source = self.ring, self.ring.source
        span = self.items.max_span(self.most_ranks)
        pages = source.pages(item.section, span, item.pages, item.page_start, self.page_ids)
        mine = [self.warp * WARP_CHUNKS + i for i in range(WARP_CHUNKS)]
        window, has_window = self.warp & 1, self.warp < 2
        units = WARP_CHUNKS + jnp.where(has_window, ring.tile_units // 2, 0)
        block = jnp.where(window == 0, first, second)

        @pl.loop(0, item.rank_tiles)
        def _(k):
            indices = [source.locate(self.items.chunk_tile(item, s, k, 0), pages) for s in mine]
            slot = ring.claim(issued + k, units)
            ranks = pl.ds((place * self.most_ranks + k) * STAGE_ROWS, STAGE_ROWS)
            target = ring.rows.at[slot, pl.ds(window * WINDOW, WINDOW)]
            ring.copy(self.y.at[block, :, ranks], target, slot, has_window)
            for s, index in zip(mine, indices, strict=True):
                row = ring.chunk(slot, s)
                source.copy(self.pool, index, ring.chunks, row, ring.full.at[slot], jnp.bool_(True))
