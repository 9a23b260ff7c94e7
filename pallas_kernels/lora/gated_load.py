"""The warpgroup that fills the ring of the kernel for gate and up with their deltas.

Each of its warps copies a part of a stage, because of B the instructions that start ten copies take longer than these.
"""

import dataclasses
import functools
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.gated_ring import COLUMNS, MATRICES, STAGES, TILE_UNITS, GatedRing
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, drain
from pallas_kernels.lora.plan import PAGE_START, TOKEN
from pallas_kernels.lora.product_tiles import ProductTiles
from pallas_kernels.lora.short_ring import WARP_CHUNKS, WARPS
from pallas_kernels.lora.windows import TILE, WINDOW, is_second


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLoad:
    """warp: whose part this is. x: [T, in], w: [layers, in, 2F], y: [blocks, 64, 2 * most_ranks * 64], zeros after the
    blocks in use. page_ids: of the adapters' B. first_block: of `Tiles`. All in global memory.
    """

    ring: GatedRing
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
        tile, column, _ = self.order.place(n)
        begin, end = (self.first_block[tile + i] for i in (0, 1))
        issued += self._base(tile, column, issued, begin, end - begin)

        def module_body(place, issued):
            gate, up = GROUPS[self.items.group]
            module = jnp.where(place == 0, gate, up)
            width = self.items.geometry.out_tiles(gate)  # and of up

            def block_body(block, issued):
                here, before, after = (
                    [self.items.records[i, self.items.layer, field] for field in (TOKEN, PAGE_START)]
                    for i in (block, jnp.maximum(block - 1, begin), jnp.minimum(block + 1, end - 1))
                )
                fetched = self.items.fetch_of(block, module)
                item = self.items.item(block, module, width, 0, column, 1, fetched)
                count = jnp.where(is_second(before, here) | (item.granules == 0), 0, item.rank_tiles)

                @pl.when(count > 0)
                def _():
                    odd = lax.rem(lax.div(here[0], jnp.int32(WINDOW)), jnp.int32(2)) == 1
                    other = jnp.where(is_second(here, after), block + 1, zeros)
                    first, second = jnp.where(odd, zeros, block), jnp.where(odd, block, other)
                    self._pair(item, place, first, second, issued)

                return issued + count

            return lax.fori_loop(begin, end, block_body, issued)

        return lax.fori_loop(0, MATRICES, module_body, issued)

    def _base(self, tile, column, issued, begin, count):
        """The base projection's stages of a tile: x by the first warp, gate's and up's weights by the last two. Returns
        how many there are.

        begin, count: of the tile's records, which its stages of deltas will need: they are read beside the first
        stages, and in the first cache when they are needed.
        """
        ring, up_column, steps = self.ring, self.w.shape[2] // MATRICES, self.w.shape[1] // STAGE_ROWS
        units = jnp.where(self.warp == 0, TILE_UNITS, jnp.where(self.warp >= WARPS - MATRICES, STAGE_CHUNKS, 0))

        def load(k):
            slot = ring.claim(issued + k, units)
            depth, tokens = pl.ds(k * STAGE_ROWS, STAGE_ROWS), pl.ds(tile * TILE, TILE)
            ring.copy(self.x.at[tokens, depth], ring.rows.at[slot], slot, self.warp == 0)
            for matrix in range(MATRICES):
                part = self.w.at[self.items.layer, depth, pl.ds(matrix * up_column + column * COLUMNS, COLUMNS)]
                ring.copy(part, ring.weights(slot, matrix), slot, self.warp == WARPS - MATRICES + matrix)
            ring.arrive_for_missing(slot)

        def load_and_read(k, least):
            load(k)
            fields = [self.items.fetch_of(begin + k, m) for m in GROUPS[self.items.group]]
            return functools.reduce(jnp.minimum, [f for of_module in fields for f in of_module], least)

        first = jnp.minimum(count, steps)
        least = lax.fori_loop(0, first, load_and_read, jnp.int32(0))
        pl.loop(first, steps)(load)
        # No field is that small, which the compiler does not know: it leaves the reads in.
        return steps + jnp.where(least == jnp.iinfo(jnp.int32).min, 1, 0)

    def _pair(self, item: ExpandItem, place, first, second, issued):
        """Stages of a segment in a tile. place: 0 for gate, 1 for up. first, second: where y of the tile's windows is:
        the first two warps'.
        """
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
            ranks = pl.ds((place * self.most_ranks + k) * STAGE_ROWS, STAGE_ROWS)
            target = ring.rows.at[slot, pl.ds(window * WINDOW, WINDOW)]
            ring.copy(self.y.at[block, :, ranks], target, slot, has_window)
            for s, index in zip(mine, indices, strict=True):
                row = ring.chunk(slot, s)
                source.copy(self.pool, index, ring.chunks, row, ring.full.at[slot], jnp.bool_(True))
