"""Work items of shrink in the kernel for few adapters: 64 ranks of a module and a part of the input."""

import dataclasses
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.geometry import MODULES
from pallas_kernels.lora.config import FEW_TOKENS
from pallas_kernels.lora.few_stripes import PairStripes


class FewItem(NamedTuple):
    """module: its number. place: in the group. block: of the module's ranks. quarter: of this thread block's half of
    the input.
    """

    module: Any
    place: Any
    block: Any
    quarter: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewItems:
    """A pair's items. Every block of ranks of each of the group's modules has one for each quarter; no pair has more
    than one, the last pair the first. With `own`, as in interpret mode, a pair has all of its own module's.

    blocks: by place of a module in the group. quarters: how many there are. most: items of the group at most. pair, of
    so many pairs. part: of the two thread blocks, which takes a half of the input.
    """

    stripes: PairStripes
    blocks: list
    quarters: int
    most: int
    pair: Any
    pairs: int
    part: Any
    parts: int
    own: bool

    def ahead(self, slots: int, count):
        """Of a ring of so many slots, how many are filled with the first of `count` stages with base weights, before it
        is known what adapters there are. Half of them where this pair could have items.
        """
        some = jnp.where(self._turn < self.most, slots // 2, slots) if not self.own else slots // 2
        return jnp.where(self.stripes.pass_of(0)[1] > 0, jnp.minimum(some, count), 0)

    @property
    def count(self):
        if self.own:
            return self.blocks_of(self.stripes.place) * self.quarters
        return jnp.where(self._turn < sum(self.blocks) * self.quarters, 1, 0)

    @property
    def _turn(self):
        return self.pairs - 1 - self.pair

    def blocks_of(self, place):
        """Blocks of a module."""
        return self._at(place, self.blocks)

    def item(self, j) -> FewItem:
        """The pair's j-th."""
        number = j if self.own else self._turn
        block = lax.div(number, jnp.int32(self.quarters))
        quarter = number - block * self.quarters
        if self.own:
            return FewItem(self.stripes.module, self.stripes.place, block, quarter)
        ends = [sum(self.blocks[: i + 1]) for i in range(len(self.blocks))]
        place = sum((jnp.where(block >= end, 1, 0) for end in ends[:-1]), jnp.int32(0))
        within = block - self._at(place, [jnp.int32(0), *ends[:-1]])
        return FewItem(self._at(place, [jnp.int32(m) for m in self.stripes.modules]), place, within, quarter)

    @staticmethod
    def _at(place, values: list):
        found = values[0]
        for i, value in enumerate(values[1:], 1):
            found = jnp.where(place == i, value, found)
        return found

    def stages(self, quarter, count):
        """First stage of a quarter of `count` stages, and how many it has."""
        first, end = (lax.div((quarter + i) * count, jnp.int32(self.quarters)) for i in (0, 1))
        return first, end - first

    def y_rows(self, place, block, quarter):
        """Rows of this thread block's part of an item's y, for all tokens, in global memory."""
        number = ((block * len(self.blocks) + place) * self.quarters + quarter) * self.parts + self.part
        return pl.ds(number * FEW_TOKENS, FEW_TOKENS)

    def signal(self, layer, layers: int, module, block):
        """Which signal counts the quarters that are there."""
        return ((block * layers + layer) * len(MODULES) + module) * self.parts + self.part
