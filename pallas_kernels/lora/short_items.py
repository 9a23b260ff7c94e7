"""Work items of shrink for short segments: which chunks of columns belong to one, as int32 scalars inside the kernel.

The input width is cut into splits. As many splits as there are multiplying warpgroups are worked on side by side: a
*set*. Each warpgroup sums one of them, chunk after chunk, so that the order of a sum depends on nothing but the split.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.geometry import GROUPS, Geometry
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, ceil_div, dealt, dealt_item
from pallas_kernels.lora.plan import PAGE_START, TOKEN, group_fields


def split_chunks(geometry: Geometry, group: str, config: LoraConfig, chunk: int) -> tuple[int, int, int]:
    """(chunks of columns in all, in a split, number of splits) of a group's input width."""
    total = geometry.in_tiles(GROUPS[group][0]) // chunk
    per_split = static_ceil_div(total, config.num_splits)
    return total, per_split, static_ceil_div(total, per_split)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkItem:
    """block: token block. token: its first row. first_set, num_sets: of the item; none if the adapter has no such rank
    block.

    section: first tile of the group's A section; pages: ids of its page and the next. granules: of the rank block.
    packed: chunks of columns in a stage.
    """

    block: Any
    rank_block: Any
    token: Any
    page_start: Any
    section: Any
    pages: tuple
    granules: Any
    packed: Any
    first_set: Any
    num_sets: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkItems:
    """The items of a launch, dealt out to the programs. sides: splits in a set.

    Rank blocks are the slowest to change: where an adapter has fewer than the largest, its items are empty.
    """

    geometry: Geometry
    group: str
    config: LoraConfig
    chunk: int
    sides: int
    num_blocks: Any
    rank_blocks: Any
    records: Any
    layer: Any

    @property
    def ctas(self) -> int:
        return self.config.expand_ctas

    @property
    def packed_limit(self) -> int:
        return self.config.shrink_packed

    def _splits(self):
        return split_chunks(self.geometry, self.group, self.config, self.chunk)

    def _cut(self):
        """Sets of an item and items of a rank block: long where there are enough, because a new item costs time."""
        sets = static_ceil_div(self._splits()[2], self.sides)
        run = jnp.int32(1)
        for longer in (2, 4):
            enough = self.num_blocks * self.rank_blocks * static_ceil_div(sets, longer) >= 3 * self.ctas
            run = jnp.where(enough, longer, run)
        return run, ceil_div(jnp.int32(sets), run)

    def local(self, cta):
        """Items of program `cta`."""
        return dealt(self.num_blocks * self.rank_blocks * self._cut()[1], cta, self.ctas)

    @property
    def signals(self):
        """How many signals tell that a token block is done: from each warpgroup one an item."""
        return self.rank_blocks * self._cut()[1] * self.sides

    def _place(self, cta, n):
        """Of item n of program `cta`: token block, rank block and first set."""
        run, runs = self._cut()
        item = dealt_item(cta, n, self.ctas)
        rest = lax.div(item, runs)
        rank_block = lax.div(rest, jnp.maximum(self.num_blocks, 1))
        # A program without items describes one all the same.
        block = jnp.maximum(jnp.minimum(rest - rank_block * self.num_blocks, self.num_blocks - 1), 0)
        return block, rank_block, lax.rem(item, runs) * run

    def block(self, cta, n):
        """Token block of item n of program `cta`."""
        return self._place(cta, n)[0]

    def fetch(self, cta, n) -> list:
        """What `describe` needs of item n's record."""
        block, _, _ = self._place(cta, n)
        fields = (TOKEN, PAGE_START, *group_fields(self.group))
        return [self.records[block, self.layer, i] for i in fields]

    def describe(self, cta, n, fetched) -> ShrinkItem:
        """Item n of program `cta`."""
        block, rank_block, first_set = self._place(cta, n)
        token, page_start, section, total, *pages = fetched
        sets, run = static_ceil_div(self._splits()[2], self.sides), self._cut()[0]
        granules = jnp.clip(total - rank_block * STAGE_CHUNKS, 0, STAGE_CHUNKS)
        packed = jnp.int32(1)
        for n_packed in (2, 4):
            if n_packed <= self.packed_limit:
                packed = jnp.where(granules * n_packed <= STAGE_CHUNKS, n_packed, packed)
        return ShrinkItem(
            block=block,
            rank_block=rank_block,
            token=token,
            page_start=page_start,
            section=section,
            pages=tuple(pages),
            granules=jnp.maximum(granules, 1),
            packed=packed,
            first_set=first_set,
            num_sets=jnp.where(granules > 0, jnp.minimum(run, sets - first_set), 0),
        )

    def split(self, number, side):
        """First chunk of columns of a set's split, and how many it has."""
        total, per_split, _ = self._splits()
        first = (number * self.sides + side) * per_split
        return first, jnp.maximum(jnp.minimum(total - first, per_split), 0)

    def stages(self, item: ShrinkItem, number):
        """Stages of a set. Its first split is the longest."""
        length = self.split(number, 0)[1]
        each = self._each(item)
        return jnp.where(each > 0, ceil_div(length, jnp.maximum(each, 1)), self.sides * length)

    def _each(self, item: ShrinkItem):
        """Places of a stage that each side has; 0: there is one place, and the sides have it in turn."""
        return lax.div(item.packed, jnp.int32(self.sides))

    def sub(self, item: ShrinkItem, s):
        """Place that chunk s of a stage belongs to."""
        return sum(jnp.where(s >= n * item.granules, 1, 0) for n in range(1, self.packed_limit + 1))

    def column(self, item: ShrinkItem, number, sub):
        """Stage -> first tile of the columns in place `sub`, and whether there are any."""
        each = self._each(item)
        side = jnp.where(sub >= each, 1, 0) if self.sides == 2 else jnp.int32(0)
        firsts, lengths = zip(*(self.split(number, i) for i in range(self.sides)), strict=True)
        pick = lambda of, side: of[0] if self.sides == 1 else jnp.where(side == 1, of[1], of[0])  # noqa: E731

        def at(stage):
            turn = jnp.where(each > 0, side, lax.rem(stage, jnp.int32(self.sides)))
            chunk = jnp.where(each > 0, stage * each + sub - side * each, lax.div(stage, jnp.int32(self.sides)))
            valid = (sub < item.packed) & (chunk < pick(lengths, turn))
            return (pick(firsts, turn) + chunk) * self.chunk, valid

        return at

    def mine(self, item: ShrinkItem, number, stage, side):
        """First place and number of places of a stage that are the side's."""
        each = self._each(item)
        length = self.split(number, side)[1]
        turn = (lax.rem(stage, jnp.int32(self.sides)) == side) & (lax.div(stage, jnp.int32(self.sides)) < length)
        count = jnp.where(each > 0, jnp.clip(length - stage * each, 0, each), jnp.where(turn, 1, 0))
        return side * each, count
