"""Shrink in the kernels of base projections with their deltas, before their first base weights.

A *unit* is 128 tokens and a split of the input width: a program multiplies its units' tokens with A of all segments
that reach into them, so that A and x cross into shared memory once. The sums go to global memory, and halfway through
the base weights of its first tile each program takes some of them, adds the splits up in their order and writes y as
stages of deltas take it. All that takes long waits beside base weights: signals are sent after a few more stages of
these, and sums to be added up come through the ring like other stages.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.config import LoraConfig, chunk_tiles
from pallas_kernels.lora.expand_y import total_of_tokens
from pallas_kernels.lora.mosaic_common import (
    PLAN_ROWS,
    STAGE_CHUNKS,
    STAGE_ROWS,
    STEP_ROWS,
    ChunkSource,
    capacity,
    ceil_div,
)
from pallas_kernels.lora.plan import NUM_TOKENS, OFFSET, Half, Plan, module_field, y_rows
from pallas_kernels.lora.product_tiles import ProductTiles
from pallas_kernels.lora.short_items import split_chunks
from pallas_kernels.lora.signals import leave_signals, signal, wait_signals
from pallas_kernels.lora.stage_ring import PIECE, STAGES, TILE_BYTES, StageRing
from pallas_kernels.lora.tile_shrinks import (
    FIRST_PAGE,
    GRANULES,
    NEXT_PAGE,
    PAGE,
    PASS,
    RANK_BLOCK,
    SECTION,
    SIGNALS,
    WINDOW_0,
    TileShrinks,
    entries_of,
)
from pallas_kernels.lora.windows import TILE, WINDOW, Tiles

OPERANDS = ("x", "pool", "page_ids", "entries", "counts", "signals", "first_block", "records", "scaling")
_WGMMA = plgpu.Layout.WGMMA
_MULTIPLYING = 2
"""Warpgroups, a window each."""
_Y_WARPS = 2
"""That copy y, a window each, and wait for it."""
_LATER = 8
"""Stages of base weights before a signal, in which what it stands for arrives in memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkShape:
    """source: of A, tile by tile."""

    source: ChunkSource
    group: str
    config: LoraConfig
    max_rank: int

    @property
    def in_tiles(self) -> int:
        return self.source.geometry.in_tiles(GROUPS[self.group][0])

    @property
    def split_tiles(self) -> int:
        """Tiles of the input in a split: as many as the other kernels sum on their own."""
        geometry = self.source.geometry
        chunk = chunk_tiles(geometry, self.config.chunk_tiles)
        return split_chunks(geometry, self.group, self.config, chunk)[1] * chunk

    @property
    def splits(self) -> int:
        return static_ceil_div(self.in_tiles, self.split_tiles)

    @property
    def rank_tiles(self) -> int:
        """Of each module in y."""
        return static_ceil_div(self.max_rank, STAGE_ROWS)

    @property
    def pieces(self) -> int:
        """Of a module's ranks, each a stage of sums."""
        return static_ceil_div(self.max_rank, PIECE)

    @property
    def piece_bytes(self) -> int:
        return 4 * self.splits * WINDOW * PIECE

    @property
    def sums_shape(self) -> tuple[int, int, int]:
        """Of a token block."""
        return self.splits, WINDOW, y_rows(self.group, self.max_rank)

    @property
    def y_shape(self) -> tuple[int, int]:
        """Of a token block: each module's ranks are padded to a multiple of 64."""
        return WINDOW, len(GROUPS[self.group]) * self.rank_tiles * STAGE_ROWS


def shrink_operands(x, pages, a: Half, b: Plan, tiles: Tiles, shrinks: TileShrinks, shape: ShrinkShape) -> tuple:
    """Arrays for the refs of `ProductShrink`, in the order of OPERANDS, but for those that the kernel returns. a: where
    A is. b: plan of B.
    """
    pool = shape.source.view_of_pool(pages)
    counted = shrinks.entries, shrinks.count, shrinks.signals
    return x, pool, a.page_ids, *counted, tiles.first_block, b.records, b.scaling


def shrink_rows(num_tokens: int, arrays: tuple) -> dict[int, int]:
    """Rows of these that a kernel is lowered for, see `any_rows`."""
    records = arrays[7]
    most, blocks = capacity(STEP_ROWS, num_tokens), capacity(PLAN_ROWS, records.shape[0])
    tiles = most // TILE
    return {0: most, 3: tiles, 4: tiles, 6: tiles + 1, 7: blocks, 8: blocks}


def shrink_out(shape: ShrinkShape, blocks: int, dtype) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of sums and y, of so many token blocks."""
    sums = jax.ShapeDtypeStruct((blocks, *shape.sums_shape), jnp.float32)
    return sums, jax.ShapeDtypeStruct((blocks, *shape.y_shape), dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductShrink:
    """x: [T, in]. pool, page_ids: of A, tile by tile. entries, counts, signals: of TileShrinks. first_block: of Tiles.
    records, scaling: of the plan of B. sums: float32 [token blocks, splits, 64, ranks]. y: bfloat16 [token blocks, 64,
    modules x ranks], after the blocks in use one more, of zeros. All in global memory.

    barriers: in interpret mode, where each program shrinks all for itself: of who has summed, and who has added up.
    """

    shape: ShrinkShape
    ring: StageRing
    order: ProductTiles
    layer: Any
    x: Any
    pool: Any
    page_ids: Any
    entries: Any
    counts: Any
    signals: Any
    first_block: Any
    records: Any
    scaling: Any
    sums: Any
    y: Any
    barriers: tuple | None

    @property
    def _blocks(self):
        """Token blocks in use. If there are none nobody shrinks, signals or waits."""
        return self.first_block[self.order.tiles]

    @property
    def _programs(self):
        return self.order.programs if self.barriers is None else 1

    def _dealt(self, total):
        """How many of so many things this program takes."""
        first = self.order.cta if self.barriers is None else 0
        return jnp.where(self._blocks > 0, ceil_div(jnp.maximum(total - first, 0), self._programs), 0)

    def _nth(self, n):
        """Which is the n-th of these."""
        return self.order.cta + n * self._programs if self.barriers is None else n

    def _for_passes(self, body: Callable, before):
        """``body(tile, pass, split, first tile of the input, stages, stages before)`` for each of this program's passes
        of entries. Returns the stages that there then were.
        """

        def unit_body(n, before):
            unit = self._nth(n)
            split = lax.div(unit, self.order.tiles)
            tile, first = unit - split * self.order.tiles, split * self.shape.split_tiles
            length = jnp.clip(self.shape.in_tiles - first, 0, self.shape.split_tiles)

            def pass_body(number, before):
                body(tile, number, split, first, length, before)
                return before + length

            return lax.fori_loop(0, ceil_div(self._count(tile), PASS), pass_body, before)

        return lax.fori_loop(0, self._dealt(self.order.tiles * self.shape.splits), unit_body, before)

    def _count(self, tile):
        """Entries of a tile."""
        return self.counts[tile, self.layer, list(GROUPS).index(self.shape.group)]

    def _entry(self, tile, number, place, fields) -> list:
        """Whether a pass has an entry in that place, and its fields."""
        e = number * PASS + place
        first, _ = entries_of(self.shape.group, self.shape.max_rank)
        return [e < self._count(tile), *(self.entries[tile, self.layer, first + e, field] for field in fields)]

    def load(self, warp, before):
        """A warp's part of the units' stages: x, if it is the first one, and A of an entry. Returns the stages that
        there then were.
        """
        ring, source, in_tiles = self.ring, self.shape.source, self.shape.in_tiles
        span = y_rows(self.shape.group, self.shape.max_rank) // TILE_RANKS * in_tiles

        def load_pass(tile, number, split, first, length, before):
            del split
            fields = (SECTION, GRANULES, FIRST_PAGE, PAGE, NEXT_PAGE, RANK_BLOCK)
            exists, section, granules, first_page, *known, rank_block = self._entry(tile, number, warp, fields)
            granules = jnp.where(exists, granules, 0)
            pages = source.pages(section, span, known, first_page, self.page_ids)
            start = section + rank_block * (STAGE_CHUNKS * in_tiles) + first
            num_bytes = granules * TILE_BYTES + jnp.where(warp == 0, TILE * TILE_COLS * 2, 0)

            @pl.loop(0, length)
            def _(k):
                slot = ring.claim_bytes(before + k, num_bytes)
                columns = pl.ds((first + k) * TILE_COLS, TILE_COLS)
                ring.copy(self.x.at[pl.ds(tile * TILE, TILE), columns], ring.rows.at[slot], slot, warp == 0)

                # a loop, because eight places at once do not fit into the registers
                @pl.loop(0, granules if source.whole else STAGE_CHUNKS)
                def _(s):
                    wanted = s < granules
                    index = source.locate(jnp.where(wanted, start + s * in_tiles, start) + k, pages)
                    source.copy(self.pool, index, ring.a_chunks, ring.a_row(slot, warp, s), ring.full.at[slot], wanted)

        return self._for_passes(load_pass, before)

    def multiply(self, window, seen) -> Any:
        """Of a warpgroup: its window's sums of the units. Returns the stages that there then were."""

        def multiply_pass(tile, number, split, first, length, seen):
            del first
            entries = [self._entry(tile, number, j, (WINDOW_0 + window, RANK_BLOCK)) for j in range(PASS)]
            wanted = [exists & (block >= 0) for exists, block, _ in entries]
            found = self._products(window, wanted, length, seen)
            for part, (_, block, rank_block), is_wanted in zip(found, entries, wanted, strict=True):

                @pl.when(is_wanted)
                def _(part=part, block=block, rank_block=rank_block):
                    ranks = pl.ds(pl.multiple_of(rank_block * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)
                    self.sums[block, split, :, ranks] = part

        return self._for_passes(multiply_pass, seen)

    def _products(self, window, wanted: list, length, seen) -> tuple:
        """Of each entry, float32 [64 tokens, 64 ranks]."""
        ring = self.ring
        mine = pl.ds(pl.multiple_of(window * WINDOW, WINDOW), WINDOW)

        def accumulate(*totals):
            @pl.loop(0, length)
            def _(k):
                slot = lax.rem(seen + k, jnp.int32(STAGES))
                plgpu.barrier_wait(ring.full.at[slot])
                for j, total in enumerate(totals):

                    @pl.loop(0, wanted[j].astype(jnp.int32))  # a condition has no accumulator
                    def _(_, j=j, total=total):
                        plgpu.wgmma(total, ring.rows.at[slot, mine], ring.a(slot, j).T)
                        plgpu.wgmma_wait(0)

                plgpu.barrier_arrive(ring.empty.at[slot])

            return tuple(total[...] for total in totals)

        return pl.run_scoped(accumulate, *[plgpu.ACC((WINDOW, STAGE_ROWS), jnp.float32)] * PASS)

    def for_base_stages(self, window, n, seen, steps: int, stages: Callable) -> None:
        """Of a warpgroup: the base projection of its n-th tile, ``stages(seen, first, last)`` at a time, and between
        them, in the first one, what others wait for. seen: stages before.
        """
        halfway = steps // 2
        sums, end = min(_LATER, halfway), min(halfway + _LATER, steps)
        is_first = (n == 0) & (self._blocks > 0)
        fields = self._fields(0)  # now, because it takes long
        stages(seen, 0, sums)
        pl.when(is_first)(lambda: self._signal(0))
        stages(seen, sums, halfway)
        pl.when(is_first)(lambda: self._add_up(window, seen + halfway, fields))
        seen += self.sum_stages(n)
        stages(seen, halfway, end)
        pl.when(is_first)(lambda: self._signal(1))
        stages(seen, end, steps)

    def sum_stages(self, n):
        """Stages of sums that come halfway through the base weights of the n-th tile."""
        return jnp.where(n == 0, self._dealt((self._blocks + 1) * self._each), 0)  # of the block of zeros, too

    @property
    def _each(self) -> int:
        """Stages of sums of a token block."""
        return len(GROUPS[self.shape.group]) * self.shape.pieces

    def _place(self, j):
        """Of the program's j-th stage of sums: token block, place of the module in the group, and its piece."""
        number = self._nth(j)
        block = lax.div(number, jnp.int32(self._each))
        number -= block * self._each
        place = lax.div(number, jnp.int32(self.shape.pieces))
        return block, place, number - place * self.shape.pieces

    def _fields(self, j) -> list:
        """Of the j-th stage of sums what it takes of its record: OFFSET, NUM_TOKENS, the module's granules, scaling."""
        block, place, _ = self._place(j)
        block = jnp.minimum(block, self._blocks)
        module = GROUPS[self.shape.group][0] + place
        numbers = [self.records[block, self.layer, i] for i in (OFFSET, NUM_TOKENS, module_field(module) + 1)]
        return [*numbers, self.scaling[block, self.layer, module]]

    def load_sums(self, warp, n, before):
        """A warp's part of the stages of sums of the n-th tile. Returns the stages that there then were."""
        ring, count = self.ring, self.sum_stages(n)

        @pl.when((warp == 0) & (count > 0))
        def _():
            self._await(0, self._programs)

        @pl.loop(0, count)
        def _(j):
            block, place, piece = self._place(j)
            module = GROUPS[self.shape.group][0] + place
            row = jnp.where(block < self._blocks, self.records[block, self.layer, module_field(module) + 2], 0)
            slot = ring.claim_bytes(before + j, jnp.where(warp == 0, self.shape.piece_bytes, 0))
            ranks = pl.ds(row + piece * PIECE, PIECE)
            source = self.sums.at[jnp.minimum(block, jnp.maximum(self._blocks - 1, 0)), :, :, ranks]
            ring.copy(source, ring.sums.at[slot, pl.ds(0, self.shape.splits)], slot, warp == 0)
            ring.arrive_for_missing(slot, 1)

        return before + count

    def _add_up(self, window, seen, fields: list) -> None:
        """Of a warpgroup: y of half of the ranks of the stages of sums."""
        ring, width = self.ring, PIECE // _MULTIPLYING
        ranks = pl.ds(pl.multiple_of(window * width, width), width)
        load = functools.partial(plgpu.load, layout=_WGMMA, optimized=False)
        used = self.shape.pieces * PIECE
        rest = self.shape.rank_tiles * STAGE_ROWS - used

        def add(j, fields):
            offset, num_tokens, granules, scale = fields
            following = self._fields(j + 1)
            block, place, piece = self._place(j)
            slot = lax.rem(seen + j, jnp.int32(STAGES))
            plgpu.barrier_wait(ring.full.at[slot])
            total = functools.reduce(jnp.add, [load(ring.sums.at[slot, i, :, ranks]) for i in range(self.shape.splits)])
            plgpu.barrier_arrive(ring.empty.at[slot])
            left = jnp.where(block < self._blocks, granules * TILE_RANKS - piece * PIECE - window * width, 0)
            y = total_of_tokens(left, offset, num_tokens, scale, total, self.y.dtype)
            first = place * (self.shape.rank_tiles * STAGE_ROWS)
            column = pl.multiple_of(first + piece * PIECE + window * width, width)
            self.y[block, :, pl.ds(column, width)] = y
            if rest:

                @pl.when(piece == self.shape.pieces - 1)
                def _():
                    zeros = plgpu.layout_cast(jnp.zeros((WINDOW, rest // _MULTIPLYING), self.y.dtype), _WGMMA)
                    column = first + used + window * (rest // _MULTIPLYING)
                    self.y[block, :, pl.ds(pl.multiple_of(column, width), rest // _MULTIPLYING)] = zeros

            return following

        lax.fori_loop(0, self.sum_stages(0), add, fields)

    def await_y(self, warp, n) -> None:
        """Of a warp: until y is there, if it copies that."""
        is_wanted = (n == 0) & (warp < _Y_WARPS) & (self._blocks > 0)
        pl.when(is_wanted)(lambda: self._await(1, _Y_WARPS * self._programs))

    def _number(self, which: int):
        group = list(GROUPS).index(self.shape.group)
        return (self.layer * len(GROUPS) + group) * SIGNALS + which

    def _signal(self, which: int) -> None:
        """Of a warpgroup: that it has summed (0), or added up."""
        if self.barriers is None:
            signal(self.signals, self._number(which))
        else:
            plgpu.barrier_arrive(self.barriers[which])

    def _await(self, which: int, waiting) -> None:
        """Of a warp: until all have done so. waiting: how many warps do this."""
        if self.barriers is None:
            signalling = _MULTIPLYING * self._programs
            wait_signals(self.signals, self._number(which), signalling)
            leave_signals(self.signals, self._number(which), signalling + waiting)
        else:
            plgpu.barrier_wait(self.barriers[which])
