"""What a step with few adapters works on: their ranks side by side, as if they were one adapter's.

In every module of every layer the granules of the segments' adapters follow one another, MOST_FEW / 8 at most. The plan
says where each of their tiles lies in the pool, and which tokens each rank is for. It does not depend on the layer or
group at hand, so XLA makes it once a step.
"""

import dataclasses

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, MODULES, TILE_RANKS, Geometry
from pallas_kernels.lora.config import MOST_FEW
from pallas_kernels.lora.table import AdapterTable, section_starts

GRANULES = MOST_FEW // TILE_RANKS
FIRST, LAST, SCALE = range(3)  # rows of FewPlan.ranks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FewPlan:
    """a_tiles, b_tiles: by group, int32 [L, modules of the group, GRANULES, tiles]: where in the pool, in tiles, each
    granule has its columns of A and its outputs of B, in the order of the columns and of the outputs.
    count: granules in use. ranks: of each rank, which tokens it is for, from the first to before the last, and their
    adapter's scaling; no token for ranks that are not in use. Where there are more granules than fit, the scaling is
    NaN.
    """

    a_tiles: tuple[Int[Array, "L _ G _"], ...]
    b_tiles: tuple[Int[Array, "L _ G _"], ...]
    count: Int[Array, "L 7"]
    ranks: Float[Array, "L 7 3 R"]


def make_few_plan(
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    num_pages: int,
    geometry: Geometry,
) -> FewPlan:
    """The plan of a step."""
    layers, modules = geometry.num_layers, len(MODULES)
    adapter = jnp.maximum(seg_adapter, 0)
    live = (seg_adapter >= 0) & (seg_start[1:] > seg_start[:-1])
    granules = table.granules[adapter]  # [S, L, 7]
    counted = jnp.where(live[:, None, None], granules, 0)
    order = jnp.arange(len(seg_adapter))
    # A sum over a mask is one small kernel, where a scan would be several.
    upto = jnp.sum(jnp.where((order[:, None] <= order)[..., None, None], counted[:, None], 0), axis=0, dtype=jnp.int32)
    total = upto[-1]
    place = jnp.arange(GRANULES, dtype=jnp.int32)
    segment = jnp.sum(upto[..., None] <= place, axis=0, dtype=jnp.int32)  # [L, 7, G]
    segment = jnp.minimum(segment, len(seg_adapter) - 1)
    of_layer = jnp.arange(layers)[:, None, None], jnp.arange(modules)[:, None]
    within = place - (upto - counted)[segment, *of_layer]
    used = place < total[..., None]

    a_first, b_first = _first_tiles(granules, geometry)
    tile_start = table.tile_start[adapter][..., None]  # [S, L, 1]
    start = table.page_start[adapter[segment]][..., None]

    def locate(first, group, tiles_of):
        """Of a group: [L, modules, G, tiles]."""
        members = jnp.array(GROUPS[group])
        widths = [tiles_of(m) for m in GROUPS[group]]
        width = jnp.array(widths)[:, None]
        tile = (tile_start + first)[segment, *of_layer][:, members] + within[:, members] * width
        tile = tile[..., None] + jnp.arange(max(widths), dtype=jnp.int32)
        unit = tile // geometry.page_tiles
        page = jnp.clip(start[:, members] + unit // layers, 0, table.pages.shape[0] - 1)
        row = unit % layers * num_pages + table.pages[page]
        found = row * geometry.page_tiles + tile % geometry.page_tiles
        return jnp.where(used[:, members][..., None], found, 0).astype(jnp.int32)

    def of_ranks(values):
        """Values of segments, as each rank has them."""
        return jnp.repeat(jnp.where(used, values, 0).astype(jnp.float32), TILE_RANKS, axis=-1)

    scale = table.scaling[adapter[segment], *of_layer]
    scale = jnp.where((total > GRANULES)[..., None], jnp.nan, scale)
    return FewPlan(
        a_tiles=tuple(locate(a_first, group, geometry.in_tiles) for group in GROUPS),
        b_tiles=tuple(locate(b_first, group, geometry.out_tiles) for group in GROUPS),
        count=jnp.minimum(total, GRANULES),
        ranks=jnp.stack([of_ranks(values) for values in (seg_start[segment], seg_start[segment + 1], scale)], axis=2),
    )


def _first_tiles(granules: Int[Array, "S L 7"], geometry: Geometry) -> tuple[Int[Array, "S L 7"], Int[Array, "S L 7"]]:
    """Within a layer's tiles, where each module's A and B begin."""
    a_start, b_start = section_starts(granules, geometry)
    a_first = []
    for start, members in zip(a_start, GROUPS.values(), strict=True):
        for m in members:
            a_first.append(start)
            start = start + granules[..., m] * geometry.in_tiles(m)
    return jnp.stack(a_first, axis=-1), jnp.stack(b_start, axis=-1)
