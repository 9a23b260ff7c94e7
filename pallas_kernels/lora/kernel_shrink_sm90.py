"""Hopper kernel of lora_shrink for long segments: ``y = x A^T`` on gathered weight tiles, with Mosaic GPU.

A persistent grid. A producer warpgroup walks the work items of its program and fills a ring in
shared memory, by bulk copies, with granule chunks and the matching columns of x; a consumer warpgroup multiplies. The
stacked ranks are the M = 64 rows of wgmma and the tokens its N columns, so that a few tokens fill the instruction as
well as many do. Where a rank block has few granules, a stage holds more than one chunk of columns, so that as many
bytes are in flight.

Each split of the input width is summed on its own, always in the same order; lora_expand adds the splits in order.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_RANKS, Geometry
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.mosaic_common import (
    PLAN_ROWS,
    STAGE_CHUNKS,
    STAGE_ROWS,
    STEP_ROWS,
    ChunkSource,
    capacity,
    ceil_div,
    drain,
    for_items,
)
from pallas_kernels.lora.plan import PAGE_START, TOKEN, Plan, group_fields, y_rows
from pallas_kernels.lora.short_items import split_chunks


def shrink(
    x, pages, page_ids, plan: Plan, layer, *, group, geometry: Geometry, config: LoraConfig, chunk, max_rank, interpret
):
    """Partial sums float32 ``[token blocks, splits, y_rows, block_tokens]`` of stacked ranks.

    layer: int32[1]. Rows past a block's true ranks and columns of other tokens than its own are unspecified.
    """
    source = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=chunk, whole=not interpret)
    args = (source.view_of_tokens(x), source.view_of_pool(pages), page_ids, plan.counts, plan.records, layer)
    splits = split_chunks(geometry, group, config, chunk)[2]
    blocks = plan.records.shape[0]
    out = jax.ShapeDtypeStruct((blocks, splits, y_rows(group, max_rank), config.block_tokens), jnp.float32)
    options = dict(group=group, config=config, source=source)
    with jax.named_scope("lora_shrink"):
        if interpret or x.shape[0] < config.block_tokens:
            return _launch(*args, **options, out=out, interpret=interpret)
        rows = {0: capacity(STEP_ROWS, x.shape[0]), 4: capacity(PLAN_ROWS, blocks)}
        largest = jax.ShapeDtypeStruct((rows[4], *out.shape[1:]), out.dtype)
        return any_rows(_launch, args, rows=rows, out=(out,), in_place=False, options=options | dict(out=largest))[0]


def _launch(
    x, pool, page_ids, counts, records, layer, *, group, config: LoraConfig, source: ChunkSource, out, interpret=None
):
    geometry, chunk = source.geometry, source.chunk
    tokens = config.block_tokens
    stages, ctas = config.shrink_stages, config.shrink_ctas
    total, per_split, splits = split_chunks(geometry, group, config, chunk)
    in_tiles = geometry.in_tiles(GROUPS[group][0])
    max_span = out.shape[2] // TILE_RANKS * in_tiles
    packed_limit = next(n for n in (4, 2, 1) if n <= min(config.shrink_packed, total))

    def lora_shrink(x_ref, pool, page_ids, counts, records, layer_ref, y_ref, ring, x_ring, full, empty):
        operand, chunks = source.views(ring)
        x_smem, x_target = source.views(x_ring)
        cta = lax.axis_index("cta")
        wg = lax.axis_index("wg")
        layer = layer_ref[0]
        num_blocks = counts[0]
        ranked_blocks = num_blocks * counts[1 + list(GROUPS).index(group)]
        # An item is a run of splits: long where there is work for all programs even so, because a new item costs time.
        run = jnp.int32(1)
        for longer in (2, 4):
            run = jnp.where(ranked_blocks * static_ceil_div(splits, longer) * 8 >= ctas * 7, longer, run)
        runs = ceil_div(jnp.int32(splits), run)
        local_items = jnp.maximum(ceil_div(ranked_blocks * runs - cta, ctas), 0)

        def describe(n):
            """Work item n of this program: first split, token block, rank block and fields of the block's record.

            Rank blocks are the slowest to change: where an adapter has fewer than the largest, its items are empty.
            """
            item = cta + n * ctas
            rest = lax.div(item, runs)
            rank_block = lax.div(rest, jnp.maximum(num_blocks, 1))
            # A program without items describes one all the same.
            block = jnp.maximum(jnp.minimum(rest - rank_block * num_blocks, num_blocks - 1), 0)
            read = [records[block, layer, i] for i in (TOKEN, PAGE_START, *group_fields(group))]
            return lax.rem(item, runs) * run, block, rank_block, *read

        def same(_, item):
            return item

        def sizes(split, rank_block, total_granules):
            """Granules, chunks of columns that share a stage, and chunks of columns in all (0 if there is no
            granule).
            """
            granules = jnp.clip(total_granules - rank_block * STAGE_CHUNKS, 0, STAGE_CHUNKS)
            packed = jnp.where(granules > 4, 1, jnp.where(granules > 2, min(2, packed_limit), packed_limit))
            length = jnp.minimum(run * per_split, total - split * per_split)
            return jnp.maximum(granules, 1), packed, jnp.where(granules > 0, length, 0)

        @pl.when(wg == 1)
        def producer():
            def item_body(item, _, issued):
                split, _, rank_block, token, page_start, section, total_granules, *known = item
                granules, packed, length = sizes(split, rank_block, total_granules)
                first_tile = section + rank_block * (STAGE_CHUNKS * in_tiles) + split * (per_split * chunk)
                item_pages = source.pages(section, max_span, known, page_start, page_ids)
                num_stages = ceil_div(length, packed)

                def stage_body(st, _):
                    slot = lax.rem(issued + st, jnp.int32(stages))
                    indices, wanted = [], []
                    for s in range(STAGE_CHUNKS):
                        sub = lax.div(jnp.int32(s), granules)
                        column_chunk = st * packed + sub
                        valid = (sub < packed) & (column_chunk < length)
                        tile = first_tile + (s - sub * granules) * in_tiles + column_chunk * chunk
                        tile = jnp.where(valid, tile, first_tile)
                        indices.append(source.locate(tile, item_pages))
                        wanted.append(valid)

                    @pl.when(issued + st >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    here = jnp.minimum(packed, length - st * packed)
                    source.expect(full.at[slot], here * granules, here * (tokens // TILE_RANKS))
                    for s in range(STAGE_CHUNKS):
                        source.copy(pool, indices[s], chunks, slot * STAGE_CHUNKS + s, full.at[slot], wanted[s])
                    for i in range(packed_limit):
                        tile = (split * per_split + st * packed + i) * chunk
                        wanted_x = (i < packed) & (st * packed + i < length)
                        source.copy_tokens(x_ref, token, tile, x_target.at[slot, i], tokens, full.at[slot], wanted_x)
                    return ()

                lax.fori_loop(0, num_stages, stage_body, ())
                return issued + num_stages

            drain(empty, for_items(local_items, describe, same, item_body, jnp.int32(0)), stages)

        @pl.when(wg == 0)
        def consumer():
            def item_body(item, _, seen):
                split, block, rank_block, _, _, _, total_granules, *_ = item
                granules, packed, length = sizes(split, rank_block, total_granules)

                def split_body(part, _):
                    def chunk_body(c, acc):
                        sub = lax.rem(c, packed)
                        slot = lax.rem(seen + lax.div(c, packed), jnp.int32(stages))

                        @pl.when(sub == 0)
                        def _():
                            plgpu.barrier_wait(full.at[slot])

                        row = pl.multiple_of(slot * STAGE_ROWS + sub * granules * TILE_RANKS, TILE_RANKS)
                        plgpu.wgmma(acc, operand.at[pl.ds(row, STAGE_ROWS)], x_smem.at[slot, sub].T)
                        plgpu.wgmma_wait(0)

                        @pl.when((sub == packed - 1) | (c == length - 1))
                        def _():
                            plgpu.barrier_arrive(empty.at[slot])

                    def accumulate(acc):
                        first = part * per_split
                        pl.loop(first, jnp.minimum(first + per_split, length))(lambda c: chunk_body(c, acc))
                        return acc[...]

                    total = pl.run_scoped(accumulate, plgpu.ACC((STAGE_ROWS, tokens), jnp.float32))
                    y_ref[block, split + part, pl.ds(rank_block * STAGE_ROWS, STAGE_ROWS)] = total
                    return ()

                lax.fori_loop(0, ceil_div(length, per_split), split_body, ())
                return seen + ceil_div(length, packed)

            for_items(local_items, describe, same, item_body, jnp.int32(0))

    kernel = plgpu.kernel(
        lora_shrink,
        out_type=out,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="wg",
        scratch_types=dict(
            # A window of 64 rows that begins inside the last stage runs past it: those rows of the product are never
            # used.
            ring=source.ring(stages * STAGE_ROWS + STAGE_ROWS - STAGE_ROWS // packed_limit, x.dtype),
            x_ring=source.tokens((stages, packed_limit), tokens, x.dtype),
            full=plgpu.Barrier(
                num_arrivals=source.arrivals(STAGE_CHUNKS, packed_limit * tokens // TILE_RANKS), num_barriers=stages
            ),
            empty=plgpu.Barrier(num_barriers=stages),
        ),
        # Nothing but bulk copies writes shared memory, so no thread waits for another's stores.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return kernel(x, pool, page_ids, counts, records, layer)
