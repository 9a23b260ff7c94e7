"""Shrink for short segments: ``y = x A^T`` on gathered weight tiles, a set of splits of the input width at a time.

The stacked ranks are the M = 64 rows of wgmma and the tokens its N columns: eight for each split that shares a stage.
What a split's ranks give with another split's tokens is computed and not used. A product for each split would take as
long as this one, which is bound by reading 64 rows from shared memory, however many of them are the split's.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_RANKS
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, ChunkSource
from pallas_kernels.lora.short_items import ShrinkItem, ShrinkItems
from pallas_kernels.lora.short_ring import SIDE_BLOCKS, WARP_CHUNKS, ShortRing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortShrink:
    """items: of the launch; ring: shared memory. x: activations [T, tiles, 64]. max_granules: most granules that an
    adapter has in the group.
    """

    items: ShrinkItems
    source: ChunkSource
    ring: ShortRing
    x: Any
    pool: Any
    page_ids: Any
    max_granules: int

    def load(self, item: ShrinkItem, warp, issued):
        """What a warp of the loading warpgroup does for an item, when the ring has had `issued` stages. Returns how
        many it has had then.
        """
        items, source, ring = self.items, self.source, self.ring
        in_tiles = items.geometry.in_tiles(GROUPS[items.group][0])
        first_tile = item.section + item.first_granule * in_tiles
        mine = [warp * WARP_CHUNKS + i for i in range(WARP_CHUNKS)]
        places, granules = zip(*(items.place(item, s) for s in mine), strict=True)
        pages = source.pages(item.section, self.max_granules * in_tiles, item.pages, item.page_start, self.page_ids)

        def set_body(number, issued):
            columns = [items.columns(item, number, place) for place in (*places, warp)]

            def stage_body(stage, _):
                slot = lax.rem(issued + stage, jnp.int32(ring.stages))
                *wanted, (x_tile, _, x_valid) = (column(stage) for column in columns)
                indices, valids = [], []
                for granule, (tile, valid, _) in zip(granules, wanted, strict=True):
                    valids.append(valid & (granule < item.granules))
                    tile = first_tile + jnp.where(valids[-1], granule * in_tiles + tile, 0)
                    indices.append(source.locate(tile, pages))
                ring.wait_empty(issued + stage)
                with jax.named_scope("issue_a"):
                    ring.expect(slot, sum(jnp.where(valid, ring.unit_bytes, 0) for valid in (*valids, x_valid)))
                    for s, index, valid in zip(mine, indices, valids, strict=True):
                        source.copy(self.pool, index, ring.chunks, slot * STAGE_CHUNKS + s, ring.full.at[slot], valid)
                    target, x_tile = ring.side_block(slot, warp), jnp.where(x_valid, x_tile, 0)
                    source.copy_tokens(self.x, item.token, x_tile, target, TILE_RANKS, ring.full.at[slot], x_valid)
                return ()

            num_stages = items.stages(item, number)
            lax.fori_loop(0, num_stages, stage_body, ())
            return issued + num_stages

        return lax.fori_loop(0, items.sets(item), set_body, issued)

    def multiply(self, item: ShrinkItem, seen, store):
        """What the multiplying warpgroup does for an item, when `seen` stages have passed. Returns how many have then.

        store: takes the number of a set and its product, float32 [64, 8 places]: see `store_diagonal`.
        """
        items, ring = self.items, self.ring

        def clear_repeated(number, stage, slot):
            for place in range(items.config.shrink_packed):
                _, valid, length = items.split(item, number, place)
                pl.when(valid & (stage >= length))(functools.partial(ring.clear_side, slot, place))

        def set_body(number, seen):
            num_stages = items.stages(item, number)

            def free(stage):
                plgpu.barrier_arrive(ring.empty.at[lax.rem(seen + stage, jnp.int32(ring.stages))])

            def accumulate(acc):
                @pl.loop(0, num_stages)
                def _(stage):
                    slot = lax.rem(seen + stage, jnp.int32(ring.stages))
                    with jax.named_scope("wait_a"):
                        plgpu.barrier_wait(ring.full.at[slot])
                    if items.ragged:
                        clear_repeated(number, stage, slot)
                    plgpu.wgmma(acc, ring.weights(slot), ring.sides(slot).T)
                    plgpu.wgmma_wait(1)
                    pl.when(stage > 0)(lambda: free(stage - 1))

                plgpu.wgmma_wait(0)
                free(num_stages - 1)
                return acc[...]

            width = SIDE_BLOCKS * TILE_RANKS
            with jax.named_scope("products_a"):
                total = pl.run_scoped(accumulate, plgpu.ACC((STAGE_ROWS, width), jnp.float32))
            store(number, total)
            return seen + num_stages

        return lax.fori_loop(0, items.sets(item), set_body, seen)
