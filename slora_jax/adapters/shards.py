"""An adapter cut for several devices: each one's image holds the tiles it needs, and no others.

A device's image is the tiles of A of all layers (groups in order, in a group the modules' granules one after another),
then, from the next page slice on, the tiles of B of all layers. The same page ids hold it on every device.
"""

from collections.abc import Sequence
import dataclasses
import functools

from jaxtyping import Int32
import numpy as np

from pallas_kernels.geometry import GROUPS, MODULES, TILE_COLS, TILE_RANKS, ceil_div
from sharding import ROW_GROUPS, Layout, run_length, take
from slora_jax.adapters.adapter import Adapter
from slora_jax.adapters.host_memory import map_zeros
from slora_jax.adapters.image import layer_tiles, write_tiles
from slora_jax.adapters.shape import AdapterShape


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdapterShards:
    """Where the tiles of an adapter lie on each device.

    first_granule: first granule of each module's A that a device has. shrink_granules: how many it has.
    shrink_start, expand_start: tile of its image at which a layer's A and B begin. num_pages: page ids that it takes.
    """

    first_granule: Int32[np.ndarray, "N L 7"]
    shrink_granules: Int32[np.ndarray, "N L 7"]
    shrink_start: Int32[np.ndarray, "N L"]
    expand_start: Int32[np.ndarray, "N L"]
    num_pages: int


def shard_adapter(adapter: AdapterShape, layout: Layout) -> AdapterShards:
    """The plan of an adapter's images under a layout."""
    return _plan(adapter.granules.tobytes(), layout)


@functools.lru_cache(maxsize=1024)  # every step asks again, and many adapters have the same ranks
def _plan(granules_bytes: bytes, layout: Layout) -> AdapterShards:
    granules = np.frombuffer(granules_bytes, np.int32).reshape(-1, len(MODULES))
    first, count = _granule_runs(granules, layout)
    a_tiles = np.stack([layer_tiles(c, layout.shrink) for c in count])
    b_tiles = layer_tiles(granules, layout.expand)
    page_tiles = layout.local.page_tiles
    b_first = -(-a_tiles.sum(axis=1) // page_tiles) * page_tiles
    total = int(b_first.max() + b_tiles.sum())
    return AdapterShards(
        first_granule=first,
        shrink_granules=count,
        shrink_start=(np.cumsum(a_tiles, axis=1) - a_tiles).astype(np.int32),
        expand_start=(b_first[:, None] + np.cumsum(b_tiles) - b_tiles).astype(np.int32),
        num_pages=ceil_div(total, layout.local.tiles_per_page_id),
    )


def shard_image(adapter: Adapter, layout: Layout, device: int, dtype: np.dtype) -> np.ndarray:
    """One device's image: a fresh array of `dtype` [num_pages, L, E of that device], not scaled."""
    shards = shard_adapter(adapter, layout)
    geometry = layout.local
    image = map_zeros((shards.num_pages, geometry.num_layers, geometry.page_elements), dtype)
    run = image.reshape(-1, TILE_RANKS, TILE_COLS)
    at, b_at = 0, int(shards.expand_start[device, 0])
    for layer, granules in enumerate(adapter.granules):
        for m in np.flatnonzero(granules).tolist():
            start = int(shards.first_granule[device, layer, m]) * TILE_RANKS
            stop = start + int(shards.shrink_granules[device, layer, m]) * TILE_RANKS
            a = adapter.weights.factor(layer, m, 0)[start:stop]
            at = write_tiles(run, at, take(a, 1, layout.inputs(m)[device]))
            b = adapter.weights.factor(layer, m, 1).T
            b_at = write_tiles(run, b_at, take(b, 1, layout.outputs(m)[device]))
    return image


def table_rows(adapters: Sequence[AdapterShape], layout: Layout, size: int) -> dict[str, np.ndarray]:
    """The fields of a ShardedTable that differ between devices, for a table of `size` rows."""
    layers = layout.geometry.num_layers
    granules = np.zeros((layout.devices, size, layers, len(MODULES)), np.int32)
    starts = np.zeros((2, layout.devices, size, layers), np.int32)
    for row, adapter in enumerate(adapters):
        shards = shard_adapter(adapter, layout)
        granules[:, row] = shards.shrink_granules
        starts[:, :, row] = shards.shrink_start, shards.expand_start
    return dict(shrink_granules=granules, shrink_start=starts[0], expand_start=starts[1])


def _granule_runs(granules: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """First granule and number of granules of A on each device, int32 [N, L, 7].

    Whole everywhere, but in the column groups of s-lora's layout a group's stacked granules are cut in N runs.
    """
    first = np.zeros((layout.devices, *granules.shape), np.int32)
    count = np.broadcast_to(granules, first.shape).astype(np.int32)
    device = np.arange(layout.devices)[:, None, None]
    for group, modules in GROUPS.items():
        if group in ROW_GROUPS or layout.lora_layout(group) == "comm-free":
            continue
        own = granules[:, list(modules)]
        run = run_length(own.sum(axis=1), layout.devices)[:, None]
        before = np.cumsum(own, axis=1) - own
        low = np.clip(device * run - before, 0, own)
        high = np.clip((device + 1) * run - before, 0, own)
        first[:, :, list(modules)] = low
        count[:, :, list(modules)] = high - low
    return first, count
