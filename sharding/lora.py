"""A group of projections with its adapters, inside shard_map, in either layout.

The base projection is this device's part; `project` adds the deltas and, for o and down, sums over the devices.

- **comm-free**: qkv and gu have all of A and their columns of B; o and down have their inputs' part of A and all of B,
  so that the deltas are partial sums too, which the base's all-reduce completes. No collective of its own.
- **s-lora** (arXiv 2311.03285, section 6): nothing is on two devices. qkv and gu: a group's stacked ranks are cut in N
  runs of whole granules, and one all-gather joins ``x A`` of the whole group. o and down: A is split over inputs, one
  all-reduce joins ``x A``; B is split over outputs, and its slice is added to that slice of the base's partial sum, so
  that the base's all-reduce gathers it.
"""

from collections.abc import Callable
from typing import Any

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import GROUPS, Implementation, lora_expand, lora_matmul, lora_shrink
from pallas_kernels.geometry import TILE_RANKS, ceil_div
from pallas_kernels.lora import from_token_rows, pair_implementation, to_token_rows
from sharding.collectives import sum_rows
from sharding.layout import ROW_GROUPS, Layout
from sharding.mesh import AXIS
from sharding.table import ShardedTable


def project(
    x: Float[Array, "T c"],
    weights: Float[Array, "L c d"] | None,
    base: Callable[[], Float[Array, "T d"]],
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
    """``base()`` with every token's delta. table: None leaves the adapters out. Otherwise as lora_matmul."""
    row = group in ROW_GROUPS
    if table is None:
        return sum_rows(base()) if row else base()
    options: dict[str, Any] = dict(group=group, max_rank=max_rank)
    if layout.lora_layout(group) == "comm-free":
        part = lora_matmul(
            x,
            weights,
            base,
            pages,
            table.shrink(),
            table.expand(),
            seg_start,
            seg_adapter,
            layer=layer,
            shrink_geometry=layout.shrink,
            expand_geometry=layout.expand,
            implementation=implementation,
            **options,
        )
        return sum_rows(part) if row else part
    whole = base()
    part = _own_slice(whole, layout.expand.out_sizes[GROUPS[group][0]], layout.devices) if row else whole
    options["implementation"] = pair_implementation(
        x, part, pages, shrink=layout.shrink, expand=layout.expand, implementation=implementation, **options
    )
    options["layer"] = layer
    y = lora_shrink(x, pages, table.shrink(), seg_start, seg_adapter, geometry=layout.shrink, **options)
    ranks = to_token_rows(y, seg_start, seg_adapter, num_tokens=len(x), group=group, max_rank=max_rank)
    if row:
        ranks = lax.psum(ranks, AXIS)
    else:
        granules = table.granules[:, layer][:, jnp.array(GROUPS[group])].sum(axis=1)
        ranks = _gather_ranks(ranks, granules, seg_start, seg_adapter, layout.devices)
    y = from_token_rows(ranks, y, seg_start, seg_adapter)
    part = lora_expand(part, y, pages, table.expand(), seg_start, seg_adapter, geometry=layout.expand, **options)
    return sum_rows(_put_own_slice(whole, part, layout.devices)) if row else part


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
    most = ceil_div(y.shape[1] // TILE_RANKS, devices)
    joined = lax.all_gather(y[:, : most * TILE_RANKS], AXIS, axis=1, tiled=True)
    return close_gaps(joined, granules, seg_start, seg_adapter, columns=y.shape[1], devices=devices)


def close_gaps(
    joined: Float[Array, "T G"],
    granules: Int[Array, "A"],
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    columns: int,
    devices: int,
) -> Float[Array, "T R"]:
    """`columns` stacked ranks of every token from the devices' parts side by side, each as wide as the longest run of
    any adapter.
    """
    tokens, most = joined.shape[0], joined.shape[1] // (devices * TILE_RANKS)
    row = jnp.arange(tokens, dtype=jnp.int32)
    # a sum over a mask, because a search is a loop, which would break a GPU's command graph
    segment = jnp.sum(seg_start[None, 1:] <= row[:, None], axis=1, dtype=jnp.int32)
    segment = jnp.minimum(segment, seg_adapter.shape[0] - 1)
    run = jnp.maximum(run_length(granules[jnp.maximum(seg_adapter[segment], 0)], devices), 1)[:, None]
    column = jnp.arange(columns // TILE_RANKS, dtype=jnp.int32)
    source = jnp.minimum(column // run * most + column % run, devices * most - 1)
    parts = joined.reshape(tokens, devices * most, TILE_RANKS)
    return jnp.take_along_axis(parts, source[:, :, None], axis=1).reshape(tokens, columns)


def _own_slice(base: Float[Array, "T H"], width: int, devices: int) -> Float[Array, "T h"]:
    """This device's `width` columns; zeros where they end past the last one.

    Of a single row they would lie in one piece, and XLA would fuse such a slice with lora_expand, which changes it in
    place: in that fusion (jax 0.11.2, GPUs) what it writes is lost. So there they are picked by a sum instead.
    """
    padded = jnp.pad(base, ((0, 0), (0, devices * width - base.shape[1])))
    if len(base) > 1:
        return lax.dynamic_slice_in_dim(padded, lax.axis_index(AXIS) * width, width, axis=1)
    mine = jnp.arange(devices)[:, None] == lax.axis_index(AXIS)
    return jnp.where(mine, padded.reshape(devices, width), 0).sum(axis=0, dtype=base.dtype)[None]


def _put_own_slice(base: Float[Array, "T H"], part: Float[Array, "T h"], devices: int) -> Float[Array, "T H"]:
    """`base` with this device's columns replaced."""
    hidden, width = base.shape[1], part.shape[1]
    if len(base) == 1:  # see _own_slice
        mine = jnp.arange(devices * width) // width == lax.axis_index(AXIS)
        return jnp.where(mine[:hidden], jnp.tile(part, (1, devices))[:, :hidden], base)
    padded = jnp.pad(base, ((0, 0), (0, devices * width - hidden)))
    return lax.dynamic_update_slice_in_dim(padded, part, lax.axis_index(AXIS) * width, axis=1)[:, :hidden]
