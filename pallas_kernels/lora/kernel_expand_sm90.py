"""Hopper kernel of lora_expand: adds ``scaling * y B`` to the base projections in place, with Mosaic GPU.

The work item is a token block and a range of output tiles of one module. Four roles run side by side in a program: a
warpgroup streams granule chunks into a ring in shared memory, one prepares y of the next item, and two multiply, each
one half of every chunk's outputs. The outputs are the M rows of wgmma, the tokens its N columns, the ranks its K = 64.
Where a module has few granules, a
stage holds chunks of several output ranges: each is multiplied by a copy of y that is zero outside its own rows. All
eight chunks of a stage come from the adapter at hand (the last one is repeated), so that no weight of another adapter,
were it infinite, can reach a result.

Blocks of eight tokens put the copies of y side by side, so that one product gives all output ranges of a stage, and
add it to the base output token by token. Larger blocks take the base output through shared memory by bulk copies. Rows
of other segments are never written.
"""

import math

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.column_scatter import scatter_column
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.mosaic_common import (
    OPERAND,
    SHARED_BYTES,
    STAGE_CHUNKS,
    STAGE_ROWS,
    ChunkSource,
    drain,
    for_items,
)
from pallas_kernels.lora.plan import Plan, max_rank_blocks

_WGMMA = plgpu.Layout.WGMMA
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
    tokens = config.block_tokens
    by_rows = tokens == TILE_RANKS
    ctas = config.expand_ctas
    out_slots = 1 if by_rows else config.out_slots
    splits, max_packed = y.shape[0], config.expand_packed
    consumers = 2 if chunk == 4 else 1
    columns, half = chunk * TILE_COLS, chunk * TILE_COLS // consumers
    source = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=chunk, whole=not interpret)
    rank_tiles = static_ceil_div(static_ceil_div(max_rank, TILE_RANKS), STAGE_CHUNKS)
    # Tiles of y: one for each 64 ranks; in large blocks also one for each chunk that shares a stage.
    y_shape = (rank_tiles, max_packed * tokens) if by_rows else (max(max_packed, rank_tiles), tokens)
    shift_rows = STAGE_ROWS - STAGE_ROWS // max_packed
    shifted_rows = shift_rows + STAGE_ROWS
    fixed_bytes = 2 * (2 * math.prod(y_shape) * STAGE_ROWS + shifted_rows * tokens + out_slots * tokens * columns)
    fixed_bytes += 4 * 2 * max_packed * columns
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
        rows,
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
            counts=counts,
            records=records,
            rank_blocks=max_rank_blocks(group, max_rank),
            layer=layer_ref[0],
        )
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        num_items = items.local(cta)
        zero, true = jnp.int32(0), jnp.bool_(True)

        def describe(n):
            return items.describe(cta, n)

        @pl.when(wg == consumers)
        def producer():
            if not by_rows:
                plgpu.set_max_registers(56, action="decrease")

            def item_body(item: ExpandItem, carry):
                issued, out_issued = carry

                def stage_body(st, out_count):
                    slot = lax.rem(issued + st, jnp.int32(stages))
                    group_index, rank_tile = lax.div(st, item.rank_tiles), lax.rem(st, item.rank_tiles)
                    first = group_index * item.packed
                    indices = [
                        source.locate(items.chunk_tile(item, s, rank_tile, first), item.page_start, page_ids)
                        for s in range(STAGE_CHUNKS)
                    ]

                    @pl.when(issued + st >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    source.expect(full.at[slot], jnp.int32(STAGE_CHUNKS))
                    for s in range(STAGE_CHUNKS):
                        source.copy(pool, indices[s], chunks, slot * STAGE_CHUNKS + s, full.at[slot], true)
                    if by_rows:
                        return out_count

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

            issued, out_issued = for_items(num_items, describe, item_body, (zero, zero))
            drain(empty, issued, stages)
            if not by_rows:
                drain(o_empty, out_issued, out_slots)

        @pl.when(wg == consumers + 1)
        def load_y():
            """Sums the splits in order, scales, and lays y out as wgmma's B operand: a tile for each 64 ranks or
            packed chunk.
            """
            if not by_rows:
                plgpu.set_max_registers(104, action="decrease")
            row_index = plgpu.broadcasted_iota(jnp.int32, (STAGE_ROWS, tokens), 0, layout=_WGMMA)
            shifted[:STAGE_ROWS] = plgpu.layout_cast(jnp.zeros((STAGE_ROWS, tokens), shifted.dtype), _WGMMA)
            plgpu.commit_smem()

            def item_body(item: ExpandItem, prepared):
                scale = scaling[items.layer, item.block, item.module]
                buffer = lax.rem(prepared, 2)

                def tile_body(i, _):
                    rank_tile = jnp.where(item.packed > 1, 0, i)

                    @pl.when((item.packed == 1) | (i == 0))
                    def _():
                        window = pl.ds(item.y_row + rank_tile * STAGE_ROWS, STAGE_ROWS)
                        total = plgpu.load(y_ref.at[0, window], layout=_WGMMA, optimized=False)
                        for s in range(1, splits):
                            total = total + plgpu.load(y_ref.at[s, window], layout=_WGMMA, optimized=False)
                        live = row_index < item.granules * TILE_RANKS - rank_tile * STAGE_ROWS
                        total = jnp.where(live, total * scale, 0.0)
                        shifted[pl.ds(shift_rows, STAGE_ROWS)] = total.astype(shifted.dtype)
                        plgpu.commit_smem()

                    shift = jnp.where(item.packed > 1, i * item.height * TILE_RANKS, 0)
                    tile = plgpu.load(shifted.at[pl.ds(shift_rows - shift, STAGE_ROWS)], layout=_WGMMA)
                    tile = plgpu.layout_cast(tile, _TRANSPOSED)
                    if by_rows:
                        row = pl.multiple_of(jnp.where(item.packed > 1, i * TILE_RANKS, 0), TILE_RANKS)
                        y_smem.at[buffer, rank_tile, pl.ds(row, TILE_RANKS)].T[...] = tile
                    else:
                        y_smem.at[buffer, i].T[...] = tile
                    return ()

                @pl.when(item.length > 0)
                def _():
                    @pl.when(prepared >= 2)
                    def _():
                        plgpu.barrier_wait(y_empty.at[buffer])

                    lax.fori_loop(0, jnp.where(item.packed > 1, item.packed, item.rank_tiles), tile_body, ())
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(y_full.at[buffer])

                return prepared + jnp.where(item.length > 0, 1, 0)

            drain(y_empty, for_items(num_items, describe, item_body, zero), 2)

        @pl.when(wg < consumers)
        def consumer():
            if not by_rows:
                plgpu.set_max_registers(168, action="increase")

            def multiply(acc, seen, item, buffer, group_index, sub, y_tile, last):
                """Adds the product of a group of output chunks (or of its chunk `sub`) with y over all ranks to acc."""

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

            def group_by_rows(item: ExpandItem, seen, buffer, group_index):
                """All output chunks of a stage at once, then token by token."""
                first = group_index * item.packed
                layout = plgpu.Layout.WG_STRIDED((half,), vec_size=1) if half == 128 else _WGMMA.reduce(1)

                def outputs(i, t):
                    tile = item.out_tile + jnp.minimum(first + i, item.length - 1) * chunk
                    return item.token + t, pl.ds(pl.multiple_of(tile * TILE_COLS + wg * half, half), half)

                def load_bases(t):
                    return [
                        plgpu.load(out_ref.at[outputs(i, t)], layout=layout, optimized=False) for i in range(max_packed)
                    ]

                def add_token(t, delta, bases):
                    mine = rows.at[wg, lax.rem(t, 2)]
                    scatter_column(delta, t, mine, interpret=bool(interpret))
                    plgpu.commit_smem()
                    for i in range(max_packed):

                        @pl.when((i < item.packed) & (first + i < item.length))
                        def _(i=i):
                            total = bases[i].astype(jnp.float32) + plgpu.load(
                                mine.at[i], layout=layout, optimized=False
                            )
                            out_ref[outputs(i, t)] = total.astype(out.dtype)

                bases = load_bases(0)
                delta = pl.run_scoped(
                    lambda acc: multiply(acc, seen, item, buffer, group_index, zero, zero, true),
                    plgpu.ACC((half, max_packed * tokens), jnp.float32),
                )
                add_token(zero, delta, bases)

                def more(t, _):
                    add_token(t, delta, load_bases(t))
                    return ()

                lax.fori_loop(1, item.num_tokens, more, ())

                # The next stage's first token may use the buffer that this one's last token used.
                @pl.when(lax.rem(item.num_tokens, 2) == 1)
                def _():
                    plgpu.commit_smem()

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
                    item.num_tokens,
                    out_ref,
                    item.token,
                    item.out_tile + c * chunk,
                    wg * tiles,
                    tiles,
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(o_empty.at[out_slot])

            def item_body(item: ExpandItem, carry):
                seen, out_seen, used = carry

                @pl.when(item.length > 0)
                def _():
                    buffer = lax.rem(used, 2)
                    plgpu.barrier_wait(y_full.at[buffer])

                    def step(i, _):
                        if by_rows:
                            group_by_rows(item, seen, buffer, i)
                        else:
                            chunk_by_tiles(item, seen, out_seen, buffer, i)
                        return ()

                    lax.fori_loop(0, lax.div(item.num_stages, item.rank_tiles) if by_rows else item.length, step, ())
                    plgpu.barrier_arrive(y_empty.at[buffer])

                return seen + item.num_stages, out_seen + item.length, used + jnp.where(item.length > 0, 1, 0)

            for_items(num_items, describe, item_body, (zero, zero, zero))

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
            rows=plgpu.SMEM((consumers, 2, max_packed, half), jnp.float32),
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
    with jax.named_scope("lora_expand"):
        result = jax.new_ref(out if by_rows else source.view_of_tokens(out))
        kernel(result, y, source.view_of_pool(pages), page_ids, plan.counts, plan.records, plan.scaling, layer)
        return jax.freeze(result).reshape(out.shape)
