"""What a step with few adapters works on: the ranks of all adapters side by side, as if they were one adapter's.

In every module of every layer an adapter's granules are dealt out by turns to lists: one, or two for the thread blocks
of a pair. In each the segments' adapters follow one another, in blocks of eight granules, those of large ranks first:
then each begins at a multiple of what it takes (of two lists half of `few_ranks`), and which of its ranks are summed
together does not depend on the others. The plan says where each granule's tiles lie in the pool, and which tokens each
rank is for. It does not depend on the layer or group at hand, so XLA makes it once a step.
"""

import dataclasses

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, MODULES, TILE_RANKS, Geometry
from pallas_kernels.lora.config import CLUSTER, few_ranks
from pallas_kernels.lora.few_items import SIGNALS
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, ceil_div
from pallas_kernels.lora.plan import largest_first
from pallas_kernels.lora.table import AdapterTable, section_starts

FIRST, LAST, SCALE = range(3)  # rows of FewPlan.ranks
A_TILE, B_TILE, PAGE_START, IS_USED = range(4)  # fields of a record
PAGES = {A_TILE: 4, B_TILE: 6}  # where it has the ids of the page of such a tile and of the next one
RECORD = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FewPlan:
    """N blocks of eight granules at most, of the lists by turns.

    records: of each granule, see above; tiles are counted from the beginning of the adapter's image. count: blocks, the
    same number of all lists. ranks: of each rank, which tokens it is for, from the first to before the last, and their
    adapter's scaling; no token for ranks that are not in use. Where there are more granules than fit, the scaling is
    NaN. signals: zeros, which the kernel counts in and puts back, see FewItems.signal.
    """

    records: Int[Array, "L 7 N 8 F"]
    count: Int[Array, "L 7"]
    ranks: Float[Array, "L 7 N 3 64"]
    page_ids: Int[Array, "P"]
    signals: Int[Array, "X"]


def make_few_plan(
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    blocks: int,
    geometry: Geometry,
    lists: int = CLUSTER,
    tiles: int = 1,
) -> FewPlan:
    """The plan of a step, with room for so many blocks, a multiple of the lists. tiles: of tokens, which have signals
    of their own.
    """
    layers, modules, room = geometry.num_layers, len(MODULES), blocks // lists * STAGE_CHUNKS
    adapter = jnp.maximum(seg_adapter, 0)
    live = (seg_adapter >= 0) & (seg_start[1:] > seg_start[:-1])
    granules = table.granules[adapter]  # [S, L, 7]
    own = jnp.where(live[:, None, None], granules, 0)
    taken = few_ranks(own * TILE_RANKS) // TILE_RANKS // lists  # of each list
    start = jax.vmap(jax.vmap(largest_first, -1, -1), -1, -1)(taken, taken)
    total = jnp.sum(taken, axis=0, dtype=jnp.int32)
    place = jnp.arange(room, dtype=jnp.int32)
    is_of = (place >= start[..., None]) & (place < (start + taken)[..., None])
    segment = jnp.sum(
        jnp.where(is_of, jnp.arange(len(seg_adapter))[:, None, None, None], 0), axis=0, dtype=jnp.int32
    )  # [L, 7, room]
    of_layer = jnp.arange(layers)[:, None, None], jnp.arange(modules)[:, None]
    within = lists * (place - start[segment, *of_layer])
    # From here on [L, 7, granules of all lists], block by block.
    within = _by_blocks(jnp.stack([within + i for i in range(lists)], axis=2))
    segment, is_used = (_by_blocks(jnp.stack([of] * lists, axis=2)) for of in (segment, jnp.any(is_of, axis=0)))
    used = is_used & (within < own[segment, *of_layer])

    page_start = table.page_start[adapter[segment]]
    fields = {PAGE_START: page_start, IS_USED: used}
    for field, first, width in zip(
        PAGES, _first_tiles(granules, geometry), (geometry.in_tiles, geometry.out_tiles), strict=True
    ):
        widths = jnp.array([width(m) for m in range(modules)])[:, None]
        tile = (table.tile_start[adapter][..., None] + first)[segment, *of_layer] + within * widths
        tile = jnp.where(used, tile, 0)
        fields[field] = tile
        for i in range(2):
            page = page_start + tile // geometry.tiles_per_page_id + i
            fields[PAGES[field] + i] = table.pages[jnp.clip(page, 0, table.pages.shape[0] - 1)]
    records = jnp.stack([fields[i].astype(jnp.int32) for i in range(RECORD)], axis=-1)

    scale = table.scaling[adapter[segment], *of_layer]
    scale = jnp.where((total > room)[..., None], jnp.nan, scale)
    rows = [jnp.where(used, row, 0).astype(jnp.float32) for row in (seg_start[segment], seg_start[segment + 1], scale)]
    ranks = jnp.repeat(jnp.stack(rows, axis=2), TILE_RANKS, axis=-1)  # [L, 7, 3, 8 G]
    ranks = ranks.reshape(layers, modules, 3, blocks, -1).transpose(0, 1, 3, 2, 4)
    # Zeros that XLA cannot know to be zeros: kernels write to them, so they must be made anew in every step.
    zero = jnp.minimum(seg_start[0], 0)
    return FewPlan(
        records=records.reshape(layers, modules, blocks, STAGE_CHUNKS, RECORD),
        count=lists * ceil_div(jnp.minimum(total, room), jnp.int32(STAGE_CHUNKS)),
        ranks=ranks,
        page_ids=table.pages.astype(jnp.int32),
        signals=jnp.full(tiles * layers * modules * blocks * SIGNALS, zero, jnp.int32),
    )


def _by_blocks(lists):
    """[L, 7, lists, granules] as [L, 7, all granules], a block of each list by turns."""
    layers, modules, number, granules = lists.shape
    blocks = lists.reshape(layers, modules, number, granules // STAGE_CHUNKS, STAGE_CHUNKS)
    return blocks.swapaxes(2, 3).reshape(layers, modules, number * granules)


def _first_tiles(granules: Int[Array, "S L 7"], geometry: Geometry) -> tuple[Int[Array, "S L 7"], Int[Array, "S L 7"]]:
    """Within a layer's tiles, where each module's A and B begin."""
    a_start, b_start = section_starts(granules, geometry)
    a_first = []
    for start, members in zip(a_start, GROUPS.values(), strict=True):
        for m in members:
            a_first.append(start)
            start = start + granules[..., m] * geometry.in_tiles(m)
    return jnp.stack(a_first, axis=-1), jnp.stack(b_start, axis=-1)
