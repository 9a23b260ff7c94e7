"""The roles of shrink for short segments: ``y = x A^T`` on gathered weight tiles, a split of the input width at a time.

The stacked ranks are the M = 64 rows of wgmma and the tokens its N = 8 columns. Where a rank block has few granules, a
stage holds more than one chunk of columns, so that as many bytes are in flight.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_RANKS
from pallas_kernels.lora.block_signals import ShortSignals
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, ChunkSource, for_items
from pallas_kernels.lora.short_items import ShrinkItem, ShrinkItems
from pallas_kernels.lora.short_ring import WARP_CHUNKS, ShortRing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortShrink:
    """items: of the launch; ring: shared memory. x: activations [T, tiles, 64]; y: partial sums [blocks, splits, rows,
    8] in global memory. signals: None if nobody waits for blocks.
    """

    items: ShrinkItems
    source: ChunkSource
    ring: ShortRing
    cta: Any
    x: Any
    y: Any
    pool: Any
    page_ids: Any
    signals: ShortSignals | None

    @property
    def num_items(self):
        return self.items.local(self.cta)

    def _fetch(self, n) -> list:
        return self.items.fetch(self.cta, n)

    def _describe(self, n, fetched) -> ShrinkItem:
        return self.items.describe(self.cta, n, fetched)

    def load(self, warp):
        """The role of a warp of the loading warpgroup. Returns the number of stages that they filled."""
        items, source, ring = self.items, self.source, self.ring
        in_tiles = items.geometry.in_tiles(GROUPS[items.group][0])
        max_span = self.y.shape[2] // TILE_RANKS * in_tiles

        def set_body(item: ShrinkItem, pages, number, issued):
            first_tile = item.section + item.rank_block * (STAGE_CHUNKS * in_tiles)
            mine = [warp * WARP_CHUNKS + i for i in range(WARP_CHUNKS)]
            subs = [items.sub(item, s) for s in mine]
            granules = [first_tile + (s - sub * item.granules) * in_tiles for s, sub in zip(mine, subs, strict=True)]
            columns = [items.column(item, number, sub) for sub in (*subs, warp)]

            def stage_body(stage, _):
                slot = lax.rem(issued + stage, jnp.int32(ring.stages))
                *wanted, (x_tile, x_wanted) = (column(stage) for column in columns)
                indices = [
                    source.locate(granule + jnp.where(valid, tile, 0), pages)
                    for granule, (tile, valid) in zip(granules, wanted, strict=True)
                ]
                ring.wait_empty(issued + stage)
                ring.expect(slot, sum(jnp.where(valid, ring.unit_bytes, 0) for _, valid in (*wanted, (0, x_wanted))))
                for s, index, (_, valid) in zip(mine, indices, wanted, strict=True):
                    source.copy(self.pool, index, ring.chunks, slot * STAGE_CHUNKS + s, ring.full.at[slot], valid)
                target, x_tile = ring.side_block(slot, warp), jnp.where(x_wanted, x_tile, 0)
                source.copy_tokens(self.x, item.token, x_tile, target, TILE_RANKS, ring.full.at[slot], x_wanted)
                return ()

            num_stages = items.stages(item, number)
            lax.fori_loop(0, num_stages, stage_body, ())
            return issued + num_stages

        def item_body(item: ShrinkItem, _, issued):
            pages = source.pages(item.section, max_span, item.pages, item.page_start, self.page_ids)
            first = item.first_set
            return lax.fori_loop(
                first, first + item.num_sets, lambda number, issued: set_body(item, pages, number, issued), issued
            )

        return for_items(self.num_items, self._fetch, self._describe, item_body, jnp.int32(0))

    def multiply(self, wg):
        """The role of a multiplying warpgroup. Returns the number of stages that it passed."""
        items, ring = self.items, self.ring

        def set_body(item: ShrinkItem, number, seen):
            num_stages = items.stages(item, number)

            def accumulate(acc):
                @pl.loop(0, num_stages)
                def _(stage):
                    slot = lax.rem(seen + stage, jnp.int32(ring.stages))
                    plgpu.barrier_wait(ring.full.at[slot])
                    first, count = items.mine(item, number, stage, wg)

                    @pl.loop(first, first + count)
                    def _(sub):
                        row = pl.multiple_of(slot * STAGE_ROWS + sub * item.granules * TILE_RANKS, TILE_RANKS)
                        plgpu.wgmma(acc, ring.operand.at[pl.ds(row, STAGE_ROWS)], ring.side_operand(slot, sub).T)
                        plgpu.wgmma_wait(0)

                    plgpu.barrier_arrive(ring.empty.at[slot])

                return acc[...]

            with jax.named_scope("products"):
                total = pl.run_scoped(accumulate, plgpu.ACC((STAGE_ROWS, TILE_RANKS), jnp.float32))

            @pl.when(items.split(number, wg)[1] > 0)
            def _():
                rows = pl.ds(item.rank_block * STAGE_ROWS, STAGE_ROWS)
                self.y[item.block, number * items.sides + wg, rows] = total

            return seen + num_stages

        def item_body(item: ShrinkItem, _, carry):
            seen, n = carry
            first = item.first_set
            seen = lax.fori_loop(first, first + item.num_sets, lambda number, seen: set_body(item, number, seen), seen)
            if self.signals is not None:
                self.signals.finish(n, self.num_items, item.block)
            return seen, n + 1

        return for_items(self.num_items, self._fetch, self._describe, item_body, (jnp.int32(0), jnp.int32(0)))[0]
