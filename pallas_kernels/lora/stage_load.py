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

from pallas_kernels.lora.expand_items import ExpandItems
from pallas_kernels.lora.mosaic_common import STAGE_ROWS, drain, having_read
from pallas_kernels.lora.plan import PAGE_START, module_field, module_pages
from pallas_kernels.lora.product_tiles import ProductTiles
from pallas_kernels.lora.short_ring import WARP_CHUNKS
from pallas_kernels.lora.stage_ring import STAGES
from pallas_kernels.lora.windows import STAGE_UNITS, TILE, UNIT_GRANULES, UNITS_OF_BLOCK, WINDOW, rank_blocks

assert WARP_CHUNKS == UNIT_GRANULES, "a warp copies a unit of each stage"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageLoad:
    """warp: whose part this is. x: [T, in], w: [layers, in, out], y: [T, modules * most_stages * 64]. page_ids: of the
    adapters' B. first_block, stages, units: of `Tiles`. All in global memory.
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
    stages: Any
    units: Any
    most_stages: int

    def run(self) -> None:
        """Loads all stages of this program's tiles, and waits until they have been read."""
        drain(self.ring.empty, lax.fori_loop(0, self.order.count, self._tile, jnp.int32(0)), STAGES)

    def _tile(self, n, issued):
        """Loads the n-th tile's stages after so many. Returns how many there are then."""
        raise NotImplementedError

    def _b_of(self, block, module) -> list:
        """Of a token block: its adapter's first page, and of a module's B the first tile, granules and two pages."""
        field, page = module_field(module), module_pages(module)
        fields = PAGE_START, field, field + 1, page, page + 1
        return [self.items.records[block, self.items.layer, i] for i in fields]

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

    def _deltas(self, tile, module, place, width, chunk, issued):
        """Loads the stages of a module's deltas in a tile. Returns how many stages there are then.

        place: of the module in the group. width: its output tiles, of which the `chunk`-th few are the tile's.
        """
        ring, source, layer, warp = self.ring, self.ring.source, self.items.layer, self.warp
        span = self.items.max_span(rank_blocks(self.most_stages))
        window, has_window = warp & 1, warp < 2
        copied = WARP_CHUNKS + jnp.where(has_window, ring.tile_units // 2, 0)
        length = self.stages[tile, layer, module]

        @pl.loop(0, length)
        def _(k):
            unit = self.units[tile, layer, module, k * STAGE_UNITS + warp]
            block, unit = lax.div(unit, jnp.int32(UNITS_OF_BLOCK)), lax.rem(unit, jnp.int32(UNITS_OF_BLOCK))
            page_start, section, granules, *known = self._b_of(block, module)
            pages = source.pages(section, span, known, page_start, self.page_ids)
            rows = [jnp.minimum(unit * UNIT_GRANULES + i, granules - 1) for i in range(UNIT_GRANULES)]
            indices = [source.locate(section + row * width + chunk * source.chunk, pages) for row in rows]
            slot = ring.claim(issued + k, copied)
            tokens = pl.ds(tile * TILE + window * WINDOW, WINDOW)
            ranks = pl.ds((place * self.most_stages + k) * STAGE_ROWS, STAGE_ROWS)
            ring.copy(self.y.at[tokens, ranks], ring.rows.at[slot, pl.ds(window * WINDOW, WINDOW)], slot, has_window)
            for i, index in enumerate(indices):
                row = ring.chunk(slot, warp * WARP_CHUNKS + i)
                source.copy(self.pool, index, ring.chunks, row, ring.full.at[slot], jnp.bool_(True))

        return issued + length
