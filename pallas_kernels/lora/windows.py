"""Long segments as a matrix product with the base weights sees them: in windows of 64 tokens.

A product's tile has two windows. To each segment that reaches into it belongs a *pair*: y of the segment's tokens in
both windows, zero elsewhere, to be multiplied with its adapter's B. A pair is listed under its first token block.
"""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.geometry import MODULES
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS
from pallas_kernels.lora.plan import PAGE_START, TOKEN, Plan, module_field

WINDOW = 64
TILE = 2 * WINDOW
_BITS = 30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """first_block: first token block of every tile, and where the last one's end. stages: how many times 64 ranks a
    tile multiplies, of each layer and module. reach: bit i of a window is set if it has tokens in the i-th of them; all
    bits, if there are more than fit.
    """

    first_block: Int[Array, "M1"]
    stages: Int[Array, "M L 7"]
    reach: Int[Array, "M L 7 2"]


def is_second(before: list, record: list) -> Any:
    """Whether a token block belongs to the pair of the one before it. Both: TOKEN and PAGE_START of a record."""
    odd = (record[0] // WINDOW) & 1 == 1
    return odd & (before[0] + WINDOW == record[0]) & (before[1] == record[1])


def listed(plan: Plan) -> tuple[Bool[Array, "N"], Bool[Array, "N"], Int[Array, "N"]]:
    """Of each token block of a plan that was cut at windows: whether it is in use, whether it belongs to the pair of
    the one before it, and its first row.
    """
    records = plan.records
    used = jnp.arange(records.shape[0]) < plan.counts[0]
    token, page = records[:, 0, TOKEN], records[:, 0, PAGE_START]
    second = is_second([jnp.roll(token, 1), jnp.roll(page, 1)], [token, page])
    return used, second & (jnp.arange(records.shape[0]) > 0), token


def make_tiles(plan: Plan, num_tokens: int) -> Tiles:
    """Of a plan that was cut at windows."""
    tiles, records = num_tokens // TILE, plan.records
    used, second, token = listed(plan)
    granules = records[:, :, jnp.array([module_field(m) + 1 for m in range(len(MODULES))])]
    rank_tiles = jnp.where((used & ~second)[:, None, None], -(-granules // STAGE_CHUNKS), 0)
    tile = token // TILE
    number = jnp.arange(tiles, dtype=jnp.int32)
    ends = jnp.arange(tiles + 1, dtype=jnp.int32)[:, None]
    first_block = jnp.where(used & (tile < ends), 1, 0).sum(axis=1, dtype=jnp.int32)
    # The stages before a block's in its tile; those of a pair's second block are its first one's.
    before = jnp.cumsum(rank_tiles, axis=0, dtype=jnp.int32) - rank_tiles
    before -= before[first_block[jnp.clip(tile, 0, tiles - 1)]]
    bits = _ones(rank_tiles) << jnp.clip(before, 0, _BITS)
    bits = jnp.where(second[:, None, None], jnp.roll(bits, 1, axis=0), bits)
    here = used & (tile == number[:, None])  # [tiles, blocks]

    def total(what, chosen):
        return jnp.where(chosen[:, :, None, None], what, 0).sum(axis=1, dtype=jnp.int32)

    stages, odd = total(rank_tiles, here), (token // WINDOW) % 2 == 1
    reach = jnp.stack([total(bits, here & (odd == window)) for window in (False, True)], axis=3)
    return Tiles(first_block=first_block, stages=stages, reach=jnp.where(stages[..., None] > _BITS, -1, reach))


def _ones(count):
    """So many bits, as far as they fit."""
    return (1 << jnp.clip(count, 0, _BITS)) - 1


def touched_windows(seg_start: Int[Array, "S1"], seg_adapter: Int[Array, "S"], num_tokens: int) -> Int[Array, "W"]:
    """1 for each window of 64 tokens in which a segment has an adapter, else 0."""
    first = WINDOW * jnp.arange(num_tokens // WINDOW, dtype=jnp.int32)[:, None]
    begin, end = seg_start[:-1], seg_start[1:]
    inside = (jnp.maximum(begin, first) < jnp.minimum(end, first + WINDOW)) & (seg_adapter >= 0)
    return inside.any(axis=1).astype(jnp.int32)
