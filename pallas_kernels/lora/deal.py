"""Which cluster of the kernel that shrinks and expands in one launch takes which items, listed once a step.

An item is a range of a token block's outputs in one module, see ranges.py. The kernel's roles only look up what their
cluster has: to find it themselves took each of them up to a microsecond a launch.
"""

from typing import Any, NamedTuple

from jax import numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.config import CLUSTERS
from pallas_kernels.lora.mosaic_common import dealt, dealt_item
from pallas_kernels.lora.ranges import MAX_LOG_RANGES, num_ranges, range_of

COUNT, START, FIRST = range(3)
"""Fields of a cluster's head: how many items it has, where they begin in the list, and the first EARLY of them once
more, or the last one where there are fewer: whoever looks them up in the list waits for the head first.
"""
EARLY = 3
_LARGE = 0.7
"""An item of this part of what the clusters have on average is dealt to one of its own."""
_MODULES = tuple(len(m) for m in GROUPS.values())
_PART_BITS, _LOG_BITS, _MODULE_BITS = 3, 2, 2


class Place(NamedTuple):
    """What an item is. block: token block. module: in its group. log_ranges: binary logarithm of the block's ranges.
    part: which of them.
    """

    block: Any
    module: Any
    log_ranges: Any
    part: Any

    def pack(self):
        """As one int32."""
        head = (self.block << _MODULE_BITS | self.module) << _LOG_BITS | self.log_ranges
        return head << _PART_BITS | self.part

    @classmethod
    def unpack(cls, packed) -> "Place":
        low = lambda value, bits: value & ((1 << bits) - 1)  # noqa: E731
        head = packed >> _PART_BITS
        rest = head >> _LOG_BITS
        return cls(rest >> _MODULE_BITS, low(rest, _MODULE_BITS), low(head, _LOG_BITS), low(packed, _PART_BITS))


class Deal(NamedTuple):
    """How a launch's items, largest first, are dealt to the clusters: the first `alone` clusters have one item each,
    those from there to `large` one each and the last `small` items by turns, and the others the items between these.
    """

    alone: Any
    large: Any
    small: Any

    def length(self, total, cluster):
        """Items of a cluster, of `total`."""
        is_large = cluster < self.large
        others = dealt(jnp.where(is_large, self.small, self._rest(total)), *self._place(cluster))
        one = jnp.where(is_large, jnp.clip(total - cluster, 0, 1), 0)
        return one + jnp.where(cluster < self.alone, 0, others)

    def item(self, total, cluster, n):
        """Number of a cluster's n-th item."""
        is_large = cluster < self.large
        place, number = self._place(cluster)
        within = dealt_item(place, n - jnp.where(is_large, 1, 0), number) + self.large
        return jnp.where(is_large & (n == 0), cluster, within + jnp.where(is_large, self._rest(total), 0))

    def _rest(self, total):
        """Items of clusters without a large one."""
        return total - self.large - self.small

    def _place(self, cluster):
        """A cluster's place among those that are dealt the same items, and their number."""
        is_large = cluster < self.large
        number = jnp.where(is_large, self.large - self.alone, CLUSTERS - self.large)
        return cluster - jnp.where(is_large, self.alone, self.large), jnp.maximum(number, 1)


def deal_blocks(granules: Int[Array, "NT 4"], cut: Int[Array, "4 3"], used) -> Deal:
    """The deal of each group, arrays int32[4]. granules, cut: see `cut_blocks`. used: token blocks in use.

    Dealt in rounds, every other one backwards, a cluster with a large item would have one in each round all the same.
    So who has more than the mean has no other, and who has nearly as much as the others have on average gets the
    smallest items for the rest, as Graham's rule, the next largest to whoever has least, would have it.
    """
    blocks = jnp.arange(granules.shape[0])
    ranges = 1 << jnp.sum(blocks[:, None, None] < cut, axis=2)  # [NT, 4]
    each = granules / jnp.array(_MODULES) * (1 + 1 / ranges)  # A and a range's part of B
    number = jnp.where(blocks[:, None] < used, ranges * jnp.array(_MODULES), 0)
    load = number * each
    first = blocks[:, None] < blocks  # of [NT, NT]: the first block comes before the second

    def leading(holds):
        """Of blocks, those before the first for which this does not hold."""
        broken = jnp.sum(jnp.where(first[..., None], jnp.where(holds, 0, 1)[:, None], 0), axis=0)
        return holds & (broken == 0)

    total = jnp.sum(load, axis=0)
    is_alone = leading((number > 0) & (each * CLUSTERS > total))
    alone = jnp.sum(jnp.where(is_alone, number, 0), axis=0)
    level = (total - jnp.sum(jnp.where(is_alone, load, 0), axis=0)) / jnp.maximum(CLUSTERS - alone, 1)
    is_large = leading(is_alone | ((number > 0) & (each > _LARGE * level)))
    large = jnp.sum(jnp.where(is_large, number, 0), axis=0)
    is_large = jnp.where(large <= CLUSTERS, is_large, is_alone)
    large = jnp.where(large <= CLUSTERS, large, alone)
    room = jnp.sum(jnp.where(is_large & ~is_alone, number * jnp.maximum(level - each, 0), 0), axis=0)
    after = jnp.sum(jnp.where(first[..., None], load, 0), axis=1)  # [NT, 4]: of later blocks
    fitting = jnp.where(each > 0, (room - after) / jnp.maximum(each, 1e-6), jnp.where(room >= after, number, 0))
    fitting = jnp.clip(jnp.floor(fitting).astype(jnp.int32), 0, number)
    small = jnp.sum(jnp.where(is_large, 0, fitting), axis=0)
    rest = jnp.sum(number, axis=0) - large
    small = jnp.where(large == alone, 0, jnp.where(large == CLUSTERS, rest, small))
    return Deal(*(n.astype(jnp.int32) for n in (alone, large, small)))


def list_items(
    granules: Int[Array, "NT 4"], cut: Int[Array, "4 3"], used
) -> tuple[Int[Array, "C 4 5"], Int[Array, "M 4"]]:
    """For each group heads of the clusters, and all clusters' items, those of each cluster one after another, then
    zeros. Arguments as of deal_blocks.
    """
    deal, modules = deal_blocks(granules, cut, used), jnp.array(_MODULES, jnp.int32)
    cuts = tuple(cut[:, i] for i in range(MAX_LOG_RANGES))
    total = num_ranges(used, cuts, modules)
    clusters = jnp.arange(CLUSTERS, dtype=jnp.int32)[:, None]
    lengths = deal.length(total, jnp.broadcast_to(clusters, (CLUSTERS, len(_MODULES))))
    earlier = (clusters < clusters.T)[..., None]
    before = jnp.sum(jnp.where(earlier, lengths[:, None], 0), axis=0, dtype=jnp.int32)

    def packed(cluster, n):
        item, log_ranges, part = range_of(deal.item(total, cluster, n), cuts, modules)
        return Place(item // modules, item % modules, log_ranges, part).pack()

    # The ranges of blocks that are cut are no more than clusters.
    most = granules.shape[0] * max(_MODULES) + CLUSTERS
    at = jnp.arange(most, dtype=jnp.int32)[:, None]
    ended = before + lengths <= at[:, None]  # [M, C, 4]
    cluster = jnp.minimum(jnp.sum(ended, axis=1, dtype=jnp.int32), CLUSTERS - 1)
    n = at - jnp.sum(jnp.where(ended, lengths, 0), axis=1, dtype=jnp.int32)
    items = jnp.where(at < total, packed(cluster, n), 0)
    every, last = jnp.broadcast_to(clusters, lengths.shape), jnp.maximum(lengths - 1, 0)
    early = [jnp.where(lengths > 0, packed(every, jnp.minimum(n, last)), 0) for n in range(EARLY)]
    return jnp.stack([lengths, before, *early], axis=2), items
