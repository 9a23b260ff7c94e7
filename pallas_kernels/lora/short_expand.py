"""Expand for short segments: adds ``scaling * y B`` to the base projections in place.

The outputs are the M rows of wgmma, the tokens its N columns, the ranks its K = 64. Where a module has few granules, a
stage holds chunks of several output ranges, each multiplied by a copy of y that is zero outside its own rows; the
copies stand side by side, so that one product gives all output ranges of a stage. All eight chunks of a stage come from
the adapter at hand (the last one is repeated), so that no weight of another adapter, were it infinite, can reach a
result. The base outputs come with the stage that completes a product, row by row: other segments' rows are not read.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import start_copy
from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.add_rows import add_rows, add_rows_interpreted
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, ChunkSource
from pallas_kernels.lora.short_ring import WARP_CHUNKS, ShortRing


def _divmod(a, b):
    return lax.div(a, b), lax.rem(a, b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortExpand:
    """out: base outputs [T, c] in global memory. y_smem: two buffers of y as wgmma takes it, handed over by the
    barriers y_full and y_empty. moved: shared memory of add_rows.
    """

    items: ExpandItems
    source: ChunkSource
    ring: ShortRing
    out: Any
    pool: Any
    page_ids: Any
    y_smem: Any
    y_full: Any
    y_empty: Any
    moved: Any
    interpret: bool

    @property
    def _packed(self) -> int:
        return self.items.config.expand_packed

    @property
    def _columns(self) -> int:
        return self.items.chunk * TILE_COLS

    def load(self, item: ExpandItem, warp, issued):
        """What a warp of the loading warpgroup does for an item, when the ring has had `issued` stages. Returns how
        many it has had then.
        """
        items, source, ring = self.items, self.source, self.ring
        rank_tiles = self.y_smem.shape[1]
        mine = [warp * WARP_CHUNKS + i for i in range(WARP_CHUNKS)]
        pages = source.pages(item.section, items.max_span(rank_tiles), item.pages, item.page_start, self.page_ids)

        def stage_body(st, _):
            slot = lax.rem(issued + st, jnp.int32(ring.stages))
            group, rank_tile = (st, jnp.int32(0)) if rank_tiles == 1 else _divmod(st, item.rank_tiles)
            first = group * item.packed
            indices = [source.locate(items.chunk_tile(item, s, rank_tile, first), pages) for s in mine]
            has_base = (warp < jnp.minimum(item.packed, item.length - first)) & (rank_tile == item.rank_tiles - 1)
            num_bases = jnp.where(has_base, item.num_tokens, 0)
            with jax.named_scope("wait_empty"):
                ring.wait_empty(issued + st)
            with jax.named_scope("issue_b"):
                ring.expect(slot, WARP_CHUNKS * ring.unit_bytes + num_bases * (2 * self._columns))
                for s, index in zip(mine, indices, strict=True):
                    chunk = slot * STAGE_CHUNKS + s
                    source.copy(self.pool, index, ring.chunks, chunk, ring.full.at[slot], jnp.bool_(True))
                self._load_bases(item, first + jnp.where(has_base, warp, 0), num_bases, slot, warp)
            return ()

        lax.fori_loop(0, item.num_stages, stage_body, ())
        return issued + item.num_stages

    def _load_bases(self, item: ExpandItem, chunk, num_tokens, slot, block):
        """Starts copying base outputs of the item's first tokens, those of its output chunk `chunk`, to a block at the
        slot's side.
        """
        source, ring, barrier = self.source, self.ring, self.ring.full.at[slot]
        column = (item.out_tile + chunk * self.items.chunk) * TILE_COLS

        def piece(t):
            base = self.out.at[pl.ds(item.token + t, 1), pl.ds(column, self._columns)]
            return base, ring.rows.at[pl.ds(ring.side_row(slot, block) + t, 1)]

        if source.whole:

            def token_body(n, _):
                base, target = piece(item.offset + n)
                start_copy(base, target, barrier, jnp.bool_(True))
                return ()

            lax.fori_loop(0, num_tokens, token_body, ())
            return
        for t in range(TILE_RANKS):
            wanted = (t >= item.offset) & (t < item.offset + num_tokens)
            base, target = piece(jnp.where(wanted, t, 0))
            source.copy_if(wanted, base, target, barrier)

    def multiply(self, item: ExpandItem, carry):
        """What the multiplying warpgroup does for an item. carry: stages that have passed, and buffers of y."""
        seen, used = carry
        buffer = lax.rem(used, 2)
        targeted = item.length > 0

        @pl.when(targeted)
        def _():
            with jax.named_scope("wait_y"):
                plgpu.barrier_wait(self.y_full.at[buffer])
            pl.loop(0, item.groups)(lambda group: self._group(item, seen, buffer, group))
            plgpu.barrier_arrive(self.y_empty.at[buffer])

        return seen + item.num_stages, used + jnp.where(targeted, 1, 0)

    def _group(self, item: ExpandItem, seen, buffer, group):
        """All output chunks that share a stage."""
        ring, rank_tiles = self.ring, item.rank_tiles
        first_stage = seen + group * rank_tiles

        def accumulate(acc):
            @pl.loop(0, rank_tiles)
            def rank_body(k):
                slot = lax.rem(first_stage + k, jnp.int32(ring.stages))
                with jax.named_scope("wait_b"):
                    plgpu.barrier_wait(ring.full.at[slot])
                plgpu.wgmma(acc, ring.weights(slot).T, self.y_smem.at[buffer, k].T)
                plgpu.wgmma_wait(0)
                # the last stage's side is still needed
                pl.when(k < rank_tiles - 1)(lambda: plgpu.barrier_arrive(ring.empty.at[slot]))

            return acc[...]

        width = self._packed * TILE_RANKS
        with jax.named_scope("products_b"):
            delta = pl.run_scoped(accumulate, plgpu.ACC((self._columns, width), jnp.float32))
        slot = lax.rem(first_stage + rank_tiles - 1, jnp.int32(ring.stages))
        first = group * item.packed
        base = ring.rows.at[pl.ds(pl.multiple_of(ring.side_row(slot, 0), TILE_RANKS), width)]
        column = (item.out_tile + first * self.items.chunk) * TILE_COLS
        chunks = jnp.minimum(item.packed, item.length - first)
        where = item.token, column, item.offset, item.num_tokens, chunks
        with jax.named_scope("add"):
            if self.interpret:
                add_rows_interpreted(delta, base, self.out, *where)
            else:
                add_rows(delta, base, self.out, self.moved, *where)
        plgpu.barrier_arrive(ring.empty.at[slot])
