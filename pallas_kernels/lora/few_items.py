"""Work items of shrink in the kernel for few adapters: 64 ranks of a module and a share of the input's depth."""

import dataclasses
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.geometry import MODULES, ceil_div
from pallas_kernels.lora.config import FEW_TOKENS
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


@dataclasses.dataclass(frozen=True)
class Shares:
    """Every block of ranks of each of the group's modules has one item for each share of the depth. Pairs take items by
    turns, so that all that one takes have the same share: that whose activations it multiplies first.

    count: shares. turn: pairs that take one before the first one takes its second. most_each: items of a pair at most.
    """

    count: int
    turn: int
    most_each: int

    @classmethod
    def of(cls, stripes: Stripes, blocks: int, stages: int) -> "Shares":
        """blocks: of each module, at most. stages: of a half of the input, at least. A power of two, so that tokens are
        shared evenly, and as many as leave one item for each pair.
        """
        blocks *= len(stripes.parts)
        most = max(min(stages, _MOST_SHARES, stripes.users // blocks), 1)
        count = 1 << most.bit_length() - 1
        turn = stripes.users // count * count
        return cls(count, turn, ceil_div(blocks * count, turn))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewItems:
    """A pair's items. With `own`, as in interpret mode, a pair has all blocks of its own module, and the whole depth.

    blocks: by place of a module in the group. pair: which this is. part: of the two thread blocks, which takes a half
    of the input.
    """

    stripes: PairStripes
    blocks: list
    shares: Shares
    pair: Any
    part: Any
    parts: int
    own: bool

    @property
    def count(self):
        """How many there are. A pair without stripes has none."""
        if self.own:
            return self.blocks_of(self.stripes.place)
        total, turn = sum(self.blocks) * self.shares.count, jnp.int32(self.shares.turn)
        return jnp.where(self.pair < turn, lax.div(jnp.maximum(total - self.pair, 0) + turn - 1, turn), 0)

    def blocks_of(self, place):
        """Blocks of a module."""
        return self._at(place, self.blocks)

    def item(self, j) -> FewItem:
        """The pair's j-th."""
        if self.own:
            return FewItem(self.stripes.module, self.stripes.place, jnp.int32(j), self.share)
        block = lax.div(self.pair + j * self.shares.turn, jnp.int32(self.shares.count))
        ends = [sum(self.blocks[: i + 1]) for i in range(len(self.blocks))]
        place = sum((jnp.where(block >= end, 1, 0) for end in ends[:-1]), jnp.int32(0))
        within = block - self._at(place, [jnp.int32(0), *ends[:-1]])
        return FewItem(self._at(place, [jnp.int32(m) for m in self.stripes.modules]), place, within, self.share)

    @property
    def share(self):
        """Of all the pair's items."""
        return lax.rem(self.pair, jnp.int32(self.shares.count))

    @staticmethod
    def _at(place, values: list):
        found = values[0]
        for i, value in enumerate(values[1:], 1):
            found = jnp.where(place == i, value, found)
        return found

    def own_block(self, n):
        """The n-th block that this thread block multiplies with B."""
        return n * self.parts + self.part

    @property
    def summands(self) -> int:
        """Of a y: the shares of both thread blocks of a pair."""
        return self.shares.count * self.parts

    def summand(self, share):
        """Which one is this thread block's."""
        return share * self.parts + self.part

    def y_row(self, place, block, summand):
        """First row of a summand of y for all tokens, in global memory; after the last one comes their sum."""
        return ((block * len(self.blocks) + place) * (self.summands + 1) + summand) * FEW_TOKENS

    def y_rows(self, place, block, summand):
        return pl.ds(self.y_row(place, block, summand), FEW_TOKENS)

    def signal(self, layer, layers: int, module, block):
        """Which signal counts the summands that are there; the next one counts the parts of their sum."""
        return ((block * layers + layer) * len(MODULES) + module) * SIGNALS


@dataclasses.dataclass(frozen=True)
class FewOrder:
    """In which order a thread block takes the stages of its half of the input, and where A's stages stand among these.

    `blind` stages are asked for before it is known what adapters there are. Then come those of the pair's share, each
    followed by a stage of A for each of its items, and then all others, the input's beginning after its end.

    count: stages of the half. first: of the share. shared: how many the share has, none if the pair has no items.
    items: of the pair.
    """

    count: Any
    first: Any
    blind: Any
    shared: Any
    items: Any

    @classmethod
    def of(cls, items: FewItems, count, slots: int) -> "FewOrder":
        share, shares = items.share, jnp.int32(items.shares.count)
        first, end = (lax.div((share + i) * count, shares) for i in (0, 1))
        blind = jnp.minimum(slots // 2, count - (end - first))
        return cls(count, first, blind, jnp.where(items.count > 0, end - first, 0), items.count)

    def stage(self, place):
        """Which stage of the half is the `place`-th."""
        return lax.rem(self.first - self.blind + place + self.count, self.count)

    def of_share(self, k):
        """Where the k-th stage of the share stands in the ring; A's stages stand behind it."""
        return self.blind + k * (1 + self.items)

    @property
    def rest(self):
        """Where the first stage after the share's stands, which is the `blind + shared`-th."""
        return self.of_share(self.shared)

    @property
    def more(self):
        """Stages of A."""
        return self.shared * self.items
