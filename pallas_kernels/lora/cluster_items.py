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
from pallas_kernels.lora.ranges import num_ranges, range_of
from pallas_kernels.lora.short_items import ShrinkItem, ShrinkItems

_LOG_CLUSTER = CLUSTER.bit_length() - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AddItem:
    """shrink: the thread block's part of the splits, of all ranks: see `AddItems.shrink_of`. expand: its part of the
    outputs. rank_tiles: how many times 64 ranks there are; 0 if the cluster has no outputs: the adapter does not target
    the module, or a narrow one has fewer chunks than ranges.
    """

    shrink: ShrinkItem
    expand: ExpandItem
    rank_tiles: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddItems:
    """The items of a launch, numbered token block by token block, the largest first, and dealt out to the clusters.

    An item of a large token block covers a range of the module's outputs, and all its ranges shrink alike.

    shrink, expand: what is known of the two halves. cut: how many blocks have at least 2, 4 and 8 ranges. part: which
    thread block of its cluster this one is.
    """

    shrink: ShrinkItems
    expand: ExpandItems
    cut: tuple[Any, ...]
    cluster: Any
    part: Any

    @property
    def _modules(self) -> tuple[int, ...]:
        return GROUPS[self.expand.group]

    @property
    def count(self):
        """Items of this cluster."""
        total = num_ranges(self.expand.num_blocks, self.cut, len(self._modules))
        return dealt(total, self.cluster, CLUSTERS)

    def _place(self, n):
        """Of item n: token block, its module's number, output tiles and first tile of `out`, the range, and the binary
        logarithm of the ranges.
        """
        number = len(self._modules)
        index, log_ranges, part = range_of(dealt_item(self.cluster, n, CLUSTERS), self.cut, number)
        which = lax.rem(index, jnp.int32(number))
        geometry, tile = self.expand.geometry, 0
        chosen = [jnp.int32(0)] * 3
        for i, m in enumerate(self._modules):
            values = (m, geometry.out_tiles(m), tile)
            chosen = [jnp.where(which == i, v, old) for v, old in zip(values, chosen, strict=True)]
            tile += geometry.out_tiles(m)
        return lax.div(index, jnp.int32(number)), chosen, part, log_ranges

    def fetch(self, n) -> list:
        """What `describe` needs of item n's records."""
        block, (module, *_), *_ = self._place(n)
        fields = (PAGE_START, *group_fields(self.shrink.group))
        a = [self.shrink.records[block, self.shrink.layer, i] for i in fields]
        return [*a, *self.expand.fetch_of(block, module)]

    def describe(self, n, fetched) -> AddItem:
        block, (module, width, out_tile), number, log_ranges = self._place(n)
        (a_page_start, section, _, *a_pages), b = fetched[:5], fetched[5:]
        chunks, log_parts = lax.div(width, jnp.int32(self.expand.chunk)), log_ranges + _LOG_CLUSTER
        per_part = (chunks + (1 << log_parts) - 1) >> log_parts
        first = number * CLUSTER * per_part
        expand = self.expand.item(block, module, width, out_tile, first + self.part * per_part, per_part, b)
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
        rank_tiles = jnp.where((expand.granules > 0) & (first < chunks), expand.rank_tiles, 0)
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
