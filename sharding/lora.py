"""A group of projections with its adapters, inside shard_map, in either layout.

The base projection is this device's part; `project` adds the deltas and, for o and down, sums over the devices.

- **comm-free**: qkv and gu have all of A and their columns of B; o and down have their inputs' part of A and all of B,
  so that the deltas are partial sums too, which the base's all-reduce completes. No collective of its own.
- **s-lora** (arXiv 2311.03285, section 6): nothing is on two devices. qkv and gu: a group's stacked ranks are cut in N
  runs of whole granules, and one all-gather joins ``x A`` of the whole group. o and down: A is split over inputs, one
  all-reduce joins ``x A``; B is split over outputs, and its slice is added to that slice of the base's partial sum, so
  that the base's all-reduce gathers it.
"""

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import GROUPS, Implementation, lora_expand, lora_shrink
from pallas_kernels.geometry import TILE_RANKS, ceil_div
from sharding.collectives import sum_rows
from sharding.layout import ROW_GROUPS, Layout
from sharding.mesh import AXIS
from sharding.table import ShardedTable


def project(
    x: Float[Array, "T c"],
    base: Float[Array, "T d"],
    pages: Float[Array, "L P E"],
    table: ShardedTable | None,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    layout: Layout,
    max_rank: int,
    implementation: Implementation,
) -> Float[Array, "T d"]:
    """`base` with every token's delta. table: None leaves the adapters out. Otherwise as lora_shrink."""
    row = group in ROW_GROUPS
    if table is not None:
        scattered = layout.lora_layout(group) == "s-lora"
        # between the collectives y must be [T, stacked ranks], which is the XLA implementation's layout
        options: dict[str, Any] = dict(
            layer=layer, group=group, max_rank=max_rank, implementation="xla" if scattered else implementation
        )
        y = lora_shrink(x, pages, table.shrink(), seg_start, seg_adapter, geometry=layout.shrink, **options)
        if scattered and row:
            y = lax.psum(y, AXIS)
        elif scattered:
            granules = table.granules[:, layer][:, jnp.array(GROUPS[group])].sum(axis=1)
            y = _gather_ranks(y, granules, seg_start, seg_adapter, layout.devices)
        args = (y, pages, table.expand(), seg_start, seg_adapter)
        options |= dict(geometry=layout.expand)
        if scattered and row:
            base = _expand_slice(base, *args, devices=layout.devices, **options)
        else:
            base = lora_expand(base, *args, **options)
    return sum_rows(base) if row else base


def run_length(granules: Any, devices: int) -> Any:
    """Granules of a group's stacked ranks that each device but the last has in s-lora's layout."""
    return -(-granules // devices)


def _gather_ranks(
    y: Float[Array, "T R"],
    granules: Int[Array, "A"],
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    devices: int,
) -> Float[Array, "T R"]:
    """All stacked ranks of every token, from the run of them that each device has in its leading columns.

    One all-gather of as many columns as the longest run may have. Shorter runs leave gaps between the devices' parts;
    one gather closes them, token by token, because adapters differ in rank.
    granules: stacked granules of each adapter in this group and layer.
    """
    tokens, columns = y.shape[0], y.shape[1] // TILE_RANKS
    most = ceil_div(columns, devices)
    joined = lax.all_gather(y[:, : most * TILE_RANKS], AXIS, axis=1, tiled=True)
    row = jnp.arange(tokens, dtype=jnp.int32)
    segment = jnp.minimum(jnp.searchsorted(seg_start[1:], row, side="right"), seg_adapter.shape[0] - 1)
    run = jnp.maximum(run_length(granules[jnp.maximum(seg_adapter[segment], 0)], devices), 1)[:, None]
    column = jnp.arange(columns, dtype=jnp.int32)
    source = jnp.minimum(column // run * most + column % run, devices * most - 1)
    parts = joined.reshape(tokens, devices * most, TILE_RANKS)
    return jnp.take_along_axis(parts, source[:, :, None], axis=1).reshape(y.shape)


def _expand_slice(base: Float[Array, "T H"], *args, devices, geometry, group, **options) -> jax.Array:
    """Adds this device's slice of the outputs to a partial sum of all outputs."""
    hidden, width = base.shape[1], geometry.out_sizes[GROUPS[group][0]]
    padded = jnp.pad(base, ((0, 0), (0, devices * width - hidden)))
    start = lax.axis_index(AXIS) * width
    part = lax.dynamic_slice_in_dim(padded, start, width, axis=1)
    part = lora_expand(part, *args, geometry=geometry, group=group, **options)
    return lax.dynamic_update_slice_in_dim(padded, part, start, axis=1)[:, :hidden]
