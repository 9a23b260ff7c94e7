"""The warpgroup that fills the ring of the kernel for gate and up with their deltas."""

import dataclasses

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.gated_ring import COLUMNS, MATRICES, GatedRing
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS
from pallas_kernels.lora.short_ring import WARPS
from pallas_kernels.lora.stage_load import StageLoad
from pallas_kernels.lora.windows import TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLoad(StageLoad):
    ring: GatedRing

    def _tile(self, n, issued):
        tile, column, _ = self.order.place(n)
        begin, end = (self.first_block[tile + i] for i in (0, 1))
        issued += self._base(tile, column, issued, begin, end - begin)

        def module_body(place, issued):
            gate, up = GROUPS[self.items.group]
            module = jnp.where(place == 0, gate, up)
            width = self.items.geometry.out_tiles(gate)  # and of up
            return self._deltas(tile, module, place, width, column, issued)

        return lax.fori_loop(0, MATRICES, module_body, issued)

    def _base(self, tile, column, issued, begin, count):
        """The base projection's stages of a tile: x by the first warp, gate's and up's weights by the last two. Returns
        how many there are. begin, count: of the tile's records.
        """
        ring, up_column = self.ring, self.w.shape[2] // MATRICES
        units = jnp.where(self.warp == 0, ring.tile_units, jnp.where(self.warp >= WARPS - MATRICES, STAGE_CHUNKS, 0))

        def load(k):
            slot = ring.claim(issued + k, units)
            depth, tokens = pl.ds(k * STAGE_ROWS, STAGE_ROWS), pl.ds(tile * TILE, TILE)
            ring.copy(self.x.at[tokens, depth], ring.rows.at[slot], slot, self.warp == 0)
            for matrix in range(MATRICES):
                part = self.w.at[self.items.layer, depth, pl.ds(matrix * up_column + column * COLUMNS, COLUMNS)]
                ring.copy(part, ring.weights(slot, matrix), slot, self.warp == WARPS - MATRICES + matrix)
            ring.arrive_for_missing(slot)

        def fields(k):
            modules = GROUPS[self.items.group]
            units = [self.units[tile, self.items.layer, m, k] for m in modules]
            return units + [f for m in modules for f in self._b_of(begin + k, m)]

        return self._base_stages(load, fields, count)
