"""The warpgroup that fills the ring of the kernel for base projections with their deltas."""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, drain
from pallas_kernels.lora.plan import PAGE_START, TOKEN
from pallas_kernels.lora.product_ring import COLUMNS, HALF, STAGES, ProductRing
from pallas_kernels.lora.product_tiles import CHUNK, HALVES, ProductTiles
from pallas_kernels.lora.windows import TILE, WINDOW, is_second


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductLoad:
    """x: [T, in], w: [layers, in, out], y: [blocks, 64, modules * most_ranks * 64], zeros after the blocks in use.
    page_ids: of the adapters' B. first_block, stages: of `Tiles`. All in global memory.
    """

    ring: ProductRing
    items: ExpandItems
    order: ProductTiles
    x: Any
    w: Any
    y: Any
    pool: Any
    page_ids: Any
    first_block: Any
    stages: Any
    most_ranks: int

    def run(self) -> None:
        """Loads all stages of this program's tiles, and waits until they have been read."""
        zeros = self.first_block[self.order.tiles]
        body = lambda n, issued: self._tile(n, zeros, issued)  # noqa: E731
        drain(self.ring.empty, lax.fori_loop(0, self.order.count, body, jnp.int32(0)), STAGES)

    def _tile(self, n, zeros, issued):
        first_block, layer = self.first_block, self.items.layer
        tile, column, half = self.order.place(n)
        module, place_in_group, width, first_tile = self.order.module_of(column)
        begin, end, length = first_block[tile], first_block[tile + 1], self.stages[tile, layer, module]
        self._base(tile, column, half, issued)

        def block_body(block, issued):
            here, before, after = (
                [self.items.records[i, layer, field] for field in (TOKEN, PAGE_START)]
                for i in (block, jnp.maximum(block - 1, begin), jnp.minimum(block + 1, end - 1))
            )
            chunk = column - lax.div(first_tile, CHUNK)
            fetched = self.items.fetch_of(block, module)
            item = self.items.item(block, module, width, first_tile, chunk, 1, fetched)
            count = jnp.where((item.granules > 0) & ~is_second(before, here), item.rank_tiles, 0)

            @pl.when(count > 0)
            def _():
                odd = lax.rem(lax.div(here[0], jnp.int32(WINDOW)), jnp.int32(2)) == 1
                other = jnp.where(is_second(here, after), block + 1, zeros)
                first, second = jnp.where(odd, zeros, block), jnp.where(odd, block, other)
                self._pair(item, place_in_group, first, second, issued)

            return issued + count

        once = lambda _, issued: lax.fori_loop(begin, end, block_body, issued)  # noqa: E731
        times = jnp.where((length <= STAGES) | (half < HALVES), 1, HALVES)
        return lax.fori_loop(0, times, once, issued + self.w.shape[1] // STAGE_ROWS)

    def _base(self, tile, column, half, issued):
        """The base projection's stages of a tile, or of half of one."""
        ring, whole, layer = self.ring, half == HALVES, self.items.layer

        @pl.loop(0, self.w.shape[1] // STAGE_ROWS)
        def _(k):
            slot = ring.claim(issued + k, jnp.where(whole, STAGE_CHUNKS, STAGE_CHUNKS // HALVES))
            depth = pl.ds(pl.multiple_of(k * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)
            tokens = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
            outputs = pl.ds(pl.multiple_of(column * COLUMNS, COLUMNS), COLUMNS)
            ring.copy(self.x.at[tokens, depth], ring.rows.at[slot], slot, jnp.bool_(True))
            ring.copy(self.w.at[layer, depth, outputs], ring.weights(slot), slot, whole)
            first = column * COLUMNS + jnp.where(whole, 0, half) * HALF
            outputs = pl.ds(pl.multiple_of(first, HALF), HALF)
            ring.copy(self.w.at[layer, depth, outputs], ring.half_weights(slot), slot, ~whole)
            ring.arrive_for_missing(slot)

    def _pair(self, item: ExpandItem, place_in_group, first, second, issued):
        """Stages of a segment in a tile. first, second: where y of the tile's windows is."""
        ring, source = self.ring, self.ring.source
        span = self.items.max_span(self.most_ranks)
        pages = source.pages(item.section, span, item.pages, item.page_start, self.page_ids)

        @pl.loop(0, item.rank_tiles)
        def _(k):
            slot = ring.claim(issued + k)
            ranks = (place_in_group * self.most_ranks + k) * STAGE_ROWS
            ranks = pl.ds(pl.multiple_of(ranks, STAGE_ROWS), STAGE_ROWS)
            for i, which in enumerate((first, second)):
                target = ring.rows.at[slot, pl.ds(i * WINDOW, WINDOW)]
                ring.copy(self.y.at[which, :, ranks], target, slot, jnp.bool_(True))
            for s in range(STAGE_CHUNKS):
                index = source.locate(self.items.chunk_tile(item, s, k, 0), pages)
                source.copy(self.pool, index, ring.chunks, slot * STAGE_CHUNKS + s, ring.full.at[slot], jnp.bool_(True))
