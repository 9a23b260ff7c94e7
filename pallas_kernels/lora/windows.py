"""Long segments as a matrix product with the base weights sees them: in windows of 64 tokens.

A product's tile has two windows. To each segment that reaches into it belongs a *pair*: y of the segment's tokens in
both windows, zero elsewhere, to be multiplied with its adapter's B. A pair is listed under its first token block.
"""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.geometry import MODULES
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS
from pallas_kernels.lora.plan import PAGE_START, TOKEN, Plan, module_field

WINDOW = 64
TILE = 2 * WINDOW


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """first_block: first token block of every tile, and where the last one's end. stages: how many times 64 ranks a
    tile multiplies, of each layer and module.
    """

    first_block: Int[Array, "M1"]
    stages: Int[Array, "M L 7"]


def is_second(before: list, record: list) -> Any:
    """Whether a token block belongs to the pair of the one before it. Both: TOKEN and PAGE_START of a record."""
    odd = (record[0] // WINDOW) & 1 == 1
    return odd & (before[0] + WINDOW == record[0]) & (before[1] == record[1])


def make_tiles(plan: Plan, num_tokens: int) -> Tiles:
    """Of a plan that was cut at windows."""
    tiles = num_tokens // TILE
    records = plan.records
    used = jnp.arange(records.shape[0]) < plan.counts[0]
    token, page = records[:, 0, TOKEN], records[:, 0, PAGE_START]
    second = is_second([jnp.roll(token, 1), jnp.roll(page, 1)], [token, page])
    second &= jnp.arange(records.shape[0]) > 0
    granules = records[:, :, jnp.array([module_field(m) + 1 for m in range(len(MODULES))])]
    rank_tiles = jnp.where((used & ~second)[:, None, None], -(-granules // STAGE_CHUNKS), 0)
    tile = token // TILE
    number = jnp.arange(tiles, dtype=jnp.int32)
    stages = jnp.where((tile == number[:, None])[:, :, None, None], rank_tiles, 0).sum(axis=1, dtype=jnp.int32)
    ends = jnp.arange(tiles + 1, dtype=jnp.int32)[:, None]
    first_block = jnp.where(used & (tile < ends), 1, 0).sum(axis=1, dtype=jnp.int32)
    return Tiles(first_block=first_block, stages=stages)
