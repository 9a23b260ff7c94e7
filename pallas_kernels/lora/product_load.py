"""The warpgroup that fills the ring of the kernel for base projections with their deltas.

Each of its warps copies a part of a stage, because of B the instructions that start ten copies take longer than these.
"""

import dataclasses
import functools
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, drain
from pallas_kernels.lora.plan import PAGE_START, TOKEN
from pallas_kernels.lora.product_ring import COLUMNS, HALF, STAGES, TILE_UNITS, ProductRing
from pallas_kernels.lora.product_tiles import CHUNK, HALVES, ProductTiles
from pallas_kernels.lora.short_ring import WARP_CHUNKS
from pallas_kernels.lora.windows import TILE, WINDOW, is_second


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductLoad:
    """warp: whose part this is. x: [T, in], w: [layers, in, out], y: [blocks, 64, modules * most_ranks * 64], zeros
    after the blocks in use. page_ids: of the adapters' B. first_block, stages: of `Tiles`. All in global memory.
    """

    ring: ProductRing
    items: ExpandItems
    order: ProductTiles
    warp: Any
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
        records = (lambda k: self.items.fetch_of(begin + k, module)), end - begin
        issued += self._base(tile, column, half, issued, records)

        def block_body(block, issued):
            here, before, after = (
                [self.items.records[i, layer, field] for field in (TOKEN, PAGE_START)]
                for i in (block, jnp.maximum(block - 1, begin), jnp.minimum(block + 1, end - 1))
            )
            chunk = column - lax.div(first_tile, CHUNK)
            fetched = self.items.fetch_of(block, module)
            item = self.items.item(block, module, width, first_tile, chunk, 1, fetched)
            count = jnp.where(is_second(before, here) | (item.granules == 0), 0, item.rank_tiles)

            @pl.when(count > 0)
            def _():
                odd = lax.rem(lax.div(here[0], jnp.int32(WINDOW)), jnp.int32(2)) == 1
                other = jnp.where(is_second(here, after), block + 1, zeros)
                first, second = jnp.where(odd, zeros, block), jnp.where(odd, block, other)
                self._pair(item, place_in_group, first, second, issued)

            return issued + count

        once = lambda _, issued: lax.fori_loop(begin, end, block_body, issued)  # noqa: E731
        times = jnp.where((length <= STAGES) | (half < HALVES), 1, HALVES)
        return lax.fori_loop(0, times, once, issued)

    def _base(self, tile, column, half, issued, records):
        """The base projection's stages of a tile, or of half of one: x by the first warp, its weights by the last two,
        one for whole tiles and one for halves. Returns how many there are.

        records: what of a tile's k-th record its stages of deltas will need, as a function of k, and how many there
        are. They are read beside the first stages, and in the first cache when they are needed.
        """
        ring, layer, steps = self.ring, self.items.layer, self.w.shape[1] // STAGE_ROWS
        x, whole, halved = (self.warp == i for i in (0, 2, 3))
        whole, halved = whole & (half == HALVES), halved & (half < HALVES)
        units = jnp.where(x, TILE_UNITS, jnp.where(whole, STAGE_CHUNKS, jnp.where(halved, STAGE_CHUNKS // HALVES, 0)))

        def load(k):
            slot = ring.claim(issued + k, units)
            depth = pl.ds(k * STAGE_ROWS, STAGE_ROWS)
            tokens = pl.ds(tile * TILE, TILE)
            outputs = pl.ds(column * COLUMNS, COLUMNS)
            ring.copy(self.x.at[tokens, depth], ring.rows.at[slot], slot, x)
            ring.copy(self.w.at[layer, depth, outputs], ring.weights(slot), slot, whole)
            outputs = pl.ds((column * HALVES + jnp.where(half == HALVES, 0, half)) * HALF, HALF)
            ring.copy(self.w.at[layer, depth, outputs], ring.half_weights(slot), slot, halved)
            ring.arrive_for_missing(slot)

        def load_and_read(k, least):
            load(k)
            return functools.reduce(jnp.minimum, fields(k), least)

        fields, count = records
        first = jnp.minimum(count, steps)
        least = lax.fori_loop(0, first, load_and_read, jnp.int32(0))
        pl.loop(first, steps)(load)
        # No field is that small, which the compiler does not know: it leaves the reads in.
        return steps + jnp.where(least == jnp.iinfo(jnp.int32).min, 1, 0)

    def _pair(self, item: ExpandItem, place_in_group, first, second, issued):
        """Stages of a segment in a tile. first, second: where y of the tile's windows is: the first two warps'."""
        ring, source = self.ring, self.ring.source
        span = self.items.max_span(self.most_ranks)
        pages = source.pages(item.section, span, item.pages, item.page_start, self.page_ids)
        mine = [self.warp * WARP_CHUNKS + i for i in range(WARP_CHUNKS)]
        window, has_window = self.warp & 1, self.warp < 2
        units = WARP_CHUNKS + jnp.where(has_window, TILE_UNITS // 2, 0)
        block = jnp.where(window == 0, first, second)

        @pl.loop(0, item.rank_tiles)
        def _(k):
            indices = [source.locate(self.items.chunk_tile(item, s, k, 0), pages) for s in mine]
            slot = ring.claim(issued + k, units)
            ranks = pl.ds((place_in_group * self.most_ranks + k) * STAGE_ROWS, STAGE_ROWS)
            target = ring.rows.at[slot, pl.ds(window * WINDOW, WINDOW)]
            ring.copy(self.y.at[block, :, ranks], target, slot, has_window)
            for s, index in zip(mine, indices, strict=True):
                row = slot * STAGE_CHUNKS + s
                source.copy(self.pool, index, ring.chunks, row, ring.full.at[slot], jnp.bool_(True))
