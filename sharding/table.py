"""Where the adapters of a step lie in each device's part of the page pool."""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from pallas_kernels import AdapterTable
from sharding.mesh import WHOLE, partition

PER_DEVICE = ("shrink_granules", "shrink_start", "expand_start")
"""Fields of a ShardedTable with an entry for each device."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedTable:
    """An AdapterTable for N devices. An adapter has the same page ids on all of them, and on each an image of its own:
    the tiles of A of all layers, then, from the next page slice on, those of B.

    The first four fields are the same on all devices; the others have one entry for each.
    """

    pages: Any  # int32 [PT], as in AdapterTable
    page_start: Any  # int32 [A]
    granules: Any  # int32 [A, L, 7]: of the whole adapter, which are those of every device's B
    scaling: Any  # float32 [A, L, 7]
    shrink_granules: Any  # int32 [N, A, L, 7]: of the device's A
    shrink_start: Any  # int32 [N, A, L]: tile at which the layer's A begins in the device's image
    expand_start: Any  # int32 [N, A, L]: the same for B

    def shrink(self) -> AdapterTable:
        """The A of this device, inside shard_map: the leading axis has one entry."""
        return AdapterTable(
            pages=self.pages,
            page_start=self.page_start,
            tile_start=self.shrink_start[0],
            granules=self.shrink_granules[0],
            scaling=self.scaling,
        )

    def expand(self) -> AdapterTable:
        """The B of this device, inside shard_map."""
        return AdapterTable(
            pages=self.pages,
            page_start=self.page_start,
            tile_start=self.expand_start[0],
            granules=self.granules,
            scaling=self.scaling,
        )

    @staticmethod
    def specs() -> "ShardedTable":
        """PartitionSpec of each field."""
        device: PartitionSpec = partition("device")
        names = [field.name for field in dataclasses.fields(ShardedTable)]
        return ShardedTable(**{name: device if name in PER_DEVICE else WHOLE for name in names})
