"""The tiles of a base projection, 128 tokens and 256 outputs each, as the programs of a grid take them in turn."""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp

from pallas_kernels.geometry import GROUPS, Geometry

CHUNK = 4
"""Tiles of weights that a bulk copy moves: a product's tile is as wide."""
HALVES = 2
"""Of a tile along the outputs. Those of the last round are shared by two programs each, if there are enough."""
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
    def columns(self) -> int:
        return sum(self.geometry.out_tiles(m) for m in GROUPS[self.group]) // CHUNK

    @property
    def _split(self):
        """How many tiles the rounds have in which every program has one, and how many more there are in halves."""
        total = self.tiles * self.columns
        rest = lax.rem(total, jnp.int32(self.ctas))
        return total - rest, jnp.where(rest * HALVES <= self.ctas, rest, 0)

    @property
    def count(self):
        """Tiles of this program, one of which may be a half."""
        whole, halved = self._split
        last = jnp.where(halved > 0, halved * HALVES, self.tiles * self.columns - whole)
        return lax.div(whole, jnp.int32(self.ctas)) + jnp.where(self.cta < last, 1, 0)

    @property
    def programs(self):
        """How many have a tile."""
        whole, halved = self._split
        last = jnp.where(halved > 0, halved * HALVES, self.tiles * self.columns)
        return jnp.where(whole > 0, self.ctas, last)

    def place(self, n):
        """Of this program's n-th tile: which one along the tokens, which along the outputs, and which half, or HALVES
        if it is whole.
        """
        whole, halved = self._split
        index = self.cta + n * self.ctas
        last = (index >= whole) & (halved > 0)
        index = jnp.where(last, whole + lax.div(self.cta, jnp.int32(HALVES)), index)
        half = jnp.where(last, lax.rem(self.cta, jnp.int32(HALVES)), HALVES)
        band = lax.div(index, jnp.int32(_BAND * self.columns))
        index -= band * (_BAND * self.columns)
        height = jnp.minimum(self.tiles - band * _BAND, _BAND)
        column = lax.div(index, height)
        return band * _BAND + index - column * height, column, half

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
