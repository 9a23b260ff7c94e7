"""Hopper kernel of lora_expand for long segments: adds ``scaling * y B`` to the base projections in place, with Mosaic
GPU.

The work item is a token block and a range of output tiles of one module. Four roles run side by side in a program: a
warpgroup streams granule chunks into a ring in shared memory, one prepares y of the next item, and two multiply, each
one half of every chunk's outputs. The outputs are the M rows of wgmma, the tokens its N columns, the ranks its K = 64.
Where a module has few granules, a stage holds chunks of several output ranges: each is multiplied by a copy of y that
is zero outside its own rows. All eight chunks of a stage come from the adapter at hand (the last one is repeated), so
that no weight of another adapter, were it infinite, can reach a result. The base output goes through shared memory by
bulk copies. Rows of other segments are never written.
"""

import math

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.expand_y import PackedTiles, prepare_y
from pallas_kernels.lora.mosaic_common import (
    OPERAND,
    PLAN_ROWS,
    SHARED_BYTES,
    STAGE_CHUNKS,
    STAGE_ROWS,
    STEP_ROWS,
    ChunkSource,
    capacity,
    drain,
    for_items,
)
from pallas_kernels.lora.plan import Plan

_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def expand(
    out,
    y,
    pages,
    page_ids,
    plan: Plan,
    layer,
    *,
    group,
    geometry: Geometry,
    config: LoraConfig,
    chunk,
    max_rank,
    interpret,
):
    """`out` with the deltas added. y: what the shrink kernel returned for the same plan. layer: int32[1]."""
    source = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=chunk, whole=not interpret)
    target = source.view_of_tokens(out)
    where = (page_ids, plan.counts, plan.records, plan.scaling, layer)
    args = (target, y, source.view_of_pool(pages), *where)
    options = dict(group=group, config=config, source=source, max_rank=max_rank)
    with jax.named_scope("lora_expand"):
        if interpret or out.shape[0] < config.block_tokens:
            return _launch(*args, **options, interpret=interpret).reshape(out.shape)
        blocks = capacity(PLAN_ROWS, plan.records.shape[0])
        rows = {0: capacity(STEP_ROWS, out.shape[0]), 1: blocks, 5: blocks, 6: blocks}
        spec = jax.ShapeDtypeStruct(target.shape, out.dtype)
        return any_rows(_launch, args, rows=rows, out=(spec,), in_place=True, options=options)[0].reshape(out.shape)


def _launch(
    out,
    y,
    pool,
    page_ids,
    counts,
    records,
    scaling,
    layer,
    *,
    group,
    config: LoraConfig,
    source: ChunkSource,
    max_rank,
    interpret=None,
):
    geometry, chunk = source.geometry, source.chunk
    tokens = config.block_tokens
    ctas = config.expand_ctas
    out_slots = config.out_slots
    max_packed = config.expand_packed
    consumers = 2 if chunk == 4 else 1
    columns, half = chunk * TILE_COLS, chunk * TILE_COLS // consumers
    rank_tiles = static_ceil_div(static_ceil_div(max_rank, TILE_RANKS), STAGE_CHUNKS)
    # Tiles of y: one for each 64 ranks, or one for each chunk that shares a stage.
    y_shape = (max(max_packed, rank_tiles), tokens)
    shifted_rows = 2 * STAGE_ROWS - STAGE_ROWS // max_packed
    fixed_bytes = 2 * (2 * math.prod(y_shape) * STAGE_ROWS + shifted_rows * tokens + out_slots * tokens * columns)
    stages = min(config.expand_stages, (SHARED_BYTES - fixed_bytes) // (2 * STAGE_ROWS * columns))

    def lora_expand(
        out_ref,
        y_ref,
        pool,
        page_ids,
        counts,
        records,
        scaling,
        layer_ref,
        *,
        ring,
        y_smem,
        shifted,
        out_ring,
        bars,
    ):
        full, empty, y_full, y_empty, o_full, o_empty = bars
        operand, chunks = source.views(ring)
        out_smem, out_target = source.views(out_ring)
        items = ExpandItems(
            geometry=geometry,
            group=group,
            config=config,
            chunk=chunk,
            num_blocks=counts[0],
            records=records,
            layer=layer_ref[0],
        )
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        num_items = items.local(cta)
        zero, true = jnp.int32(0), jnp.bool_(True)

        def fetch(n):
            return items.fetch(cta, n)

        def describe(n, fetched):
            return items.describe(cta, n, fetched)

        @pl.when(wg == consumers)
        def producer():
            plgpu.set_max_registers(56, action="decrease")

            def item_body(item: ExpandItem, _, carry):
                issued, out_issued = carry
                span = items.max_span(rank_tiles)
                item_pages = source.pages(item.section, span, item.pages, item.page_start, page_ids)

                def stage_body(st, out_count):
                    slot = lax.rem(issued + st, jnp.int32(stages))
                    group_index, rank_tile = lax.div(st, item.rank_tiles), lax.rem(st, item.rank_tiles)
                    first = group_index * item.packed
                    indices = [
                        source.locate(items.chunk_tile(item, s, rank_tile, first), item_pages)
                        for s in range(STAGE_CHUNKS)
                    ]

                    @pl.when(issued + st >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    source.expect(full.at[slot], jnp.int32(STAGE_CHUNKS))
                    for s in range(STAGE_CHUNKS):
                        source.copy(pool, indices[s], chunks, slot * STAGE_CHUNKS + s, full.at[slot], true)

                    # The base output of a chunk comes with the stage that completes it.
                    num_out = jnp.minimum(item.packed, item.length - first)
                    num_out = jnp.where(rank_tile == item.rank_tiles - 1, num_out, 0)

                    def out_body(i, _):
                        out_slot = lax.rem(out_count + i, jnp.int32(out_slots))

                        @pl.when(out_count + i >= out_slots)
                        def _():
                            plgpu.barrier_wait(o_empty.at[out_slot])

                        tile = item.out_tile + (first + i) * chunk
                        barrier, block = o_full.at[out_slot], out_target.at[out_slot]
                        source.expect(barrier, zero, tokens // TILE_RANKS)
                        source.copy_tokens(out_ref, item.token, tile, block, tokens, barrier, true)
                        return ()

                    lax.fori_loop(0, num_out, out_body, ())
                    return out_count + num_out

                return issued + item.num_stages, lax.fori_loop(0, item.num_stages, stage_body, out_issued)

            issued, out_issued = for_items(num_items, fetch, describe, item_body, (zero, zero))
            drain(empty, issued, stages)
            drain(o_empty, out_issued, out_slots)

        @pl.when(wg == consumers + 1)
        def prepare():
            plgpu.set_max_registers(104, action="decrease")
            prepare_y(
                items,
                num_items,
                fetch,
                describe,
                y_ref,
                scaling,
                PackedTiles.start(y_smem, shifted),
                y_full,
                y_empty,
                ahead=False,
            )

        @pl.when(wg < consumers)
        def consumer():
            plgpu.set_max_registers(168, action="increase")

            def multiply(acc, seen, item, buffer, group_index, sub, y_tile, last):
                """Adds the product of chunk `sub` of a group of output chunks with y over all ranks to acc."""

                def rank_body(k, _):
                    slot = lax.rem(seen + group_index * item.rank_tiles + k, jnp.int32(stages))

                    @pl.when(sub == 0)
                    def _():
                        plgpu.barrier_wait(full.at[slot])

                    window = pl.ds(pl.multiple_of(slot * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)
                    mine = pl.ds(pl.multiple_of(wg * half, half), half)
                    plgpu.wgmma(acc, operand.at[window, mine].T, y_smem.at[buffer, y_tile + k].T)
                    plgpu.wgmma_wait(0)

                    @pl.when(last)
                    def _():
                        plgpu.barrier_arrive(empty.at[slot])

                    return ()

                lax.fori_loop(0, item.rank_tiles, rank_body, ())
                return acc[...]

            def chunk_by_tiles(item: ExpandItem, seen, out_seen, buffer, c):
                """One output chunk: the base output is in shared memory, and goes back from there."""
                sub = lax.rem(c, item.packed)
                last = (sub == item.packed - 1) | (c == item.length - 1)
                y_tile = jnp.where(item.packed > 1, sub, 0)
                delta = pl.run_scoped(
                    lambda acc: multiply(acc, seen, item, buffer, lax.div(c, item.packed), sub, y_tile, last),
                    plgpu.ACC((half, tokens), jnp.float32),
                )
                delta = plgpu.layout_cast(delta, _TRANSPOSED)
                out_slot = lax.rem(out_seen + c, jnp.int32(out_slots))
                mine = pl.ds(pl.multiple_of(wg * half, half), half)
                plgpu.barrier_wait(o_full.at[out_slot])
                block = out_smem.at[out_slot, :, mine].T
                base = plgpu.load(block, layout=_TRANSPOSED)
                block[...] = (base.astype(jnp.float32) + delta).astype(out.dtype)
                plgpu.commit_smem()
                tiles = chunk // consumers
                source.store_tokens(
                    out_target.at[out_slot],
                    item.offset,
                    item.num_tokens,
                    out_ref,
                    item.token,
                    item.out_tile + c * chunk,
                    wg * tiles,
                    tiles,
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(o_empty.at[out_slot])

            def item_body(item: ExpandItem, _, carry):
                seen, out_seen, used = carry
                buffer = lax.rem(used, 2)
                targeted = item.length > 0
                pl.when(targeted)(lambda: plgpu.barrier_wait(y_full.at[buffer]))

                def chunk_body(c, _):
                    chunk_by_tiles(item, seen, out_seen, buffer, c)
                    return ()

                lax.fori_loop(0, item.length, chunk_body, ())
                pl.when(targeted)(lambda: plgpu.barrier_arrive(y_empty.at[buffer]))
                return seen + item.num_stages, out_seen + item.length, used + jnp.where(targeted, 1, 0)

            for_items(num_items, fetch, describe, item_body, (zero, zero, zero))

    kernel = plgpu.kernel(
        lora_expand,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=consumers + 2,
        thread_name="wg",
        scratch_types=dict(
            ring=source.ring(stages * STAGE_ROWS, out.dtype),
            y_smem=plgpu.SMEM((2, *y_shape, STAGE_ROWS), out.dtype, transforms=OPERAND),
            shifted=plgpu.SMEM((shifted_rows, tokens), out.dtype),
            out_ring=source.tokens((out_slots,), tokens, out.dtype),
            bars=(
                plgpu.Barrier(num_arrivals=source.arrivals(STAGE_CHUNKS), num_barriers=stages),
                plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
                plgpu.Barrier(num_barriers=2),
                plgpu.Barrier(num_arrivals=consumers, num_barriers=2),
                plgpu.Barrier(num_arrivals=source.arrivals(0, tokens // TILE_RANKS), num_barriers=out_slots),
                plgpu.Barrier(num_arrivals=consumers, num_barriers=out_slots),
            ),
        ),
        # commit_smem stands wherever a thread reads what another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    result = jax.new_ref(out)
    kernel(result, y, pool, page_ids, counts, records, scaling, layer)
    return jax.freeze(result)
