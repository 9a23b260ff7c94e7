"""Into how many ranges of outputs the kernel that shrinks and expands in one launch cuts a token block's items.

A cluster that takes a range reads all of A once more, from the L2 cache: a cut is worth it only where one item would
keep its cluster at work longer than the others.
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.config import CLUSTERS

MAX_LOG_RANGES = 3
_EARLY, _FEW = 5 / 6, 3 / 4
"""A range may have this much of the mean load where all ranges of the blocks that are cut take so few of the clusters
that others are left over to make up for it.
"""


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
