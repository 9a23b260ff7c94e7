"""Work items of shrink in the kernel for few adapters: 64 ranks of a module and a share of the input's depth."""

import dataclasses
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.geometry import MODULES
from pallas_kernels.lora.config import CLUSTER, FEW_TOKENS
from pallas_kernels.lora.few_stripes import PairStripes, Stripes

SIGNALS = 2
"""Of each block of each module and layer."""
_MOST_SHARES = 8


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
    less to do than others, if these are many.
    """
    pairs = stripes.light if 2 * stripes.light >= stripes.pairs else stripes.pairs
    most = max(min(stages // CLUSTER, _MOST_SHARES, pairs // (blocks * len(stripes.parts))), 1)
    return 1 << most.bit_length() - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewItems:
    """A pair's items: pairs take them by turns, those with less to do first. With `own`, as in interpret mode, a pair
    has all of its own module's.

    blocks: by place of a module in the group. shares: of the depth; each block of ranks has one item for each. part: of
    the two thread blocks, which takes a half of the input.
    """

    stripes: PairStripes
    blocks: list
    shares: int
    part: Any
    parts: int
    own: bool

    @property
    def count(self):
        """How many there are."""
        if self.own:
            return self.blocks_of(self.stripes.place) * self.shares
        pairs = jnp.int32(self.stripes.stripes.pairs)
        return lax.div(jnp.maximum(sum(self.blocks) * self.shares - self.stripes.turn, 0) + pairs - 1, pairs)

    def blocks_of(self, place):
        """Blocks of a module."""
        return self._at(place, self.blocks)

    def item(self, j) -> FewItem:
        """The pair's j-th."""
        number = j if self.own else self.stripes.turn + j * self.stripes.stripes.pairs
        block = lax.div(number, jnp.int32(self.shares))
        share = number - block * self.shares
        if self.own:
            return FewItem(self.stripes.module, self.stripes.place, block, share)
        ends = [sum(self.blocks[: i + 1]) for i in range(len(self.blocks))]
        place = sum((jnp.where(block >= end, 1, 0) for end in ends[:-1]), jnp.int32(0))
        within = block - self._at(place, [jnp.int32(0), *ends[:-1]])
        return FewItem(self._at(place, [jnp.int32(m) for m in self.stripes.modules]), place, within, share)

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

    def all_stages(self, count):
        """How many stages all of them have, of inputs of `count` stages."""
        return lax.fori_loop(0, self.count, lambda j, n: n + self.stages(self.item(j).share, count)[1], jnp.int32(0))

    def is_own(self, block):
        """Whether this thread block and not the pair's other one adds up a block's y."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowItems(FewItems):
    """Of a step of so many windows of FEW_TOKENS tokens, and of so many tiles, for one of each."""

    window: Any
    windows: int
    tile: Any
    tiles: int

    def y_row(self, place, block, summand):
        return super().y_row(place, block, summand) * self.windows + self.window * FEW_TOKENS

    def signal(self, layer, layers: int, module, block):
        return super().signal(layer, layers, module, block) * self.tiles + self.tile * SIGNALS
