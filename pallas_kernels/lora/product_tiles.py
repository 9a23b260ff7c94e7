"""The tiles of a base projection, 128 tokens and 256 outputs each, as the programs of a grid take them in turn."""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp

from pallas_kernels.geometry import GROUPS, Geometry
from pallas_kernels.lora.mosaic_common import ceil_div

CHUNK = 4
"""Tiles of weights that a bulk copy moves: a product's tile is as wide."""
_BAND = 16
"""Tiles along the tokens that run together: of a step of up to 2,048 tokens all, so that weights are read once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductTiles:
    """cta: which program of `ctas` this is. tiles: how many there are along the tokens."""

    geometry: Geometry
    group: str
    cta: Any
    ctas: int
    tiles: Any

    @property
    def _columns(self) -> int:
        return sum(self.geometry.out_tiles(m) for m in GROUPS[self.group]) // CHUNK

    @property
    def count(self):
        """Tiles of this program."""
        return jnp.maximum(ceil_div(self.tiles * self._columns - self.cta, self.ctas), 0)

    def place(self, n):
        """Of this program's n-th tile: which one along the tokens, and which along the outputs."""
        index = self.cta + n * self.ctas
        band = lax.div(index, jnp.int32(_BAND * self._columns))
        index -= band * (_BAND * self._columns)
        height = jnp.minimum(self.tiles - band * _BAND, _BAND)
        column = lax.div(index, height)
        return band * _BAND + index - column * height, column

    def module_of(self, column):
        """Of a tile along the outputs: its module and the place of that in the group, the module's width and first
        tile of `out`, both in tiles of 64.
        """
        tile, chosen = 0, [jnp.int32(0)] * 4
        for i, m in enumerate(GROUPS[self.group]):
            values = (m, i, self.geometry.out_tiles(m), tile)
            chosen = [jnp.where(column * CHUNK >= tile, v, old) for v, old in zip(values, chosen, strict=True)]
            tile += self.geometry.out_tiles(m)
        return chosen
