"""What a product with the base weights shrinks for its own deltas: blocks of ranks that the tokens of a tile need.

A tile has 128 tokens. Of each segment that reaches into it, 64 stacked ranks of a group are an *entry*: where that part
of A lies, and which token blocks, of either window, need it. Four entries go through a product together.
"""

import dataclasses

import jax
from jax import numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.geometry import GROUPS, ceil_div
from pallas_kernels.lora.config import SHORT_SEGMENT
from pallas_kernels.lora.plan import BLOCK_GRANULES, PAGE_START, Plan, group_fields, max_rank_blocks
from pallas_kernels.lora.windows import TILE, Tiles, listed

PASS = 4
"""Entries that go through a product together."""
SECTION, GRANULES, FIRST_PAGE, PAGE, NEXT_PAGE, WINDOW_0, WINDOW_1, RANK_BLOCK = range(8)  # fields of an entry
ENTRY = 8
_PAIRS = TILE // (SHORT_SEGMENT + 1) + 2
"""Most segments that reach into a tile: they are all longer than SHORT_SEGMENT, two of them may lie mostly outside."""
SIGNALS = 2
"""Counters of a launch: of who has summed parts of the input, and of who has added these up."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TileShrinks:
    """entries: of each tile and layer those of the groups one after another, see `entries_of`. WINDOW_0, WINDOW_1: the
    token blocks, or -1. count: of each group. signals: zeros, which the kernels count in and put back.
    """

    entries: Int[Array, "M L E F"]
    count: Int[Array, "M L 4"]
    signals: Int[Array, "X"]


def entries_of(group: str, max_rank: int) -> tuple[int, int]:
    """The first entry of a group in a tile, and how many there may be, a multiple of PASS."""
    most = [ceil_div(_PAIRS * max_rank_blocks(g, max_rank), PASS) * PASS for g in GROUPS]
    index = list(GROUPS).index(group)
    return sum(most[:index]), most[index]


def make_tile_shrinks(a: Plan, tiles: Tiles, *, num_tokens: int, max_rank: int) -> TileShrinks:
    """Of a plan of A that was cut at windows."""
    used, second, token = listed(a)
    tile, index = token // TILE, jnp.arange(len(token), dtype=jnp.int32)
    number = jnp.arange(num_tokens // TILE, dtype=jnp.int32)
    is_in = used & (tile == number[:, None])  # [M, N]
    followed = jnp.roll(second, -1) & jnp.roll(used, -1) & (index + 1 < len(token))
    odd = token // (TILE // 2) % 2 == 1
    windows = jnp.stack([jnp.where(odd, -1, index), jnp.where(odd, index, jnp.where(followed, index + 1, -1))])
    entries, counts = [], []
    for group in GROUPS:
        section, granules, *pages = group_fields(group)
        blocks = -(-a.records[:, :, granules] // BLOCK_GRANULES)  # [N, L]
        blocks = jnp.where((used & ~second)[:, None], blocks, 0)
        start = jnp.cumsum(blocks, axis=0, dtype=jnp.int32) - blocks
        start -= start[tiles.first_block[jnp.clip(tile, 0, len(number) - 1)]]
        counts.append(jnp.sum(jnp.where(is_in[:, :, None], blocks, 0), axis=1, dtype=jnp.int32))
        place = jnp.arange(entries_of(group, max_rank)[1], dtype=jnp.int32)[:, None, None]
        within = place - start  # [E, N, L]
        is_of = (within >= 0) & (within < blocks) & is_in[:, None, :, None]  # [M, E, N, L]
        record = jnp.sum(jnp.where(is_of, index[:, None], 0), axis=2, dtype=jnp.int32).swapaxes(1, 2)  # [M, L, E]
        rank_block = jnp.sum(jnp.where(is_of, within, 0), axis=2, dtype=jnp.int32).swapaxes(1, 2)
        found = a.records[record, jnp.arange(a.records.shape[1])[:, None]]
        left = jnp.clip(found[..., granules] - rank_block * BLOCK_GRANULES, 0, BLOCK_GRANULES)
        fields = [found[..., section], left, found[..., PAGE_START], *(found[..., p] for p in pages)]
        entries.append(jnp.stack([*fields, *windows[:, record], rank_block], axis=-1))
    # Zeros that XLA cannot know to be zeros: kernels write to them, so they must be made anew in every step.
    zero = jnp.minimum(a.counts[0], 0)
    layers = a.records.shape[1]
    return TileShrinks(
        entries=jnp.concatenate(entries, axis=2),
        count=jnp.stack(counts, axis=2),
        signals=jnp.full(layers * len(GROUPS) * SIGNALS, zero, jnp.int32),
    )
