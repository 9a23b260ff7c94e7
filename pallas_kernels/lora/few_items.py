"""Work items of shrink in the kernel for few adapters: 64 ranks of a module and a share of the input's depth."""

import dataclasses
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.geometry import MODULES, ceil_div
from pallas_kernels.lora.config import CLUSTER, FEW_TOKENS
from pallas_kernels.lora.few_ring import A_SLOTS
from pallas_kernels.lora.few_stripes import PairStripes, Stripes

SIGNALS = 2
"""Of each block of each module and layer."""
_MOST_SHARES = 32


class FewItem(NamedTuple):
    """module: its number. place: in the group. block: of the module's ranks. share: of this thread block's half of the
    input.
    """

    module: Any
    place: Any
    block: Any
    share: Any


def shares_of(stripes: Stripes, blocks: int, stages: int) -> int:
    """Into how many shares the depth is cut. blocks: of each module, at most. stages: of the input.

    A power of two, so that tokens are shared evenly. As many as leave one item for each pair, or each pair that has
    less to do than others, if these are many; and as many stages to each as are loaded at a time.
    """
    pairs = stripes.light if 2 * stripes.light >= stripes.pairs else stripes.pairs
    most = pairs // (blocks * len(stripes.parts))
    most = max(min(stages // CLUSTER // A_SLOTS, _MOST_SHARES, most), 1)
    return 1 << most.bit_length() - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewItems:
    """A pair's items: pairs take them by turns, those with less to do first. Which are whose does not depend on how
    many blocks there are, so that nobody waits to know that before it looks where its A is. With `own`, as in interpret
    mode, a pair has all of its own module's.

    blocks: that a module has, by place in the group. most_blocks: that it can have. shares: of the depth; each block of
    ranks has one item for each. part: of the two thread blocks, which takes a half of the input.
    """

    stripes: PairStripes
    blocks: list
    most_blocks: int
    shares: int
    part: Any
    parts: int
    own: bool

    @property
    def most_each(self) -> int:
        """Items of a pair, in use or not."""
        if self.own:
            return self.most_blocks * self.shares
        return ceil_div(self.most_blocks * len(self.blocks) * self.shares, self.stripes.stripes.pairs)

    def item(self, j) -> FewItem:
        """The pair's j-th. Its block may be past the last one there can be."""
        number = j if self.own else self.stripes.turn + j * self.stripes.stripes.pairs
        block = lax.div(number, jnp.int32(self.shares))
        share = number - block * self.shares
        if self.own:
            return FewItem(self.stripes.module, self.stripes.place, block, share)
        within = lax.div(block, jnp.int32(len(self.blocks)))
        place = block - within * len(self.blocks)
        return FewItem(self._at(place, [jnp.int32(m) for m in self.stripes.modules]), place, within, share)

    def is_used(self, item: FewItem):
        """Whether there is such a block."""
        return item.block < self.blocks_of(item.place)

    def record(self, item: FewItem):
        """Its block, or if there can be none, another one."""
        return jnp.minimum(item.block, self.most_blocks - 1)

    def blocks_of(self, place):
        """Blocks of a module."""
        return self._at(place, self.blocks)

    @staticmethod
    def _at(place, values: list):
        found = values[0]
        for i, value in enumerate(values[1:], 1):
            found = jnp.where(place == i, value, found)
        return found

    def stages(self, share, count):
        """First stage of a share of `count` stages, and how many it has."""
        first, end = (lax.div((share + i) * count, jnp.int32(self.shares)) for i in (0, 1))
        return first, end - first

    def own_block(self, n):
        """The n-th block that this thread block multiplies with B."""
        return n * self.parts + self.part

    def is_own(self, block):
        """Whether it does so with this block."""
        return lax.rem(block, jnp.int32(self.parts)) == self.part

    @property
    def summands(self) -> int:
        """Of a y: the shares of both thread blocks of a pair."""
        return self.shares * self.parts

    def y_row(self, place, block, summand):
        """First row of a summand of y for all tokens, in global memory; after the last one comes their sum."""
        return ((block * len(self.blocks) + place) * (self.summands + 1) + summand) * FEW_TOKENS

    def y_rows(self, place, block, summand):
        return pl.ds(self.y_row(place, block, summand), FEW_TOKENS)

    def signal(self, layer, layers: int, module, block):
        """Which signal counts the summands that are there; the next one counts the parts of their sum."""
        return ((block * layers + layer) * len(MODULES) + module) * SIGNALS
