"""The roles of expand for short segments: adds ``scaling * y B`` to the base projections in place.

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

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.block_signals import sync_warpgroup
from pallas_kernels.lora.bulk_copy import start_copy
from pallas_kernels.lora.column_scatter import scatter_column
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.mosaic_common import STAGE_CHUNKS, STAGE_ROWS, ChunkSource, for_items
from pallas_kernels.lora.short_ring import WARP_CHUNKS, ShortRing


def _divmod(a, b):
    return lax.div(a, b), lax.rem(a, b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortExpand:
    """out: base outputs [T, c] in global memory. y_smem: two buffers of y as wgmma takes it, handed over by the
    barriers y_full and y_empty. rows: shared memory float32 [warpgroups, 2, chunks, outputs].
    """

    items: ExpandItems
    source: ChunkSource
    ring: ShortRing
    cta: Any
    out: Any
    pool: Any
    page_ids: Any
    y_smem: Any
    y_full: Any
    y_empty: Any
    rows: Any
    consumers: int
    interpret: bool

    def fetch(self, n) -> list:
        return self.items.fetch(self.cta, n)

    def describe(self, n, fetched) -> ExpandItem:
        return self.items.describe(self.cta, n, fetched)

    @property
    def num_items(self):
        return self.items.local(self.cta)

    @property
    def _packed(self) -> int:
        return self.items.config.expand_packed

    @property
    def _columns(self) -> int:
        return self.items.chunk * TILE_COLS

    def load(self, warp, issued):
        """The role of a warp of the loading warpgroup, when the ring has had `issued` stages. Returns how many it has
        had then.
        """
        items, source, ring = self.items, self.source, self.ring
        rank_tiles = self.y_smem.shape[1]
        mine = [warp * WARP_CHUNKS + i for i in range(WARP_CHUNKS)]

        def item_body(item: ExpandItem, _, issued):
            pages = source.pages(item.section, items.max_span(rank_tiles), item.pages, item.page_start, self.page_ids)

            def stage_body(st, _):
                slot = lax.rem(issued + st, jnp.int32(ring.stages))
                group, rank_tile = (st, jnp.int32(0)) if rank_tiles == 1 else _divmod(st, item.rank_tiles)
                first = group * item.packed
                indices = [source.locate(items.chunk_tile(item, s, rank_tile, first), pages) for s in mine]
                has_base = (warp < jnp.minimum(item.packed, item.length - first)) & (rank_tile == item.rank_tiles - 1)
                num_bases = jnp.where(has_base, item.num_tokens, 0)
                ring.wait_empty(issued + st)
                ring.expect(slot, WARP_CHUNKS * ring.unit_bytes + num_bases * (2 * self._columns))
                for s, index in zip(mine, indices, strict=True):
                    chunk = slot * STAGE_CHUNKS + s
                    source.copy(self.pool, index, ring.chunks, chunk, ring.full.at[slot], jnp.bool_(True))
                self._load_bases(item, first + jnp.where(has_base, warp, 0), num_bases, slot, warp)
                return ()

            lax.fori_loop(0, item.num_stages, stage_body, ())
            return issued + item.num_stages

        return for_items(self.num_items, self.fetch, self.describe, item_body, issued)

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

    def multiply(self, wg, seen):
        """The role of a multiplying warpgroup, which has passed `seen` stages."""

        def item_body(item: ExpandItem, _, carry):
            seen, used = carry
            buffer = lax.rem(used, 2)
            targeted = item.length > 0

            @pl.when(targeted)
            def add_item():
                with jax.named_scope("wait_y"):
                    plgpu.barrier_wait(self.y_full.at[buffer])
                groups = lax.div(item.num_stages, item.rank_tiles)
                pl.loop(0, groups)(lambda group: self._group(item, wg, seen, buffer, group))
                plgpu.barrier_arrive(self.y_empty.at[buffer])

            return seen + item.num_stages, used + jnp.where(targeted, 1, 0)

        for_items(self.num_items, self.fetch, self.describe, item_body, (seen, jnp.int32(0)))

    def _group(self, item: ExpandItem, wg, seen, buffer, group):
        """All output chunks that share a stage."""
        ring, rank_tiles = self.ring, item.rank_tiles
        half = self._columns // self.consumers
        mine = pl.ds(pl.multiple_of(wg * half, half), half)
        first_stage = seen + group * rank_tiles

        def accumulate(acc):
            @pl.loop(0, rank_tiles)
            def rank_body(k):
                slot = lax.rem(first_stage + k, jnp.int32(ring.stages))
                plgpu.barrier_wait(ring.full.at[slot])
                window = pl.ds(pl.multiple_of(slot * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)
                plgpu.wgmma(acc, ring.operand.at[window, mine].T, self.y_smem.at[buffer, k].T)
                plgpu.wgmma_wait(0)
                # the last stage's side is still needed
                pl.when(k < rank_tiles - 1)(lambda: plgpu.barrier_arrive(ring.empty.at[slot]))

            return acc[...]

        width = self._packed * TILE_RANKS
        with jax.named_scope("products"):
            delta = pl.run_scoped(accumulate, plgpu.ACC((half, width), jnp.float32))
        slot = lax.rem(first_stage + rank_tiles - 1, jnp.int32(ring.stages))
        first = group * item.packed
        row_layout = plgpu.Layout.WG_STRIDED((half,), vec_size=1) if half == 128 else plgpu.Layout.WGMMA.reduce(1)
        load = lambda ref: plgpu.load(ref, layout=row_layout, optimized=False)  # noqa: E731
        sync = plgpu.commit_smem if self.interpret else sync_warpgroup

        @pl.loop(0, item.num_tokens)
        def token_body(n):
            t = item.offset + n
            moved = self.rows.at[wg, lax.rem(n, 2)]
            scatter_column(delta, t, moved, interpret=self.interpret)
            sync()
            for i in range(self._packed):

                @pl.when((i < item.packed) & (first + i < item.length))
                def _(i=i):
                    base = load(ring.rows.at[ring.side_row(slot, i) + t, mine])
                    total = base.astype(jnp.float32) + load(moved.at[i])
                    tile = item.out_tile + (first + i) * self.items.chunk
                    column = pl.ds(pl.multiple_of(tile * TILE_COLS + wg * half, half), half)
                    self.out[item.token + t, column] = total.astype(self.out.dtype)

        plgpu.barrier_arrive(ring.empty.at[slot])
        # The next stage's first token may use the buffer that this one's last token used.
        pl.when(lax.rem(item.num_tokens, 2) == 1)(sync)
