"""Work lists of the Hopper LoRA kernels, made on the device from the adapter table and the segments.

A *token block* is up to ``block_tokens`` tokens of one segment; base-model tokens are in none. The plan has one record
for each token block and layer: where its tokens are, and for every group and module where the weights are and how many
granules they have. The kernels read whole blocks of rows: one near the end of the step begins earlier, so that none
reaches past the step's last token. The plan does not depend on the layer or group at hand, so XLA makes it once a
step, in a few small kernels, however many launches read it.
"""

import dataclasses

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from pallas_kernels.geometry import GROUPS, MODULES, Geometry, ceil_div
from pallas_kernels.lora.config import CLUSTERS, SHORT_SEGMENT
from pallas_kernels.lora.ranges import MAX_LOG_RANGES, cut_blocks
from pallas_kernels.lora.table import AdapterTable, section_starts

BLOCK_GRANULES = 8
"""Granules of a rank block: 64 stacked ranks, the height of a wgmma instruction."""
_BLOCK_ROWS = 8 * BLOCK_GRANULES

# Fields of a record.
TOKEN, OFFSET, NUM_TOKENS, PAGE_START = range(4)
_GROUP_FIELDS = 4
_MODULE_FIELDS = _GROUP_FIELDS + 2 * len(GROUPS)
_PAGE_FIELDS = _MODULE_FIELDS + 3 * len(MODULES)
RECORD = _PAGE_FIELDS + 2 * (len(GROUPS) + len(MODULES))


def group_fields(group: str) -> tuple[int, int, int, int]:
    """Where a record has the first tile of a group's A section, the group's granules, and the ids of the page where
    that tile lies and of the next one.
    """
    index = list(GROUPS).index(group)
    first, page = _GROUP_FIELDS + 2 * index, _PAGE_FIELDS + 2 * index
    return first, first + 1, page, page + 1


def module_field(module):
    """Where a record has three fields of a module: first tile of B, granules, first stacked rank."""
    return _MODULE_FIELDS + 3 * module


def module_pages(module):
    """Where a record has the ids of the page of a module's first tile of B and of the next one."""
    return _PAGE_FIELDS + 2 * (len(GROUPS) + module)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """counts: number of token blocks, then for each group the most rank blocks that any of them has in any layer.
    records: TOKEN is a block's first row, of which the block's own tokens begin OFFSET rows on. cut: see `cut_blocks`;
    zeros where blocks are in the order of the segments.

    Records past the last token block are unspecified.
    """

    counts: Int[Array, "5"]
    records: Int[Array, "NT L R"]
    scaling: Float[Array, "NT L 7"]
    cut: Int[Array, "4 3"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Half:
    """Where one of the two matrices of every adapter lies, in a step."""

    page_ids: jax.Array
    plan: Plan
    geometry: Geometry = dataclasses.field(metadata=dict(static=True))


def max_token_blocks(num_tokens: int, num_segments: int, block_tokens: int, *, windows: bool = False) -> int:
    """Most token blocks that any cut of `num_tokens` tokens in `num_segments` segments can give. windows: see
    make_plan.
    """
    if windows:
        return num_tokens // block_tokens + min(num_segments, num_tokens // (SHORT_SEGMENT + 1))
    used = min(num_segments, num_tokens)
    return max(1, min(num_tokens, (num_tokens + used * (block_tokens - 1)) // block_tokens))


def max_rank_blocks(group: str, max_rank: int) -> int:
    """Most rank blocks that one token block can have."""
    return ceil_div(len(GROUPS[group]) * ceil_div(max_rank, 8), BLOCK_GRANULES)


def y_rows(group: str, max_rank: int) -> int:
    """Rows of a token block's partial sums: its rank blocks, and what expand reads of the last module past them."""
    granules = ceil_div(max_rank, 8)
    last = 8 * (len(GROUPS[group]) - 1) * granules + _BLOCK_ROWS * ceil_div(granules, BLOCK_GRANULES)
    return max(last, _BLOCK_ROWS * max_rank_blocks(group, max_rank))


def _num_blocks(
    seg_start: Int[Array, "S1"], seg_adapter: Int[Array, "S"], block_tokens: int, windows: bool = False
) -> Int[Array, "S"]:
    """Token blocks of every segment. windows: see make_plan."""
    start, end = seg_start[:-1], seg_start[1:]
    first = start // block_tokens * block_tokens if windows else start
    return jnp.where((seg_adapter >= 0) & (end > start), -(-(end - first) // block_tokens), 0)


def largest_first(blocks: Int[Array, "S"], sizes: Int[Array, "S"]) -> Int[Array, "S"]:
    """First token block of every segment, of `blocks` each, if those of larger sizes are listed first and equal ones in
    the order of the segments. A sort would be many launches or a loop, which would break a GPU's command graph.
    """
    order = jnp.arange(len(blocks))
    sooner = (sizes > sizes[:, None]) | ((sizes == sizes[:, None]) & (order < order[:, None]))
    return jnp.sum(jnp.where(sooner, blocks, 0), axis=1, dtype=jnp.int32)


def token_blocks(seg_start: Int[Array, "S1"], seg_adapter: Int[Array, "S"], block_tokens: int) -> Int[Array, "S1"]:
    """First token block of every segment in the order of the segments, and where the last one's end."""
    blocks = _num_blocks(seg_start, seg_adapter, block_tokens)
    # A sum over a mask is one small kernel, where a scan would be several.
    order = jnp.arange(seg_adapter.shape[0] + 1)
    return jnp.sum(jnp.where(order[None, :-1] < order[:, None], blocks[None, :], 0), axis=1, dtype=jnp.int32)


def first_row(token, num_tokens: int, block_tokens: int):
    """First row of the token block whose own tokens begin with `token`, so that the block ends within the step."""
    return jnp.maximum(jnp.minimum(token, num_tokens - block_tokens), 0)


def by_length(seg_start: Int[Array, "S1"], seg_adapter: Int[Array, "S"]) -> tuple[Int[Array, "S"], Int[Array, "S"]]:
    """Adapters of the short segments, and of the long ones; -1 for the others."""
    short = seg_start[1:] - seg_start[:-1] <= SHORT_SEGMENT
    return jnp.where(short, seg_adapter, -1), jnp.where(short, -1, seg_adapter)


def _record_terms(geometry: Geometry) -> tuple[Int[Array, "R 7"], Bool[Array, "R"]]:
    """A record as a linear function of the seven modules' granules, and which fields count from a layer's tiles."""
    unit = np.eye(len(MODULES), dtype=np.int32)
    linear, is_tile = np.zeros((_PAGE_FIELDS, len(MODULES)), np.int32), np.zeros(_PAGE_FIELDS, bool)
    with jax.ensure_compile_time_eval():
        a_start, b_start = (np.asarray(starts) for starts in section_starts(jnp.asarray(unit), geometry))
    for group, start in zip(GROUPS, a_start, strict=True):
        tile, total = group_fields(group)[:2]
        linear[tile], is_tile[tile] = start, True
        linear[total] = unit[list(GROUPS[group])].sum(axis=0)
        for i, m in enumerate(GROUPS[group]):
            field = module_field(m)
            linear[field], is_tile[field] = b_start[m], True
            linear[field + 1] = unit[m]
            linear[field + 2] = 8 * unit[list(GROUPS[group][:i])].sum(axis=0)
    return jnp.asarray(linear), jnp.asarray(is_tile)


def group_loads(table: AdapterTable) -> Int[Array, "A 4"]:
    """Granules of each adapter in each group, of all layers: about the time that its weights take."""
    modules = np.array([[m in members for members in GROUPS.values()] for m in range(len(MODULES))])
    return jnp.sum(table.granules[..., None] * modules.astype(np.int32), axis=(1, 2), dtype=jnp.int32)


def make_plan(
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    num_tokens: int,
    geometry: Geometry,
    block_tokens: int,
    windows: bool = False,
    loads: Int[Array, "A 4"] | None = None,
) -> Plan:
    """The plan of a step of `num_tokens` tokens.

    windows: segments, all longer than SHORT_SEGMENT, are cut where a window of `block_tokens` tokens ends, counted from
    the step's first; `num_tokens` is a multiple of that. A block's first row is its window's.
    loads: see `group_loads`; token blocks are then listed largest first, and not in the order of the segments, as
    `token_rows` wants them.
    """
    num_segments = seg_adapter.shape[0]
    # A record for each cluster of thread blocks: none waits to know how many are in use before it fetches its first.
    limit = max(max_token_blocks(num_tokens, num_segments, block_tokens, windows=windows), CLUSTERS)
    lengths = seg_start[1:] - seg_start[:-1]
    blocks = _num_blocks(seg_start, seg_adapter, block_tokens, windows)
    sizes = jnp.zeros_like(blocks)
    if loads is not None:
        sizes = jnp.sum(loads[jnp.maximum(seg_adapter, 0)], axis=1, dtype=jnp.int32)
    first_block, num_blocks = largest_first(blocks, sizes), jnp.sum(blocks, dtype=jnp.int32)
    index = jnp.arange(limit, dtype=jnp.int32)
    within = index[:, None] - first_block
    is_of = (within >= 0) & (within < blocks)
    seg = jnp.sum(jnp.where(is_of, jnp.arange(num_segments), 0), axis=1, dtype=jnp.int32)
    adapter = jnp.maximum(seg_adapter[seg], 0)
    before = (index - first_block[seg]) * block_tokens
    granules = table.granules[adapter][:, :, None]  # [NT, L, 1, 7]
    linear, is_tile = _record_terms(geometry)
    if windows:
        row = jnp.clip(seg_start[seg] // block_tokens * block_tokens + before, 0, num_tokens - block_tokens)
        first = jnp.maximum(seg_start[seg], row)
        length = jnp.clip(jnp.minimum(seg_start[seg + 1], row + block_tokens) - first, 0, block_tokens)
    else:
        first = jnp.clip(seg_start[seg] + before, 0, num_tokens - 1)
        row = first_row(first, num_tokens, block_tokens)
        length = jnp.clip(lengths[seg] - before, 0, block_tokens)
    own = jnp.stack([row, first - row, length, table.page_start[adapter]])
    records = jnp.sum(granules * linear, axis=3, dtype=jnp.int32)
    records += jnp.where(is_tile, table.tile_start[adapter][:, :, None], 0)
    records += jnp.pad(own.T, ((0, 0), (0, _PAGE_FIELDS - _GROUP_FIELDS)))[:, None]
    tiles = jnp.array([*(group_fields(g)[0] for g in GROUPS), *map(module_field, range(len(MODULES)))])
    page = table.page_start[adapter][:, None, None] + records[:, :, tiles] // geometry.tiles_per_page_id
    page = jnp.clip(page[..., None] + jnp.arange(2), 0, table.pages.shape[0] - 1)
    page_ids = table.pages[page].astype(jnp.int32).reshape(*page.shape[:2], -1)
    groups = linear[jnp.array([group_fields(g)[1] for g in GROUPS])]
    rank_blocks = -(-jnp.sum(granules * groups, axis=3, dtype=jnp.int32) // BLOCK_GRANULES)
    used = index < num_blocks
    counts = jnp.max(jnp.where(used[:, None, None], rank_blocks, 0), axis=(0, 1))
    if loads is None:
        cut = jnp.zeros((len(GROUPS), MAX_LOG_RANGES), jnp.int32)
    else:
        cut = cut_blocks(jnp.where(used[:, None], loads[adapter], 0))
    return Plan(
        counts=jnp.concatenate([num_blocks[None], counts]),
        records=jnp.concatenate([records, page_ids], axis=2),
        scaling=table.scaling[adapter],
        cut=cut,
    )
