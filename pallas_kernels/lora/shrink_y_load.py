"""The warpgroup that fills the ring of shrink before a product: sixteen tokens' activations, and their segments' A.

Each warp copies two granules of a stage and, the last two, eight of its tokens: started one after another, the copies
of a stage take longer to start than to arrive.
"""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_RANKS
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, ChunkSource, ceil_div, having_read
from pallas_kernels.lora.plan import PAGE_START, group_fields
from pallas_kernels.lora.short_ring import WARP_CHUNKS, WARPS
from pallas_kernels.lora.windows import PART

OCTETS = PART // TILE_RANKS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkYLoad:
    """warp: whose part this is. x: [T, tiles, 64]; records, page_ids: of the adapters' A; in global memory. rows,
    chunks: the ring's activations and A, as they are copied; full, empty: barriers of its `stages` slots. total: stages
    of 64 ranks. max_span: most tiles that an adapter has in the group.
    """

    source: ChunkSource
    group: str
    stages: int
    total: int
    max_span: int
    warp: Any
    layer: Any
    x: Any
    pool: Any
    records: Any
    page_ids: Any
    rows: Any
    chunks: Any
    full: Any
    empty: Any

    def part(self, part, blocks, count, issued):
        """Loads the stages of a part's segments after so many: of the first `count` of `blocks`. Returns how many there
        are then.
        """
        octet = lax.rem(self.warp, jnp.int32(OCTETS))
        token = part * PART + octet * TILE_RANKS
        return lax.fori_loop(0, count, lambda i, n: self._segment(jnp.where(i == 0, *blocks), token, octet, n), issued)

    def _segment(self, block, token, octet, issued):
        source, in_tiles = self.source, self.source.geometry.in_tiles(GROUPS[self.group][0])
        mine = [self.warp * WARP_CHUNKS + i for i in range(WARP_CHUNKS)]
        has_tokens = self.warp >= WARPS - OCTETS  # which copy nothing else of low ranks
        page_start, *read = (self.records[block, self.layer, f] for f in (PAGE_START, *group_fields(self.group)))
        section, all_granules, *known = read
        all_granules = having_read([page_start, *read], all_granules)
        pages = source.pages(section, self.max_span, known, page_start, self.page_ids)

        def rank_body(rank_block, issued):
            granules = all_granules - rank_block * STAGE_CHUNKS
            wanted = [s < granules for s in mine]
            start = section + rank_block * (STAGE_CHUNKS * in_tiles)
            rows = [jnp.where(w, start + s * in_tiles, start) for s, w in zip(mine, wanted, strict=True)]
            copies = sum(w.astype(jnp.int32) for w in wanted)

            @pl.loop(0, self.total)
            def stage_body(stage):
                column = stage * source.chunk
                slot = lax.rem(issued + stage, jnp.int32(self.stages))
                indices = [source.locate(row + column, pages) for row in rows]
                barrier, target = self.full.at[slot], self._tokens(slot, octet)
                self._wait_empty(issued + stage)
                source.expect(barrier, copies, has_tokens.astype(jnp.int32))
                source.copy_tokens(self.x, token, column, target, TILE_RANKS, barrier, has_tokens)
                for s, index, w in zip(mine, indices, wanted, strict=True):
                    source.copy(self.pool, index, self.chunks, slot * STAGE_CHUNKS + s, barrier, w)

            return issued + self.total

        return lax.fori_loop(0, ceil_div(all_granules, STAGE_CHUNKS), rank_body, issued)

    def _tokens(self, slot, octet):
        if self.source.whole:
            return self.rows.at[slot, pl.ds(octet, 1)]
        return self.rows.at[slot, pl.ds(pl.multiple_of(octet * TILE_RANKS, TILE_RANKS), TILE_RANKS)]

    def _wait_empty(self, issued):
        @pl.when(issued >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[lax.rem(issued, jnp.int32(self.stages))])
