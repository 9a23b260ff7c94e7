"""Work items of the kernel that shrinks and expands in one launch: a token block and a module each, for a cluster of
thread blocks that share its input width and then its outputs.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.geometry import GROUPS, TILE_RANKS
from pallas_kernels.lora.config import CLUSTER, CLUSTERS
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, dealt, dealt_item, stage_chunks
from pallas_kernels.lora.plan import PAGE_START, group_fields
from pallas_kernels.lora.short_items import ShrinkItem, ShrinkItems

_LOG_CLUSTER = CLUSTER.bit_length() - 1
_MAX_LOG_RANGES = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AddItem:
    """shrink: the thread block's part of the splits, of all ranks: see `AddItems.shrink_of`. expand: its part of the
    outputs. rank_tiles: how many times 64 ranks there are; 0 if the adapter does not target the module.
    """

    shrink: ShrinkItem
    expand: ExpandItem
    rank_tiles: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddItems:
    """The items of a launch, numbered token block by token block and dealt out to the clusters.

    Where there are few, an item covers a range of the module's outputs, and all its ranges shrink alike: who would have
    nothing to do reads A once more, from the L2 cache.

    shrink, expand: what is known of the two halves. part: which thread block of its cluster this one is.
    """

    shrink: ShrinkItems
    expand: ExpandItems
    cluster: Any
    part: Any

    @property
    def _modules(self) -> tuple[int, ...]:
        return GROUPS[self.expand.group]

    @property
    def _log_ranges(self):
        """Binary logarithm of the ranges of a module."""
        items = self.expand.num_blocks * len(self._modules)
        return sum(jnp.where(items << n <= CLUSTERS, 1, 0) for n in range(1, _MAX_LOG_RANGES + 1))

    @property
    def count(self):
        """Items of this cluster."""
        items = self.expand.num_blocks * len(self._modules)
        return dealt(items << self._log_ranges, self.cluster, CLUSTERS)

    def _place(self, n):
        """Of item n: token block, its module's number, output tiles and first tile of `out`, and the range."""
        index, number, log_ranges = dealt_item(self.cluster, n, CLUSTERS), len(self._modules), self._log_ranges
        part = index & ((1 << log_ranges) - 1)
        index = index >> log_ranges
        which = lax.rem(index, jnp.int32(number))
        geometry, tile = self.expand.geometry, 0
        chosen = [jnp.int32(0)] * 3
        for i, m in enumerate(self._modules):
            values = (m, geometry.out_tiles(m), tile)
            chosen = [jnp.where(which == i, v, old) for v, old in zip(values, chosen, strict=True)]
            tile += geometry.out_tiles(m)
        return lax.div(index, jnp.int32(number)), chosen, part

    def fetch(self, n) -> list:
        """What `describe` needs of item n's records."""
        block, (module, *_), _ = self._place(n)
        fields = (PAGE_START, *group_fields(self.shrink.group))
        a = [self.shrink.records[block, self.shrink.layer, i] for i in fields]
        return [*a, *self.expand.fetch_of(block, module)]

    def describe(self, n, fetched) -> AddItem:
        block, (module, width, out_tile), number = self._place(n)
        (a_page_start, section, _, *a_pages), b = fetched[:5], fetched[5:]
        chunks, parts = lax.div(width, jnp.int32(self.expand.chunk)), CLUSTER << self._log_ranges
        per_part = (chunks + parts - 1) >> (self._log_ranges + _LOG_CLUSTER)
        first = (number * CLUSTER + self.part) * per_part
        expand = self.expand.item(block, module, width, out_tile, first, per_part, b)
        first_split, num_splits = self.shrink.part(self.part)
        shrink = ShrinkItem(
            block=block,
            token=expand.token,
            page_start=a_page_start,
            section=section,
            pages=tuple(a_pages),
            first_granule=lax.div(expand.y_row, jnp.int32(TILE_RANKS)),
            granules=expand.granules,
            height=expand.height,
            packed=expand.packed,
            first_split=first_split,
            num_splits=num_splits,
        )
        rank_tiles = jnp.where(expand.granules > 0, expand.rank_tiles, 0)
        return AddItem(shrink=shrink, expand=expand, rank_tiles=rank_tiles)

    def shrink_of(self, item: AddItem, rank_tile) -> ShrinkItem:
        """The thread block's part of 64 ranks."""
        granules = jnp.clip(item.shrink.granules - rank_tile * STAGE_CHUNKS, 0, STAGE_CHUNKS)
        height = self.shrink.height(granules)
        return dataclasses.replace(
            item.shrink,
            first_granule=item.shrink.first_granule + rank_tile * STAGE_CHUNKS,
            granules=granules,
            height=height,
            packed=stage_chunks(height),
        )

    def shrink_stages(self, item: AddItem):
        each = lambda k, n: n + self.shrink.all_stages(self.shrink_of(item, k))  # noqa: E731
        return lax.fori_loop(0, item.rank_tiles, each, jnp.int32(0))
