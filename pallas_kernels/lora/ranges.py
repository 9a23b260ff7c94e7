"""Into how many ranges of outputs the kernel that shrinks and expands in one launch cuts a token block's items, and
which cluster takes which.

A cluster that takes a range reads all of A once more, from the L2 cache: a cut is worth it only where one item would
keep its cluster at work longer than the others.
"""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.config import CLUSTERS
from pallas_kernels.lora.mosaic_common import dealt, dealt_item

MAX_LOG_RANGES = 3
_EARLY, _FEW = 5 / 6, 3 / 4
"""A range may have this much of the mean load where all ranges of the blocks that are cut take so few of the clusters
that others are left over to make up for it.
"""
_LARGE = 0.7
"""An item of this part of what the clusters have on average is dealt to one of its own."""


def cut_blocks(granules: Int[Array, "NT 4"]) -> Int[Array, "4 3"]:
    """For each group, how many token blocks are cut into at least 2, 4 and 8 ranges: those of most granules.

    granules: a token block's in each group, 0 of blocks that are not in use. A block has as many ranges, a power of
    two, as leave each no less than the mean load of a cluster, were A not read again. So the ranges of those that are
    cut take no more than their share of the clusters, and what is alike and enough for all clusters stays whole.
    """
    modules = jnp.array([len(m) for m in GROUPS.values()], jnp.float32)
    # An item has granules / modules, and the mean load is the sum over CLUSTERS.
    mean = modules * jnp.maximum(jnp.sum(granules, axis=0, dtype=jnp.float32), 1)
    least = jnp.array(np.outer((1, _EARLY), 2 ** np.arange(1, MAX_LOG_RANGES + 1)), jnp.float32)
    enough = granules[:, None, :, None] * jnp.float32(CLUSTERS) >= least[:, None] * mean[:, None]  # [NT, 2, 4, 3]
    count = jnp.sum(enough, axis=0, dtype=jnp.int32)
    strict, early = count
    # From one range to two, from two to four and from four to eight.
    taken = modules * jnp.sum(early * jnp.array([2, 2, 4]), axis=1)
    return jnp.where((taken <= _FEW * CLUSTERS)[:, None], early, strict)


def range_of(index, cut, modules: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of range `index` of a launch: the number of its item (token block by token block, `modules` each), the binary
    logarithm of the item's ranges, and which of them it is.

    cut: a group's row of `cut_blocks`, int32 scalars. Items of the most ranges come first.
    """
    item = log_ranges = part = first = start = jnp.int32(0)
    for log, stop in zip(range(MAX_LOG_RANGES, -1, -1), (*reversed(cut), None), strict=True):
        # Items from `first` on, ranges from `start` on.
        within = index - start
        item = jnp.where(within >= 0, first + (within >> log), item)
        log_ranges = jnp.where(within >= 0, log, log_ranges)
        part = jnp.where(within >= 0, within & ((1 << log) - 1), part)
        if stop is not None:
            start, first = start + ((stop * modules - first) << log), stop * modules
    return item, log_ranges, part


def num_ranges(num_blocks, cut, modules: int):
    """Of all items of a launch."""
    more = sum((blocks << log) for log, blocks in enumerate(cut))
    return (num_blocks + more) * modules


class Deal(NamedTuple):
    """How a launch's items, largest first, are dealt to the clusters: the first `alone` clusters have one item each,
    those from there to `large` one each and the last `small` items by turns, and the others the items between these.
    """

    alone: Any
    large: Any
    small: Any

    def length(self, total, cluster):
        """Items of a cluster, of `total`."""
        rest, clusters = self._rest(total)
        others = dealt(jnp.where(cluster < self.large, self.small, rest), *self._place(cluster, clusters))
        one = jnp.where(cluster < self.large, jnp.minimum(jnp.maximum(total - cluster, 0), 1), 0)
        return one + jnp.where(cluster < self.alone, 0, others)

    def item(self, total, cluster, n):
        """Number of a cluster's n-th item."""
        rest, clusters = self._rest(total)
        is_large = cluster < self.large
        within = dealt_item(*self._turn(cluster, clusters, n - jnp.where(is_large, 1, 0)))
        return jnp.where(is_large & (n == 0), cluster, within + jnp.where(is_large, self.large + rest, self.large))

    def _rest(self, total):
        """Items of clusters without a large one, and the number of these clusters."""
        return total - self.large - self.small, CLUSTERS - self.large

    def _place(self, cluster, clusters):
        """A cluster's place among those that are dealt the same items, and their number."""
        is_large = cluster < self.large
        place = cluster - jnp.where(is_large, self.alone, self.large)
        return place, jnp.maximum(jnp.where(is_large, self.large - self.alone, clusters), 1)

    def _turn(self, cluster, clusters, n):
        place, number = self._place(cluster, clusters)
        return place, n, number


def deal_blocks(granules: Int[Array, "NT 4"], cut: Int[Array, "4 3"], used) -> Int[Array, "4 3"]:
    """The `Deal` of each group. granules, cut: see `cut_blocks`. used: token blocks in use.

    Dealt in rounds, every other one backwards, a cluster with a large item would have one in each round all the same.
    So who has more than the mean has no other, and who has nearly as much as the others have on average gets the
    smallest items for the rest, as Graham's rule, the next largest to whoever has least, would have it.
    """
    blocks = jnp.arange(granules.shape[0])
    modules = jnp.array([len(m) for m in GROUPS.values()])
    ranges = 1 << jnp.sum(blocks[:, None, None] < cut, axis=2)  # [NT, 4]
    each = granules / modules * (1 + 1 / ranges)  # A and a range's part of B
    number = jnp.where(blocks[:, None] < used, ranges * modules, 0)
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
    return jnp.stack([alone, large, small], axis=1).astype(jnp.int32)
