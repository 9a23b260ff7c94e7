"""Where the adapters of a step lie in the page pool, as arrays that a compiled step takes as arguments."""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, MODULES, Geometry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterTable:
    """Adapters that a step may use. Their number, ranks, targets and places are data: changing them recompiles nothing.

    An adapter's weights are one run of tiles over all layers (its image). Tile ``g`` lies in unit ``u = g //
    page_tiles``, which is layer slice ``u % L`` of page id ``pages[page_start + u // L]``, at tile slot ``g %
    page_tiles``.
    """

    pages: Any  # compute dtype [PT]: page ids of all adapters, one after another
    page_start: Any  # int32 [A]: where an adapter's page ids begin
    tile_start: Any  # int32 [A, L]: tile at which a layer's tiles begin in the adapter's image
    granules: Any  # int32 [A, L, 7]: rank / 8, rounded up, of each module; 0 where a module is not targeted
    scaling: Any  # float32 [A, L, 7]: lora_alpha / r, or lora_alpha / sqrt(r)


def section_starts(granules: Int[Array, "... 7"], geometry: Geometry) -> tuple[list, list]:
    """First tile, within a layer, of each group's A section and of each module's B section.

    granules: rank granules of the seven modules (numpy or jax). Returns ``(a_start, b_start)``: a list of one array
    [...] per group in the order of GROUPS, and a list of one array [...] per module.
    """
    offset = granules[..., 0] * 0
    a_start, b_start = [], [offset] * len(MODULES)
    for modules in GROUPS.values():
        a_start.append(offset)
        for m in modules:
            offset = offset + granules[..., m] * geometry.in_tiles(m)
        for m in modules:
            b_start[m] = offset
            offset = offset + granules[..., m] * geometry.out_tiles(m)
    return a_start, b_start


def gather_tiles(
    pages: Float[Array, "L P E"],
    table: AdapterTable,
    adapter: Int[Array, "*n"],
    tiles: Int[Array, "*n c"],
    geometry: Geometry,
) -> Float[Array, "*n c 8 64"]:
    """Tiles of adapters by their index in the adapter's image."""
    unit = tiles // geometry.page_tiles
    page = table.pages[table.page_start[adapter][..., None] + unit // geometry.num_layers]
    view = pages.reshape(*pages.shape[:2], geometry.page_tiles, 8, 64)
    return view[unit % geometry.num_layers, page, tiles % geometry.page_tiles]


def empty_table(num_layers: int) -> AdapterTable:
    """A table with one row that no segment names, for steps without adapters."""
    return AdapterTable(
        pages=jnp.zeros(1, jnp.int32),
        page_start=jnp.zeros(1, jnp.int32),
        tile_start=jnp.zeros((1, num_layers), jnp.int32),
        granules=jnp.zeros((1, num_layers, len(MODULES)), jnp.int32),
        scaling=jnp.zeros((1, num_layers, len(MODULES)), jnp.float32),
    )
