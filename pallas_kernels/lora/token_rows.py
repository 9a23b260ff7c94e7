"""Between lora_shrink and lora_expand: ``x A`` as one row a token, which is the form that devices send each other.

The Hopper kernels hand over partial sums in token blocks of up to 64 tokens, of which decoding fills one row. Added up
and with a row for each token they are what S-LoRA's layout sends: tokens x stacked ranks and nothing else.
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, TILE_RANKS, ceil_div
from pallas_kernels.lora.plan import BLOCK_GRANULES, token_blocks

_BLOCK_RANKS = BLOCK_GRANULES * TILE_RANKS


def to_token_rows(
    y: jax.Array,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    num_tokens: int,
    group: str,
    max_rank: int,
) -> Float[Array, "T R"]:
    """What lora_shrink returned, as ``[T, modules x max_rank in granules]``: a token's ranks of the group's modules one
    after another in the leading columns. Columns past them, and rows of tokens without an adapter, are unspecified.
    """
    if y.ndim == 2:  # the XLA implementation's own layout
        return y
    ranks = len(GROUPS[group]) * ceil_div(max_rank, TILE_RANKS) * TILE_RANKS
    rank_blocks = ceil_div(ranks, _BLOCK_RANKS)
    first_block = token_blocks(seg_start, seg_adapter, y.shape[2])
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    segment = jnp.sum(seg_start[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
    segment = jnp.minimum(segment, seg_adapter.shape[0] - 1)
    within = jnp.maximum(token - seg_start[segment], 0)
    row = (first_block[segment] + within // y.shape[2]) * (rank_blocks * _BLOCK_RANKS)
    row = row[:, None] + jnp.arange(ranks, dtype=jnp.int32)
    column = (within % y.shape[2])[:, None]
    # split by split, in the order in which expand adds them
    total = y[0].at[row, column].get(mode="clip")
    for part in y[1:]:
        total = total + part.at[row, column].get(mode="clip")
    return total


def from_token_rows(
    rows: Float[Array, "T R"], y: jax.Array, seg_start: Int[Array, "S1"], seg_adapter: Int[Array, "S"]
) -> jax.Array:
    """The rows in the layout of `y`, what lora_shrink returned, for lora_expand."""
    if y.ndim == 2:
        return rows
    rank_blocks = ceil_div(rows.shape[1], _BLOCK_RANKS)
    blocks = (y.shape[1] - _BLOCK_RANKS) // (rank_blocks * _BLOCK_RANKS)
    first_block = token_blocks(seg_start, seg_adapter, y.shape[2])
    block = jnp.arange(blocks, dtype=jnp.int32)
    segment = jnp.sum(first_block[None, 1:] <= block[:, None], axis=1, dtype=jnp.int32)
    segment = jnp.minimum(segment, seg_adapter.shape[0] - 1)
    token = seg_start[segment] + (block - first_block[segment]) * y.shape[2]
    token = token[:, None] + jnp.arange(y.shape[2], dtype=jnp.int32)
    taken = rows.at[token].get(mode="clip").swapaxes(1, 2)
    taken = jnp.pad(taken, ((0, 0), (0, rank_blocks * _BLOCK_RANKS - rows.shape[1]), (0, 0)))
    return jnp.pad(taken.reshape(-1, y.shape[2]), ((0, _BLOCK_RANKS), (0, 0)))[None]
