"""The warpgroup that fills the ring of the kernel for base projections with their deltas."""

import dataclasses

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS
from pallas_kernels.lora.product_ring import COLUMNS, HALF, ProductRing
from pallas_kernels.lora.product_tiles import CHUNK, HALVES
from pallas_kernels.lora.stage_load import StageLoad
from pallas_kernels.lora.stage_ring import STAGES
from pallas_kernels.lora.windows import TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductLoad(StageLoad):
    ring: ProductRing

    def _tile(self, n, issued):
        first_block, layer = self.first_block, self.items.layer
        tile, column, half = self.order.place(n)
        module, place, width, first_tile = self.order.module_of(column)
        begin, end, length = first_block[tile], first_block[tile + 1], self.stages[tile, layer, module]

        def fields(k):
            return [*self._b_of(begin + k, module), self.units[tile, layer, module, k]]

        issued += self._base(tile, column, half, issued, (fields, end - begin))
        chunk = column - lax.div(first_tile, CHUNK)
        once = lambda _, issued: self._deltas(tile, module, place, width, chunk, issued)  # noqa: E731
        times = jnp.where((length <= STAGES) | (half < HALVES), 1, HALVES)
        return lax.fori_loop(0, times, once, issued)

    def _base(self, tile, column, half, issued, records):
        """The base projection's stages of a tile, or of half of one: x by the first warp, its weights by the last two,
        one for whole tiles and one for halves. Returns how many there are. records: fields and count, see _base_stages.
        """
        ring, layer = self.ring, self.items.layer
        x, whole, halved = (self.warp == i for i in (0, 2, 3))
        whole, halved = whole & (half == HALVES), halved & (half < HALVES)
        units = jnp.where(whole, STAGE_CHUNKS, jnp.where(halved, STAGE_CHUNKS // HALVES, 0))
        units = jnp.where(x, ring.tile_units, units)

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

        return self._base_stages(load, *records)
