"""Hopper kernel of lora_shrink before a product with the base weights: y of every token block as wgmma takes it.

A program takes sixteen tokens of a window and sums all ranks and the whole input width, so that nobody waits for a
stranger and no partial sum crosses memory; that A is read by four programs instead of one costs less. The splits of the
input width are summed on their own and added in order, as the other kernels do, so the bits are theirs. Then y is
scaled and written tokens first, zero for tokens of other segments and past a module's own ranks. After the blocks in
use stands one more, of zeros.
"""

import functools
import itertools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.expand_y import total_of
from pallas_kernels.lora.mosaic_common import (
    OPERAND,
    PLAN_ROWS,
    SHARED_BYTES,
    STAGE_CHUNKS,
    STAGE_ROWS,
    STEP_ROWS,
    ChunkSource,
    capacity,
    ceil_div,
    drain,
    having_read,
)
from pallas_kernels.lora.plan import (
    NUM_TOKENS,
    OFFSET,
    PAGE_START,
    TOKEN,
    Plan,
    group_fields,
    module_field,
    y_rows,
)
from pallas_kernels.lora.short_items import split_chunks
from pallas_kernels.lora.short_ring import WARP_CHUNKS, WARPS, full_arrivals
from pallas_kernels.lora.windows import WINDOW

_TOKENS = 16
"""Of an item: as few as leave work for every multiprocessor in a step of 2,048 tokens."""
_OCTETS = _TOKENS // TILE_RANKS
_PARTS = WINDOW // _TOKENS
_STAGES = 5
_CTAS = 132
_WGMMA = plgpu.Layout.WGMMA


def shrink_y(
    x,
    pages,
    page_ids,
    a: Plan,
    b: Plan,
    layer,
    *,
    group: str,
    geometry: Geometry,
    config: LoraConfig,
    chunk: int,
    max_rank: int,
    interpret=None,
):
    """bfloat16 ``[token blocks, 64 tokens, modules x 64 ranks]``, each module's ranks padded to a multiple of 64.

    a, b: plans of the two matrices, cut at windows. page_ids, geometry: of A's. layer: int32[1].
    """
    source = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=chunk, whole=not interpret)
    blocks, columns = len(b.records), len(GROUPS[group]) * static_ceil_div(max_rank, STAGE_ROWS) * STAGE_ROWS
    out = jax.ShapeDtypeStruct((blocks, WINDOW, columns), x.dtype)
    views = source.view_of_tokens(x), source.view_of_pool(pages)
    args = (*views, page_ids, a.counts, a.records, b.records, b.scaling, layer)
    options = dict(group=group, config=config, source=source, sums_rows=y_rows(group, max_rank))
    with jax.named_scope("lora_shrink"):
        if interpret:
            return _launch(*args, **options, out=out, interpret=interpret)
        rows = {0: capacity(STEP_ROWS, x.shape[0])} | dict.fromkeys((4, 5, 6), capacity(PLAN_ROWS, blocks))
        largest = jax.ShapeDtypeStruct((rows[4], *out.shape[1:]), out.dtype)
        return any_rows(_launch, args, rows=rows, out=(out,), in_place=False, options=options | dict(out=largest))[0]


def _launch(
    x,
    pool,
    page_ids,
    counts,
    a_records,
    b_records,
    scaling,
    layer,
    *,
    group,
    config,
    source,
    sums_rows,
    out,
    interpret=None,
):
    modules, dtype = GROUPS[group], out.dtype
    ctas = 2 if interpret else _CTAS
    total, per_split, splits = split_chunks(source.geometry, group, config, source.chunk)
    in_tiles = source.geometry.in_tiles(modules[0])
    rank_tiles = out.shape[2] // (len(modules) * STAGE_ROWS)
    max_span = sums_rows // TILE_RANKS * in_tiles
    fixed_bytes = 4 * sums_rows * _TOKENS + 2 * len(modules) * _TOKENS * STAGE_ROWS
    stage_bytes = 2 * (STAGE_ROWS + _TOKENS) * source.chunk * TILE_COLS
    stages = min(_STAGES, (SHARED_BYTES - fixed_bytes) // stage_bytes)

    def lora_shrink_y(
        x_ref,
        pool,
        page_ids,
        counts,
        a_records,
        b_records,
        scaling,
        layer_ref,
        y_ref,
        ring,
        x_ring,
        sums,
        tiles,
        full,
        empty,
    ):
        operand, chunks = source.views(ring)
        x_smem, x_target = source.views(x_ring)
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        layer, used = layer_ref[0], counts[0]
        # Dealt out without turning back: of a window with two segments the parts of one without tokens of its own are
        # then not always the same programs'.
        num_items = jnp.maximum(ceil_div((used + 1) * _PARTS - cta, ctas), 0)

        def describe(n):
            """Token block, first token of the item in it, and rank blocks to sum: none if all tokens are others'."""
            item = cta + n * ctas
            block = lax.div(item, jnp.int32(_PARTS))
            first = (item - block * _PARTS) * _TOKENS
            offset, num_tokens = (b_records[block, layer, i] for i in (OFFSET, NUM_TOKENS))
            granules = a_records[block, layer, group_fields(group)[1]]
            live = (block < used) & (offset < first + _TOKENS) & (offset + num_tokens > first)
            return block, first, jnp.where(live, granules, 0)

        @pl.when(wg == 1)
        def load():
            # Each warp copies two granules of a stage and, the last two, eight of its tokens: started one after
            # another, the copies of a stage take longer to start than to arrive.
            @plgpu.warp_map
            def _(warp):
                mine = [warp * WARP_CHUNKS + i for i in range(WARP_CHUNKS)]
                octet = lax.rem(warp, jnp.int32(_OCTETS))
                has_tokens = warp >= WARPS - _OCTETS  # which copy nothing else of low ranks

                def tokens_of(slot):
                    if source.whole:
                        return x_target.at[slot, pl.ds(octet, 1)]
                    return x_target.at[slot, pl.ds(pl.multiple_of(octet * TILE_RANKS, TILE_RANKS), TILE_RANKS)]

                def item_body(n, issued):
                    block, first, all_granules = describe(n)
                    read = [a_records[block, layer, i] for i in (TOKEN, PAGE_START, *group_fields(group))]
                    token, page_start, section, _, *known = read
                    all_granules = having_read(read, all_granules)
                    item_pages = source.pages(section, max_span, known, page_start, page_ids)
                    token += first + octet * TILE_RANKS

                    def rank_body(rank_block, issued):
                        granules = all_granules - rank_block * STAGE_CHUNKS
                        wanted = [s < granules for s in mine]
                        start = section + rank_block * (STAGE_CHUNKS * in_tiles)
                        rows = [jnp.where(w, start + s * in_tiles, start) for s, w in zip(mine, wanted, strict=True)]
                        copies = sum(w.astype(jnp.int32) for w in wanted)

                        def stage_body(stage, carry):
                            column = stage * source.chunk
                            slot = lax.rem(issued + stage, jnp.int32(stages))
                            indices = [source.locate(row + column, item_pages) for row in rows]

                            @pl.when(issued + stage >= stages)
                            def _():
                                plgpu.barrier_wait(empty.at[slot])

                            source.expect(full.at[slot], copies, has_tokens.astype(jnp.int32))
                            source.copy_tokens(
                                x_ref, token, column, tokens_of(slot), TILE_RANKS, full.at[slot], has_tokens
                            )
                            for s, index, w in zip(mine, indices, wanted, strict=True):
                                source.copy(pool, index, chunks, slot * STAGE_CHUNKS + s, full.at[slot], w)
                            return carry

                        lax.fori_loop(0, total, stage_body, ())
                        return issued + total

                    return lax.fori_loop(0, ceil_div(all_granules, STAGE_CHUNKS), rank_body, issued)

                drain(empty, lax.fori_loop(0, num_items, item_body, jnp.int32(0)), stages)

        @pl.when(wg == 0)
        def multiply():
            def sum_of(seen, split):
                first, last = split * per_split, min((split + 1) * per_split, total)

                def free(c):
                    plgpu.barrier_arrive(empty.at[lax.rem(seen + c, jnp.int32(stages))])

                def accumulate(acc):
                    @pl.loop(first, last)
                    def _(c):
                        slot = lax.rem(seen + c, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        rows = pl.ds(pl.multiple_of(slot * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)
                        plgpu.wgmma(acc, operand.at[rows], x_smem.at[slot].T)
                        plgpu.wgmma_wait(1)
                        pl.when(c > first)(lambda: free(c - 1))

                    plgpu.wgmma_wait(0)
                    free(last - 1)
                    return acc[...]

                return pl.run_scoped(accumulate, plgpu.ACC((STAGE_ROWS, _TOKENS), jnp.float32))

            def item_body(n, seen):
                block, first, all_granules = describe(n)
                offset, num_tokens = (b_records[block, layer, i] for i in (OFFSET, NUM_TOKENS))
                sections = [[b_records[block, layer, module_field(m) + i] for i in (1, 2)] for m in modules]
                scales = [scaling[block, layer, m] for m in modules]
                all_granules = having_read([offset, num_tokens, *itertools.chain(*sections)], all_granules, scales)

                def rank_body(rank_block, seen):
                    parts = [sum_of(seen, split) for split in range(splits)]
                    sums[pl.ds(rank_block * STAGE_ROWS, STAGE_ROWS)] = functools.reduce(jnp.add, parts)
                    return seen + total

                seen = lax.fori_loop(0, ceil_div(all_granules, STAGE_CHUNKS), rank_body, seen)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()
                tokens = pl.ds(pl.multiple_of(first, _TOKENS), _TOKENS)
                for number, (section, scale) in enumerate(zip(sections, scales, strict=True)):
                    granules, row = (jnp.where(block < used, value, 0) for value in section)

                    @pl.loop(0, jnp.where(block < used, ceil_div(granules, STAGE_CHUNKS), rank_tiles))
                    def write_tile(rank_tile, number=number, granules=granules, row=row, scale=scale):
                        window = pl.ds(row + rank_tile * STAGE_ROWS, STAGE_ROWS)
                        part = plgpu.load(sums.at[window], layout=_WGMMA, optimized=False)
                        y = total_of(granules, rank_tile, scale, [part], dtype)
                        token = plgpu.broadcasted_iota(jnp.int32, y.shape, 1, layout=_WGMMA) + first
                        own = (token >= offset) & (token < offset + num_tokens)
                        y = jnp.where(own, y, jnp.zeros_like(y))
                        if rank_tiles > 1:
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        tile = tiles.at[number]
                        tile.T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                        plgpu.commit_smem()
                        column = pl.multiple_of((number * rank_tiles + rank_tile) * STAGE_ROWS, STAGE_ROWS)
                        plgpu.copy_smem_to_gmem(tile, y_ref.at[block, tokens, pl.ds(column, STAGE_ROWS)])

                return seen

            lax.fori_loop(0, num_items, item_body, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        lora_shrink_y,
        out_type=out,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="wg",
        scratch_types=dict(
            ring=source.ring(stages * STAGE_ROWS, x.dtype),
            x_ring=source.tokens((stages,), _TOKENS, x.dtype),
            sums=plgpu.SMEM((sums_rows, _TOKENS), jnp.float32),
            tiles=plgpu.SMEM((len(modules), _TOKENS, STAGE_ROWS), dtype, transforms=OPERAND),
            full=plgpu.Barrier(num_arrivals=full_arrivals(source, WARPS * source.chunk), num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages),
        ),
        interpret=interpret,
    )
    return kernel(x, pool, page_ids, counts, a_records, b_records, scaling, layer)
