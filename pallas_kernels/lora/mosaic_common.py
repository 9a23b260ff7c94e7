"""What the two Hopper LoRA kernels share: the weight ring in shared memory and copies of granule chunks into it.

A *chunk* is a run of `chunk` tiles of one granule, contiguous in a page: the unit of a bulk copy. A *stage* holds
eight chunks. Seen as ``[8 chunks, chunk tiles, 8, 64]`` it is what the copies write; seen as ``[64, chunk * 64]``,
tiled (8, 64) with the 128-byte swizzle, it is an operand of wgmma. Both views describe the same bytes: a tile is one
core matrix.
"""

import dataclasses
import functools

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import expect, start_copy
from pallas_kernels.geometry import TILE_COLS, TILE_RANKS, Geometry

STAGE_CHUNKS = 8
STAGE_ROWS = STAGE_CHUNKS * TILE_RANKS
SHARED_BYTES = 224 * 1024
STEP_ROWS = 8192
"""Tokens of the steps that share their kernels; larger ones share by powers of two."""
PLAN_ROWS = 2048
"""Token blocks of the plans that do."""
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
SWIZZLED = (plgpu.SwizzleTransform(128),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkSource:
    """Where chunks of adapter images lie in the pool.

    whole: copy a chunk with one bulk copy through the ring's second view. Otherwise (interpret mode, which cannot alias
    two views) tile by tile. read_once: see start_copy; of kernels in which most adapters' chunks are read once.
    """

    geometry: Geometry
    num_pages: int
    chunk: int
    whole: bool
    read_once: bool = False

    def ring(self, rows: int, dtype):
        """Scratch type of a ring with `rows` rows of chunks."""
        return self.operand((rows,), self.chunk * TILE_COLS, (rows // TILE_RANKS,), dtype)

    def tokens(self, leading: tuple[int, ...], num_tokens: int, dtype):
        """Scratch type of blocks [num_tokens, chunk * 64] of activations."""
        return self.operand((*leading, num_tokens), self.chunk * TILE_COLS, (*leading, num_tokens // TILE_RANKS), dtype)

    def operand(self, rows: tuple[int, ...], columns: int, chunks: tuple[int, ...], dtype):
        operand = plgpu.SMEM((*rows, columns), dtype, transforms=OPERAND)
        if not self.whole:
            return operand
        return plgpu.RefUnion(
            operand, plgpu.SMEM((*chunks, self.chunk, TILE_RANKS, TILE_COLS), dtype, transforms=SWIZZLED)
        )

    def views(self, ring):
        """The operand view and the view for copies."""
        return ring if self.whole else (ring, ring)

    def arrivals(self, chunks: int, token_groups: int = 0) -> int:
        """Arrivals of a barrier that waits for `chunks` chunks and `token_groups` blocks of eight tokens."""
        return 1 if self.whole else (chunks + token_groups) * self.chunk

    def expect(self, barrier, chunks, token_groups=0):
        """Announces copies to a barrier (in interpret mode every copy announces itself)."""
        if self.whole:
            expect(barrier, (chunks + token_groups) * (self.chunk * TILE_RANKS * TILE_COLS * 2))

    def view_of_pool(self, pages):
        """The pool as an array of chunks (or of tiles): a free reshape."""
        shape = (self.chunk, TILE_RANKS, TILE_COLS) if self.whole else (TILE_RANKS, TILE_COLS)
        return pages.reshape(-1, *shape)

    def pages(self, section, span: int, known, page_start, page_ids):
        """Page ids of a section that begins at tile `section` of an adapter's image and is up to `span` tiles long, for
        `locate`.

        known: ids of its first page and the next, from the record. Most sections lie in these, and then no copy waits
        for an id.
        """
        if span > self.geometry.tiles_per_page_id:
            return lambda number: page_ids[page_start + number]
        first = lax.div(section, jnp.int32(self.geometry.tiles_per_page_id))
        return lambda number: jnp.where(number == first, *known)

    def locate(self, tile, pages):
        """Index in the view of the pool of the chunk that begins at `tile` of an adapter's image."""
        g = self.geometry
        unit = lax.div(tile, jnp.int32(g.page_tiles))
        page = pages(lax.div(unit, jnp.int32(g.num_layers)))
        row = lax.rem(unit, jnp.int32(g.num_layers)) * self.num_pages + page
        step = self.chunk if self.whole else 1
        return row * (g.page_tiles // step) + lax.div(lax.rem(tile, jnp.int32(g.page_tiles)), jnp.int32(step))

    def copy(self, pool, index, ring_view, chunk_row, barrier, predicate):
        """Starts copying the chunk at `index` of the pool to row `chunk_row` (in chunks) of the ring."""
        if self.whole:
            start_copy(pool.at[index], ring_view.at[chunk_row], barrier, predicate, read_once=self.read_once)
            return
        for j in range(self.chunk):
            rows = pl.ds(pl.multiple_of(chunk_row * TILE_RANKS, TILE_RANKS), TILE_RANKS)
            self.copy_if(predicate, pool.at[index + j], ring_view.at[rows, pl.ds(j * TILE_COLS, TILE_COLS)], barrier)

    def view_of_tokens(self, x):
        """Activations [T, c] as ``[T, c / 64, 64]``: a free reshape."""
        return x.reshape(x.shape[0], -1, TILE_COLS)

    def copy_tokens(self, x, token, tile, block, num_tokens: int, barrier, predicate):
        """Starts copying `num_tokens` tokens from `token` (at any offset), one chunk of columns from tile `tile`, to a
        block.

        One copy for every eight tokens, which are one core matrix a tile.
        """
        for group in range(num_tokens // TILE_RANKS):
            source = x.at[pl.ds(token + group * TILE_RANKS, TILE_RANKS)]
            if self.whole:
                source, target = source.at[:, pl.ds(tile, self.chunk)], block.at[group].transpose((1, 0, 2))
                start_copy(source, target, barrier, predicate)
                continue
            rows = pl.ds(group * TILE_RANKS, TILE_RANKS)
            for j in range(self.chunk):
                target = block.at[rows, pl.ds(j * TILE_COLS, TILE_COLS)]
                self.copy_if(predicate, source.at[:, tile + j], target, barrier)

    def store_tokens(self, block, offset, num_tokens, x, token, tile, first, tiles: int):
        """Starts copying `num_tokens` rows of a block from `offset` on to x, where the block's first row is `token`:
        eight at a time and the rest one by one.

        Of the chunk of columns at tile `tile`, the `tiles` tiles from `first` on.
        """
        end = offset + num_tokens
        first_group = ceil_div(offset, TILE_RANKS)
        last_group = jnp.maximum(lax.div(end, jnp.int32(TILE_RANKS)), first_group)

        def store_group(group, _):
            target = x.at[pl.ds(token + group * TILE_RANKS, TILE_RANKS)]
            if self.whole:
                target = target.at[:, pl.ds(tile + first, tiles)]
                part = block.at[group, pl.ds(first, tiles)]
                plgpu.copy_smem_to_gmem(part.transpose((1, 0, 2)), target, commit_group=False)
            else:
                rows = pl.ds(pl.multiple_of(group * TILE_RANKS, TILE_RANKS), TILE_RANKS)
                for j in range(tiles):
                    plgpu.copy_smem_to_gmem(block.at[rows, tile_columns(first + j)], target.at[:, tile + first + j])
            return ()

        def store_row(row, _):
            group, within = lax.div(row, jnp.int32(TILE_RANKS)), lax.rem(row, jnp.int32(TILE_RANKS))
            for j in range(tiles):
                if self.whole:
                    source = block.at[group, first + j, pl.ds(within, 1)]
                else:
                    source = block.at[pl.ds(row, 1), tile_columns(first + j)]
                target = x.at[pl.ds(token + row, 1), tile + first + j]
                plgpu.copy_smem_to_gmem(source, target, commit_group=not self.whole)
            return ()

        lax.fori_loop(offset, jnp.minimum(first_group * TILE_RANKS, end), store_row, ())
        lax.fori_loop(first_group, last_group, store_group, ())
        lax.fori_loop(last_group * TILE_RANKS, end, store_row, ())
        if self.whole:
            plgpu.commit_smem_to_gmem_group()

    def copy_if(self, predicate, source, target, barrier):
        """A copy as interpret mode takes it: without the predicate, which it does not know."""
        pl.when(predicate)(lambda: plgpu.copy_gmem_to_smem(source, target, barrier))
        pl.when(~predicate)(lambda: plgpu.barrier_arrive(barrier))


def capacity(least: int, rows: int) -> int:
    """Rows that a kernel is lowered for: the same for almost all steps."""
    return max(least, 1 << (rows - 1).bit_length())


def stage_height(granules, packed_limit: int):
    """Granules that a chunk of columns or outputs takes in a stage, where an adapter has so many: 2, 4 or 8."""
    height = jnp.where(granules > 4, 8, jnp.where(granules > 2, 4, 2))
    return jnp.maximum(height, STAGE_CHUNKS // packed_limit)


def stage_chunks(height):
    """Chunks of columns or outputs in a stage: eight by the height. A division by a scalar takes a hundred cycles."""
    return jnp.where(height == 8, 1, jnp.where(height == 4, 2, 4))


def over_chunks(count, packed):
    """`count` over the chunks in a stage, rounded up."""
    return jnp.where(packed == 4, (count + 3) >> 2, jnp.where(packed == 2, (count + 1) >> 1, count))


def tile_columns(tile):
    return pl.ds(pl.multiple_of(tile * TILE_COLS, TILE_COLS), TILE_COLS)


def ceil_div(a, b):
    """Of non-negative int32 scalars in a kernel."""
    return lax.div(a + b - 1, jnp.int32(b) if isinstance(b, int) else b)


def dealt(total, cta, ctas: int):
    """How many of `total` items program `cta` has, if they are dealt out in rounds, every other one backwards."""
    rounds = lax.div(total, jnp.int32(ctas))
    return rounds + jnp.where(dealt_item(cta, rounds, ctas) < total, 1, 0)


def dealt_item(cta, n, ctas: int):
    """Item n of program `cta`. Where items become smaller towards the end, no program has all the large ones."""
    return n * ctas + jnp.where(lax.rem(n, jnp.int32(2)) == 1, ctas - 1 - cta, cta)


def having_read(fields: list, value, scales=()):
    """`value`, known when `fields` of records (int32 scalars) and `scales` (float32) have been read.

    The compiler starts a read where its result is used. Behind a branch that waits for another field, or for what is
    done with one, that is a whole latency of memory later.
    """
    # None is that small, which the compiler does not know.
    known = functools.reduce(jnp.minimum, fields) == jnp.iinfo(jnp.int32).min
    for scale in scales:
        known |= scale == jnp.finfo(jnp.float32).min
    return value + jnp.where(known, 1, 0)


def drain(barriers, uses, slots: int):
    """Waits until the last `uses` rounds of a ring of `slots` barriers have completed, as far as they are still
    unobserved.
    """

    def wait(i, _):
        plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(slots))])
        return ()

    lax.fori_loop(jnp.maximum(uses - slots, 0), uses, wait, ())


def for_items(count, fetch, describe, body, init):
    """Folds ``body(item, following, carry) -> carry`` over n < count, where item n is ``describe(n, fetch(n))``.

    `fetch` loads from memory and computes nothing from it: it is called one item ahead, and who computes waits.
    following: returns the next item; after the last one that itself.
    """

    def step(n, state):
        fetched, carry = state
        ahead = jnp.minimum(n + 1, count - 1)
        next_fetched = fetch(ahead)
        return next_fetched, body(describe(n, fetched), lambda: describe(ahead, next_fetched), carry)

    return lax.fori_loop(0, count, step, (fetch(jnp.int32(0)), init))[1]
