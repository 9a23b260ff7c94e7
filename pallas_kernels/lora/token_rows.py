"""Between lora_shrink and lora_expand: ``x A`` as one row a token, which is the form that devices send each other.

The Hopper kernels hand over partial sums in token blocks of up to 64 tokens, of which decoding fills one row. Added up
and with a row for each token they are what S-LoRA's layout sends: tokens x stacked ranks and nothing else.
"""

import functools
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, TILE_RANKS, ceil_div
from pallas_kernels.lora.plan import by_length, first_row, token_blocks

Intermediate = jax.Array | tuple[jax.Array, ...]
"""What lora_shrink returns: of the Hopper kernels one array a launch, of the XLA implementation one array."""


def to_token_rows(
    y: Intermediate,
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
    if not isinstance(y, tuple):
        return y
    adapters = _launches(y, seg_start, seg_adapter)
    options: dict[str, Any] = dict(num_tokens=num_tokens, group=group, max_rank=max_rank)
    rows = [_to_rows(part, seg_start, a, **options) for part, a in zip(y, adapters, strict=True)]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    total = rows[0]
    for part, chosen in zip(rows[1:], adapters[1:], strict=True):
        total = jnp.where((chosen[_segments(token, seg_start)] >= 0)[:, None], part, total)
    return total


def _launches(
    y: tuple[jax.Array, ...], seg_start: Int[Array, "S1"], seg_adapter: Int[Array, "S"]
) -> tuple[Int[Array, "S"], ...]:
    """Segments' adapters of each launch."""
    return (seg_adapter,) if len(y) == 1 else by_length(seg_start, seg_adapter)


def _segments(token: Int[Array, "*n"], seg_start: Int[Array, "S1"]) -> Int[Array, "*n"]:
    """Segment of each token; of padding the last one."""
    segment = jnp.sum(seg_start[1:] <= token[..., None], axis=-1, dtype=jnp.int32)
    return jnp.minimum(segment, seg_start.shape[0] - 2)


def _to_rows(
    y: Float[Array, "blocks splits rows n"],
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    num_tokens: int,
    group: str,
    max_rank: int,
) -> Float[Array, "T R"]:
    ranks = len(GROUPS[group]) * ceil_div(max_rank, TILE_RANKS) * TILE_RANKS
    size = y.shape[3]
    first_block = token_blocks(seg_start, seg_adapter, size)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    segment = _segments(token, seg_start)
    within = jnp.maximum(token - seg_start[segment], 0)
    block = (first_block[segment] + within // size)[:, None]
    column = (token - first_row(token - within % size, num_tokens, size))[:, None]
    row = jnp.arange(ranks, dtype=jnp.int32)
    # split by split, in the order in which expand adds them
    parts = [y.at[block, split, row, column].get(mode="clip") for split in range(y.shape[1])]
    return functools.reduce(jnp.add, parts)


def from_token_rows(
    rows: Float[Array, "T R"], y: Intermediate, seg_start: Int[Array, "S1"], seg_adapter: Int[Array, "S"]
) -> Intermediate:
    """The rows in the layout of `y`, what lora_shrink returned, for lora_expand."""
    if not isinstance(y, tuple):
        return rows
    adapters = _launches(y, seg_start, seg_adapter)
    return tuple(_from_rows(rows, part, seg_start, a) for part, a in zip(y, adapters, strict=True))


def _from_rows(
    rows: Float[Array, "T R"],
    y: Float[Array, "blocks splits rows n"],
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
) -> Float[Array, "blocks 1 rows n"]:
    blocks, _, height, size = y.shape
    first_block = token_blocks(seg_start, seg_adapter, size)
    block = jnp.arange(blocks, dtype=jnp.int32)
    segment = jnp.sum(first_block[None, 1:] <= block[:, None], axis=1, dtype=jnp.int32)
    segment = jnp.minimum(segment, seg_adapter.shape[0] - 1)
    token = first_row(seg_start[segment] + (block - first_block[segment]) * size, rows.shape[0], size)
    token = token[:, None] + jnp.arange(size, dtype=jnp.int32)
    taken = rows.at[token].get(mode="clip").swapaxes(1, 2)
    return jnp.pad(taken, ((0, 0), (0, height - rows.shape[1]), (0, 0)))[:, None]
