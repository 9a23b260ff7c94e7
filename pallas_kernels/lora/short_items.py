"""Work items of shrink for short segments: which chunks of columns belong to one, as int32 scalars inside the kernel.

The input width is cut into splits, each summed on its own, chunk after chunk, so that the order of a sum depends on
nothing but the split. Where an adapter has few granules, several splits stand side by side in a stage: a *set*. They
share a product, of which each split is a block of the diagonal.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.geometry import GROUPS, Geometry
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.config import CLUSTER, LoraConfig
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, dealt, dealt_item, over_chunks, stage_chunks, stage_height
from pallas_kernels.lora.plan import PAGE_START, TOKEN, group_fields


def split_chunks(geometry: Geometry, group: str, config: LoraConfig, chunk: int) -> tuple[int, int, int]:
    """(chunks of columns in all, in a split, number of splits) of a group's input width."""
    total = geometry.in_tiles(GROUPS[group][0]) // chunk
    per_split = static_ceil_div(total, config.num_splits)
    return total, per_split, static_ceil_div(total, per_split)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkItem:
    """block: token block. token: its first row. first_split, num_splits: of the item; none if the adapter has no such
    granules.

    section: first tile of the group's A section; pages: ids of its page and the next. first_granule: of the item in
    that section; granules: how many, up to eight. height: granules that a split takes in a stage (2, 4 or 8); packed:
    splits in a stage.
    """

    block: Any
    token: Any
    page_start: Any
    section: Any
    pages: tuple
    first_granule: Any
    granules: Any
    height: Any
    packed: Any
    first_split: Any
    num_splits: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkItems:
    """The items of a launch, dealt out to the programs: a token block, 64 stacked ranks and a part of the splits each.

    Rank blocks are the slowest to change: where an adapter has fewer than the largest, its items are empty.
    """

    geometry: Geometry
    group: str
    config: LoraConfig
    chunk: int
    num_blocks: Any
    rank_blocks: Any
    records: Any
    layer: Any

    @property
    def splits(self) -> int:
        return self._cut()[2]

    def _cut(self):
        return split_chunks(self.geometry, self.group, self.config, self.chunk)

    def part(self, part):
        """First split of a part, and how many it has."""
        each = static_ceil_div(self.splits, CLUSTER)
        return part * each, jnp.clip(self.splits - part * each, 0, each)

    def local(self, cta):
        """Items of program `cta`."""
        return dealt(self.num_blocks * self.rank_blocks * CLUSTER, cta, self.config.expand_ctas)

    def _place(self, cta, n):
        """Of item n of program `cta`: token block, rank block and part."""
        item, parts = dealt_item(cta, n, self.config.expand_ctas), jnp.int32(CLUSTER)
        rest = lax.div(item, parts)
        rank_block = lax.div(rest, jnp.maximum(self.num_blocks, 1))
        # A program without items describes one all the same.
        block = jnp.maximum(jnp.minimum(rest - rank_block * self.num_blocks, self.num_blocks - 1), 0)
        return block, rank_block, lax.rem(item, parts)

    def fetch(self, cta, n) -> list:
        """What `describe` needs of item n's record."""
        block, _, _ = self._place(cta, n)
        fields = (TOKEN, PAGE_START, *group_fields(self.group))
        return [self.records[block, self.layer, i] for i in fields]

    def describe(self, cta, n, fetched) -> ShrinkItem:
        """Item n of program `cta`."""
        block, rank_block, part = self._place(cta, n)
        token, page_start, section, total, *pages = fetched
        granules = jnp.clip(total - rank_block * STAGE_CHUNKS, 0, STAGE_CHUNKS)
        first_split, num_splits = self.part(part)
        height = self.height(granules)
        return ShrinkItem(
            block=block,
            token=token,
            page_start=page_start,
            section=section,
            pages=tuple(pages),
            first_granule=rank_block * STAGE_CHUNKS,
            granules=granules,
            height=height,
            packed=stage_chunks(height),
            first_split=first_split,
            num_splits=jnp.where(granules > 0, num_splits, 0),
        )

    def height(self, granules):
        return stage_height(granules, self.config.shrink_packed)

    def sets(self, item: ShrinkItem):
        return over_chunks(item.num_splits, item.packed)

    def split(self, item: ShrinkItem, number, place):
        """Of the split in a place of a set: its number, whether there is one, and its chunks of columns."""
        total, per_split, _ = self._cut()
        offset = number * item.packed + place
        split = item.first_split + offset
        valid = (place < item.packed) & (offset < item.num_splits)
        return split, valid, jnp.clip(total - split * per_split, 1, per_split)

    def stages(self, item: ShrinkItem, number):
        """Stages of a set: as many as its first split has chunks, which is the longest."""
        return self.split(item, number, 0)[2]

    def all_stages(self, item: ShrinkItem):
        return lax.fori_loop(0, self.sets(item), lambda number, n: n + self.stages(item, number), jnp.int32(0))

    @property
    def ragged(self) -> bool:
        """Whether the last split is shorter than the others."""
        total, per_split, _ = self._cut()
        return total % per_split > 0

    def columns(self, item: ShrinkItem, number, place):
        """Stage -> first tile of the columns in a place, whether there are any, and whether they are not only its last
        ones repeated.
        """
        split, valid, length = self.split(item, number, place)
        first = split * self._cut()[1]

        def at(stage):
            return (first + jnp.minimum(stage, length - 1)) * self.chunk, valid, valid & (stage < length)

        return at

    def place(self, item: ShrinkItem, s):
        """Place and granule that chunk s of a stage belongs to."""
        place = sum(jnp.where(s >= n * item.height, 1, 0) for n in range(1, self.config.shrink_packed))
        return place, s - place * item.height
