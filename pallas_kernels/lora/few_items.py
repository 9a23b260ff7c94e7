"""Work items of shrink in the kernel for few adapters: 64 ranks of a module and a share of the input's depth."""

import dataclasses
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.geometry import MODULES, ceil_div
from pallas_kernels.lora.config import CLUSTER, FEW_TOKENS
from pallas_kernels.lora.few_stripes import PairStripes, Stripes

SIGNALS = 2
"""Of each block of each module and layer."""
_MOST_SHARES = 16


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
    """Every block of ranks of each of the group's modules has one item for each share of the depth. So many neighbours
    among the pairs have the same share: that whose activations they multiply first. They take blocks by turns.

    count: shares. neighbours: with the same share. most_each: items of a pair at most. longest: stages of a share at
    most. slots: of the ring, for A of one item.
    """

    count: int
    neighbours: int
    most_each: int
    longest: int
    slots: int

    @classmethod
    def of(cls, stripes: Stripes, blocks: int, stages: int) -> "Shares":
        """blocks: of each module, at most. stages: of the input. A power of two, so that tokens are shared evenly, and
        as many as leave one item for each pair.
        """
        blocks *= len(stripes.parts)
        most = max(min(stages // CLUSTER, _MOST_SHARES, stripes.users // blocks), 1)
        count = 1 << most.bit_length() - 1
        neighbours = stripes.users // count
        longest = ceil_div(ceil_div(stages, CLUSTER), count)
        return cls(count, neighbours, ceil_div(blocks, neighbours), longest, ceil_div(longest, 1 + stripes.width))

    @classmethod
    def of_one(cls, blocks: int, stages: int, width: int) -> "Shares":
        """The whole depth is one pair's."""
        return cls(1, 1, blocks, stages, ceil_div(stages, 1 + width))

    @property
    def least_slots(self) -> int:
        """Of the ring: A stays there until the share's last stage has been multiplied with it."""
        return self.most_each * self.slots + self.longest


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
        total, turn = sum(self.blocks), jnp.int32(self.shares.neighbours)
        count = lax.div(jnp.maximum(total - self._first_block, 0) + turn - 1, turn)
        return jnp.where(self.pair < self.shares.count * self.shares.neighbours, count, 0)

    @property
    def _first_block(self):
        """Of the group's, which of the modules follow one another."""
        return lax.rem(self.pair, jnp.int32(self.shares.neighbours))

    def blocks_of(self, place):
        """Blocks of a module."""
        return self._at(place, self.blocks)

    def item(self, j) -> FewItem:
        """The pair's j-th."""
        if self.own:
            return FewItem(self.stripes.module, self.stripes.place, jnp.int32(j), self.share)
        block = self._first_block + j * self.shares.neighbours
        ends = [sum(self.blocks[: i + 1]) for i in range(len(self.blocks))]
        place = sum((jnp.where(block >= end, 1, 0) for end in ends[:-1]), jnp.int32(0))
        within = block - self._at(place, [jnp.int32(0), *ends[:-1]])
        return FewItem(self._at(place, [jnp.int32(m) for m in self.stripes.modules]), place, within, self.share)

    @property
    def share(self):
        """Of all the pair's items. Pairs that are left over have one, too, but no items."""
        return jnp.minimum(lax.div(self.pair, jnp.int32(self.shares.neighbours)), self.shares.count - 1)

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
    """In which order a thread block takes the stages of its half of the input, and where A stands among these.

    `blind` stages are asked for before it is known what adapters there are. Then comes A of the pair's share, several
    stages of it in a slot, then the stages of the share and all others, the input's beginning after its end.

    count: stages of the half. first: of the share. shared: how many the share has, none if the pair has no items.
    a_slots: of the ring, for A of all items.
    """

    count: Any
    first: Any
    blind: Any
    shared: Any
    a_slots: Any

    @classmethod
    def of(cls, items: FewItems, count, slots: int) -> "FewOrder":
        share, shares = items.share, jnp.int32(items.shares.count)
        first, end = (lax.div((share + i) * count, shares) for i in (0, 1))
        blind = jnp.minimum(slots // 2, count - (end - first))
        its = items.count
        return cls(count, first, blind, jnp.where(its > 0, end - first, 0), its * items.shares.slots)

    def stage(self, place):
        """Which stage of the half is the `place`-th."""
        return lax.rem(self.first - self.blind + place + self.count, self.count)

    def ring(self, place):
        """The number of that stage among all that go through the ring."""
        return place + jnp.where(place < self.blind, 0, self.a_slots)

    @property
    def stages(self):
        """That go through the ring."""
        return self.count + self.a_slots
