"""The warpgroup that fills the ring of the kernel for gate and up with their deltas."""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.gated_ring import COLUMNS, MATRICES, STAGES, GatedRing
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, drain
from pallas_kernels.lora.plan import PAGE_START, TOKEN
from pallas_kernels.lora.product_tiles import ProductTiles
from pallas_kernels.lora.windows import TILE, WINDOW, is_second


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLoad:
    """x: [T, in], w: [layers, in, 2F], y: [blocks, 64, 2 * most_ranks * 64], zeros after the blocks in use. page_ids:
    of the adapters' B. first_block: of `Tiles`. All in global memory.
    """

    ring: GatedRing
    items: ExpandItems
    order: ProductTiles
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
        self._base(tile, column, issued)
        issued += self.w.shape[1] // STAGE_ROWS
        begin, end = (self.first_block[tile + i] for i in (0, 1))

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
                count = jnp.where((item.granules > 0) & ~is_second(before, here), item.rank_tiles, 0)

                @pl.when(count > 0)
                def _():
                    odd = lax.rem(lax.div(here[0], jnp.int32(WINDOW)), jnp.int32(2)) == 1
                    other = jnp.where(is_second(here, after), block + 1, zeros)
                    first, second = jnp.where(odd, zeros, block), jnp.where(odd, block, other)
                    self._pair(item, place, first, second, issued)

                return issued + count

            return lax.fori_loop(begin, end, block_body, issued)

        return lax.fori_loop(0, MATRICES, module_body, issued)

    def _base(self, tile, column, issued):
        """The base projection's stages of a tile."""
        ring, up_column = self.ring, self.w.shape[2] // MATRICES

        @pl.loop(0, self.w.shape[1] // STAGE_ROWS)
        def _(k):
            slot = ring.claim(issued + k, MATRICES)
            depth = pl.ds(pl.multiple_of(k * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)
            tokens = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
            ring.copy(self.x.at[tokens, depth], ring.rows.at[slot], slot)
            for matrix in range(MATRICES):
                first = pl.multiple_of(matrix * up_column + column * COLUMNS, COLUMNS)
                part = self.w.at[self.items.layer, depth, pl.ds(first, COLUMNS)]
                ring.copy(part, ring.weights(slot, matrix), slot)
            ring.arrive_for_missing(slot)

    def _pair(self, item: ExpandItem, place, first, second, issued):
        """Stages of a segment in a tile. place: 0 for gate, 1 for up. first, second: where y of the tile's windows
        is.
        """
        ring, source = self.ring, self.ring.source
        span = self.items.max_span(self.most_ranks)
        pages = source.pages(item.section, span, item.pages, item.page_start, self.page_ids)

        @pl.loop(0, item.rank_tiles)
        def _(k):
            slot = ring.claim(issued + k, 1)
            ranks = pl.multiple_of((place * self.most_ranks + k) * STAGE_ROWS, STAGE_ROWS)
            for i, which in enumerate((first, second)):
                target = ring.rows.at[slot, pl.ds(i * WINDOW, WINDOW)]
                ring.copy(self.y.at[which, :, pl.ds(ranks, STAGE_ROWS)], target, slot)
            for s in range(STAGE_CHUNKS):
                index = source.locate(self.items.chunk_tile(item, s, k, 0), pages)
                row = ring.chunk(slot, s)
                source.copy(self.pool, index, ring.chunks, row, ring.full.at[slot], jnp.bool_(True))
