"""Long segments as a matrix product with the base weights sees them: in tiles of two windows of 64 tokens.

To each segment that reaches into a tile belongs a *pair*: y of the segment's tokens in both windows, to be multiplied
with its adapter's B. A pair is listed under its first token block. Its ranks are cut into *units* of sixteen, the depth
of one wgmma instruction, and the units of a tile's pairs follow one another, four to a stage: a token has zeros in
those of other segments. So however many adapters there are, no more is multiplied than their ranks; and as each unit is
summed by an instruction of its own, in the order of its adapter's ranks, what else is in a stage does not show. (Zeros
are multiplied with other adapters' B, which are finite: one that is not is refused when it is loaded.)
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.geometry import MODULES, ceil_div
from pallas_kernels.lora.config import NUM_SMS, SHORT_SEGMENT
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS
from pallas_kernels.lora.plan import NUM_TOKENS, OFFSET, PAGE_START, TOKEN, Plan, module_field

WINDOW = 64
TILE = 2 * WINDOW
PART = 16
"""Tokens of a part of a window: at most two long segments reach into one."""
UNIT_GRANULES = 2
UNIT_RANKS = 8 * UNIT_GRANULES
STAGE_UNITS = STAGE_CHUNKS // UNIT_GRANULES
UNITS_OF_BLOCK = 64
"""More than an adapter can have."""
_BITS = 30


def _most(tokens: int) -> int:
    """Most long segments that can reach into so many tokens."""
    return (tokens - 2) // (SHORT_SEGMENT + 1) + 2


def most_stages(max_rank: int) -> int:
    """Most stages that a tile can have in a module."""
    return ceil_div(_most(TILE) * ceil_div(max_rank, UNIT_RANKS), STAGE_UNITS)


def rank_blocks(stages: int) -> int:
    """Most times 64 ranks that an adapter has where `most_stages` is `stages`."""
    return ceil_div(stages, _most(TILE))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """first_block: first token block of every tile, and where the last one's end. stages: how many a tile multiplies,
    of each layer and module. reach: bit i of a window is set if it has tokens in the i-th of them; all bits, if there
    are more than fit.

    units: token block times UNITS_OF_BLOCK, plus which of the adapter's units it is; past a tile's last one that again.
    first_unit: of each token block in its tile. parts: token blocks with tokens in each PART of the step, or -1; no
    fewer rows than a launch has programs, so that each can read one at once.
    """

    first_block: Int[Array, "M1"]
    stages: Int[Array, "M L 7"]
    reach: Int[Array, "M L 7 2"]
    units: Int[Array, "M L 7 U"]
    first_unit: Int[Array, "NT L 7"]
    parts: Int[Array, "P 2"]


def _is_second(before: list, record: list) -> Any:
    """Whether a token block belongs to the pair of the one before it. Both: TOKEN and PAGE_START of a record."""
    odd = (record[0] // WINDOW) & 1 == 1
    return odd & (before[0] + WINDOW == record[0]) & (before[1] == record[1])


def make_tiles(plan: Plan, num_tokens: int, max_rank: int) -> Tiles:
    """Of a plan that was cut at windows."""
    tiles, records = num_tokens // TILE, plan.records
    index = jnp.arange(records.shape[0], dtype=jnp.int32)
    used = index < plan.counts[0]
    token, page = records[:, 0, TOKEN], records[:, 0, PAGE_START]
    second = _is_second([jnp.roll(token, 1), jnp.roll(page, 1)], [token, page]) & (index > 0)
    granules = records[:, :, jnp.array([module_field(m) + 1 for m in range(len(MODULES))])]
    count = jnp.where((used & ~second)[:, None, None], -(-granules // UNIT_GRANULES), 0)
    tile, number = token // TILE, jnp.arange(tiles, dtype=jnp.int32)
    ends = jnp.arange(tiles + 1, dtype=jnp.int32)[:, None]
    first_block = jnp.where(used & (tile < ends), 1, 0).sum(axis=1, dtype=jnp.int32)
    # The units before a block's in its tile; those of a pair's second block are its first one's.
    before = jnp.cumsum(count, axis=0, dtype=jnp.int32) - count
    before -= before[first_block[jnp.clip(tile, 0, tiles - 1)]]
    count, first_unit = (jnp.where(second[:, None, None], jnp.roll(what, 1, axis=0), what) for what in (count, before))
    here = used & (tile == number[:, None])  # [tiles, blocks]
    total = jnp.where((here & ~second)[:, :, None, None], count, 0).sum(axis=1, dtype=jnp.int32)
    stages = -(-total // STAGE_UNITS)

    low, high = first_unit // STAGE_UNITS, -(-(first_unit + count) // STAGE_UNITS)
    bits = jnp.where(count > 0, _ones(high) & ~_ones(low), 0)
    odd = (token // WINDOW) % 2 == 1

    def reached(window):
        chosen = jnp.where((here & (odd == window))[:, :, None, None], bits, 0)
        return lax.reduce(chosen, jnp.int32(0), lax.bitwise_or, (1,))

    reach = jnp.stack([reached(window) for window in (False, True)], axis=3)
    return Tiles(
        first_block=first_block,
        stages=stages,
        reach=jnp.where(stages[..., None] > _BITS, -1, reach),
        units=_units(first_block, second, count, first_unit, total, most_stages(max_rank) * STAGE_UNITS),
        first_unit=first_unit,
        parts=_parts(plan, used, num_tokens),
    )


def _ones(count):
    """So many bits, as far as they fit."""
    return (1 << jnp.clip(count, 0, _BITS)) - 1


def _units(first_block, second, count, first_unit, total, most: int) -> Int[Array, "M L 7 U"]:
    candidates = jnp.arange(TILE // WINDOW * _most(WINDOW), dtype=jnp.int32)
    block = first_block[:-1, None] + candidates
    inside = block < first_block[1:, None]
    block = jnp.minimum(block, len(second) - 1)
    inside &= ~second[block]  # [tiles, candidates]
    number = jnp.minimum(jnp.arange(most, dtype=jnp.int32), total[..., None] - 1)[:, None]
    within = number - first_unit[block][..., None]
    found = inside[..., None, None, None] & (within >= 0) & (within < count[block][..., None])
    value = block[..., None, None, None] * UNITS_OF_BLOCK + within
    return jnp.where(found, value, 0).sum(axis=1, dtype=jnp.int32)


def _parts(plan: Plan, used, num_tokens: int) -> Int[Array, "P 2"]:
    token, offset, length = (plan.records[:, 0, i] for i in (TOKEN, OFFSET, NUM_TOKENS))
    first = PART * jnp.arange(num_tokens // PART, dtype=jnp.int32)[:, None]
    begin, end = token + offset, token + offset + length
    here = used & (jnp.maximum(begin, first) < jnp.minimum(end, first + PART))  # [parts, blocks]
    index = jnp.arange(len(token), dtype=jnp.int32)
    last = jnp.max(jnp.where(here, index, -1), axis=1)
    earliest = jnp.min(jnp.where(here, index, len(token)), axis=1)
    found = jnp.stack([jnp.where(last < 0, -1, earliest), jnp.where(earliest < last, last, -1)], axis=1)
    more = max(NUM_SMS - len(found), 0)
    return jnp.pad(found, ((0, more), (0, 0)), constant_values=-1)


def touched_windows(seg_start: Int[Array, "S1"], seg_adapter: Int[Array, "S"], num_tokens: int) -> Int[Array, "W"]:
    """1 for each window of 64 tokens in which a segment has an adapter, else 0."""
    first = WINDOW * jnp.arange(num_tokens // WINDOW, dtype=jnp.int32)[:, None]
    begin, end = seg_start[:-1], seg_start[1:]
    inside = (jnp.maximum(begin, first) < jnp.minimum(end, first + WINDOW)) & (seg_adapter >= 0)
    return inside.any(axis=1).astype(jnp.int32)
