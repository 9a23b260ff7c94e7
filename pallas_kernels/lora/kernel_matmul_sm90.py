"""Hopper kernel of a base projection with the deltas of long segments: ``x W`` rounded to bfloat16, then ``+ y B``.

The deltas never cross memory: after its last columns of x, a tile of 128 tokens and 256 outputs goes on with the
segments that reach into it, each like 64 more columns: y of their tokens, zero for all others, and their adapter's B.
Two warpgroups multiply, 64 tokens each, a third fills the ring in shared memory. The base's sum is rounded before the
deltas are added and the result once more, as if lora_expand had followed: the bits do not show which of the two it was.
A thread's registers hold no more than the deltas of half of its outputs, so the segments are gone through twice. Where
all their stages fit into the ring, which is the rule, they stay there for the second time. Where the last round has
tiles for half of the programs at most, each is cut in two.

A persistent grid after jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.bulk_copy import start_copy
from pallas_kernels.lora.config import LoraConfig, chunk_tiles
from pallas_kernels.lora.expand_items import ExpandItem, ExpandItems
from pallas_kernels.lora.mosaic_common import (
    OPERAND,
    PLAN_ROWS,
    STAGE_CHUNKS,
    STAGE_ROWS,
    STEP_ROWS,
    SWIZZLED,
    ChunkSource,
    capacity,
    drain,
)
from pallas_kernels.lora.plan import PAGE_START, TOKEN, Half
from pallas_kernels.lora.product_tiles import CHUNK, HALVES, ProductTiles
from pallas_kernels.lora.windows import TILE, WINDOW, Tiles, is_second

_COLUMNS = CHUNK * TILE_COLS
_STAGES = 4
_SLOTS = 2
_PASSES = 2
"""A thread's registers hold its base outputs, half of them in shared memory, and the deltas of half of them."""
_HALF = _COLUMNS // _PASSES
_CTAS = 132


def unsupported(x, w, geometry: Geometry) -> str | None:
    """Why the kernel cannot take what `lora_add` can, or None if it can. w: [layers, in, out]. geometry: of the B's."""
    if x.shape[0] % TILE:
        return f"{x.shape[0]} tokens are not a multiple of {TILE}"
    if w.dtype != x.dtype:
        return f"weights are {w.dtype} and activations {x.dtype}"
    # All widths, not only the group's: else an adapter's sections begin somewhere in a chunk.
    if chunk_tiles(geometry, CHUNK) < CHUNK:
        return f"a page or a projection's width is not a multiple of {CHUNK} tiles ({_COLUMNS} columns)"
    return None


def matmul(x, w, y, pages, half: Half, tiles: Tiles, layer, *, group: str, config: LoraConfig, interpret=None):
    """``x @ w[layer]`` and the deltas of the plan's segments, bfloat16 [T, out].

    y: of `shrink_y`. half: of the adapters' B, cut at windows, as `tiles` is. layer: int32[1].
    """
    source = ChunkSource(geometry=half.geometry, num_pages=pages.shape[1], chunk=CHUNK, whole=not interpret)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    number = jnp.concatenate([layer, jnp.full(1, x.shape[0] // TILE, jnp.int32)])
    plan = half.plan
    args = (x, w, y, source.view_of_pool(pages), half.page_ids, plan.records)
    args += (tiles.first_block, tiles.stages, tiles.reach, number)
    with jax.named_scope("lora_matmul"):
        if interpret:
            return _launch(*args, out=out, group=group, config=config, source=source, interpret=interpret)
        most, blocks = capacity(STEP_ROWS, x.shape[0]), capacity(PLAN_ROWS, plan.records.shape[0])
        rows = {0: most, 2: blocks, 5: blocks, 6: most // TILE + 1, 7: most // TILE, 8: most // TILE}
        largest = jax.ShapeDtypeStruct((most, out.shape[1]), out.dtype)
        options = dict(out=largest, group=group, config=config, source=source)
        return any_rows(_launch, args, rows=rows, out=(out,), in_place=False, options=options)[0]


def _launch(
    x,
    w,
    y,
    pool,
    page_ids,
    records,
    first_block,
    stages,
    reach,
    number,
    *,
    out,
    group,
    config,
    source,
    interpret=None,
):
    geometry, modules = source.geometry, GROUPS[group]
    ctas = 2 if interpret else _CTAS
    steps = x.shape[1] // STAGE_ROWS
    most_ranks = y.shape[2] // (len(modules) * STAGE_ROWS)
    # Interpreted copies arrive one by one, and a stage of weights makes up for those that it does not have.
    more = 0 if source.whole else STAGE_CHUNKS * CHUNK - 1

    def lora_matmul(
        x_ref,
        w_ref,
        y_ref,
        pool,
        page_ids,
        records,
        first_block,
        stages,
        reach,
        number,
        out_ref,
        *,
        a,
        b,
        c,
        full,
        empty,
    ):
        operand, chunks, halves = b if source.whole else (b, b, b)
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        layer, tiles = number[0], number[1]
        items = ExpandItems(
            geometry=geometry,
            group=group,
            config=config,
            chunk=CHUNK,
            num_blocks=jnp.int32(0),
            records=records,
            layer=layer,
        )
        zero, true = jnp.int32(0), jnp.bool_(True)
        order = ProductTiles(geometry=geometry, group=group, cta=cta, ctas=ctas, tiles=tiles)
        count = order.count

        def copy(source_ref, target, barrier, predicate=true):
            if source.whole:
                start_copy(source_ref, target, barrier, predicate)
            else:
                source.copy_if(predicate, source_ref, target, barrier)

        def rows_of(slot):
            return pl.ds(pl.multiple_of(slot * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)

        def half_of(slot):
            """Where a slot has half of a tile's base weights."""
            if not source.whole:
                return halves.at[rows_of(slot), pl.ds(0, _HALF)]
            return halves.at[pl.ds(pl.multiple_of(slot * HALVES * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)]

        @pl.when(wg == 2)
        def load():
            plgpu.set_max_registers(56, action="decrease")

            def claim(issued, chunks=STAGE_CHUNKS):
                slot = lax.rem(issued, jnp.int32(_STAGES))

                @pl.when(issued >= _STAGES)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                if source.whole:
                    # of x, or of y, as many bytes as so many groups of eight tokens
                    source.expect(full.at[slot], jnp.int32(chunks), TILE * STAGE_ROWS // (TILE_RANKS * _COLUMNS))
                return slot

            def base(tile, column, half, issued):
                whole = half == HALVES

                @pl.loop(0, steps)
                def _(k):
                    slot = claim(issued + k, jnp.where(whole, STAGE_CHUNKS, STAGE_CHUNKS // HALVES))
                    depth = pl.ds(pl.multiple_of(k * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)
                    tokens = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
                    outputs = pl.ds(pl.multiple_of(column * _COLUMNS, _COLUMNS), _COLUMNS)
                    copy(x_ref.at[tokens, depth], a.at[slot], full.at[slot])
                    copy(w_ref.at[layer, depth, outputs], operand.at[rows_of(slot)], full.at[slot], whole)
                    first = column * _COLUMNS + jnp.where(whole, 0, half) * _HALF
                    outputs = pl.ds(pl.multiple_of(first, _HALF), _HALF)
                    copy(w_ref.at[layer, depth, outputs], half_of(slot), full.at[slot], ~whole)
                    for _ in range(more):
                        plgpu.barrier_arrive(full.at[slot])

            def pair(item: ExpandItem, place_in_group, first, second, issued):
                pages = source.pages(item.section, items.max_span(most_ranks), item.pages, item.page_start, page_ids)

                @pl.loop(0, item.rank_tiles)
                def _(k):
                    slot = claim(issued + k)
                    ranks = (place_in_group * most_ranks + k) * STAGE_ROWS
                    ranks = pl.ds(pl.multiple_of(ranks, STAGE_ROWS), STAGE_ROWS)
                    for i, which in enumerate((first, second)):
                        copy(y_ref.at[which, :, ranks], a.at[slot, pl.ds(i * WINDOW, WINDOW)], full.at[slot])
                    for s in range(STAGE_CHUNKS):
                        index = source.locate(items.chunk_tile(item, s, k, 0), pages)
                        source.copy(pool, index, chunks, slot * STAGE_CHUNKS + s, full.at[slot], true)

            def tile_body(n, issued):
                tile, column, half = order.place(n)
                module, place_in_group, width, first_tile = order.module_of(column)
                begin, end, length = first_block[tile], first_block[tile + 1], stages[tile, layer, module]
                base(tile, column, half, issued)

                def block_body(block, issued):
                    here, before, after = (
                        [records[i, layer, field] for field in (TOKEN, PAGE_START)]
                        for i in (block, jnp.maximum(block - 1, begin), jnp.minimum(block + 1, end - 1))
                    )
                    chunk = column - lax.div(first_tile, CHUNK)
                    fetched = items.fetch_of(block, module)
                    item = items.item(block, module, width, first_tile, chunk, 1, fetched)
                    count = jnp.where((item.granules > 0) & ~is_second(before, here), item.rank_tiles, 0)

                    @pl.when(count > 0)
                    def _():
                        odd = lax.rem(lax.div(here[0], jnp.int32(WINDOW)), jnp.int32(2)) == 1
                        other = jnp.where(is_second(here, after), block + 1, zeros)
                        first, second = jnp.where(odd, zeros, block), jnp.where(odd, block, other)
                        pair(item, place_in_group, first, second, issued)

                    return issued + count

                once = lambda _, issued: lax.fori_loop(begin, end, block_body, issued)  # noqa: E731
                times = jnp.where((length <= _STAGES) | (half < HALVES), 1, _PASSES)
                return lax.fori_loop(0, times, once, issued + steps)

            zeros = first_block[tiles]
            drain(empty, lax.fori_loop(0, count, tile_body, zero), _STAGES)

        @pl.when(wg < 2)
        def multiply():
            plgpu.set_max_registers(224, action="increase")
            mine = pl.ds(pl.multiple_of(wg * WINDOW, WINDOW), WINDOW)

            def product(seen, length, weights, width=_HALF, first=True, last=True, reach=None):
                """Sum over the ring's next `length` stages, of some of a tile's outputs: what `weights` gives of a
                slot. first, last: of the times that they are gone through. reach: bits of the stages that are not zero
                here.
                """

                def accumulate(acc):
                    @pl.loop(0, length)
                    def _(k):
                        slot = lax.rem(seen + k, jnp.int32(_STAGES))
                        pl.when(first)(lambda: plgpu.barrier_wait(full.at[slot]))

                        def multiply_stage():
                            plgpu.wgmma(acc, a.at[slot, mine], weights(slot))
                            plgpu.wgmma_wait(0)

                        if reach is None:
                            multiply_stage()
                        else:  # a loop, because a condition has no accumulator
                            wanted = lax.shift_right_logical(reach, jnp.minimum(k, 31)) & 1
                            pl.loop(0, wanted)(lambda _: multiply_stage())
                        pl.when(last)(lambda: plgpu.barrier_arrive(empty.at[slot]))

                    return acc[...]

                return pl.run_scoped(accumulate, plgpu.ACC((WINDOW, width), jnp.float32))

            def columns_of(half):
                first = half * _HALF
                columns = pl.ds(first if isinstance(half, int) else pl.multiple_of(first, _HALF), _HALF)
                return lambda slot: operand.at[rows_of(slot), columns]

            def write(slot, part, delta, rows, first):
                """Adds the deltas of the outputs from `first` on to `part` and writes them from a slot of `c`."""
                part = part.astype(jnp.float32) + delta
                c[wg, slot] = part.astype(out.dtype)
                plgpu.commit_smem()
                outputs = pl.ds(pl.multiple_of(first, TILE_COLS), TILE_COLS)
                plgpu.copy_smem_to_gmem(c.at[wg, slot], out_ref.at[rows, outputs])

            def whole_tile(seen, length, reached, rows, column):
                base = product(seen, steps, lambda slot: operand.at[rows_of(slot)], _COLUMNS).astype(out.dtype)
                seen += steps
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i in range(_SLOTS):
                    c[wg, i] = base[:, i * TILE_COLS : (i + 1) * TILE_COLS]
                again = length > _STAGES  # the stages come a second time
                for half in range(_PASSES):
                    leave = again | (half == _PASSES - 1)
                    delta = product(seen, length, columns_of(half), _HALF, again | (half == 0), leave, reached)
                    seen += jnp.where(leave, length, 0)
                    for slot in range(_SLOTS):
                        first = slot * TILE_COLS
                        if half == 0:
                            part = plgpu.load(c.at[wg, slot], layout=plgpu.Layout.WGMMA)
                        else:
                            part = base[:, half * _HALF + first : half * _HALF + first + TILE_COLS]
                            plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
                        place = column * _COLUMNS + half * _HALF + first
                        write(slot, part, delta[:, first : first + TILE_COLS], rows, place)

            def half_tile(seen, length, reached, rows, column, half):
                base = product(seen, steps, half_of).astype(out.dtype)
                delta = product(seen + steps, length, columns_of(half), reach=reached)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for slot in range(_SLOTS):
                    part = slice(slot * TILE_COLS, (slot + 1) * TILE_COLS)
                    place = column * _COLUMNS + half * _HALF + slot * TILE_COLS
                    write(slot, base[:, part], delta[:, part], rows, place)

            def of_tile(n):
                """How many stages of deltas a tile has, and which of them reach into the warpgroup's window."""
                tile, column, _ = order.place(n)
                where = tile, layer, order.module_of(column)[0]
                return stages[where], reach[*where, wg]

            def tile_body(n, carry):
                seen, length, reached = carry
                tile, column, half = order.place(n)
                # loaded now, needed when the next tile's base is summed
                following = of_tile(jnp.minimum(n + 1, count - 1))
                rows = pl.ds(pl.multiple_of(tile * TILE + wg * WINDOW, WINDOW), WINDOW)
                whole = half == HALVES
                pl.when(whole)(lambda: whole_tile(seen, length, reached, rows, column))
                pl.when(~whole)(lambda: half_tile(seen, length, reached, rows, column, half))
                twice = whole & (length > _STAGES)
                return seen + steps + jnp.where(twice, _PASSES, 1) * length, *following

            @pl.when(count > 0)
            def _():
                lax.fori_loop(0, count, tile_body, (zero, *of_tile(zero)))
                plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        lora_matmul,
        out_type=out,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            a=plgpu.SMEM((_STAGES, TILE, STAGE_ROWS), x.dtype, transforms=OPERAND),
            b=_ring(source, x.dtype),
            c=plgpu.SMEM((2, _SLOTS, WINDOW, TILE_COLS), out.dtype, transforms=OPERAND),
            full=plgpu.Barrier(num_arrivals=1 if source.whole else 3 + more, num_barriers=_STAGES),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        ),
        interpret=interpret,
    )(x, w, y, pool, page_ids, records, first_block, stages, reach, number)


def _ring(source: ChunkSource, dtype):
    """Scratch type: base weights or B of a tile as wgmma reads them, chunks of B as they are copied, and base weights
    of half a tile, over the same bytes.
    """
    operand = plgpu.SMEM((_STAGES * STAGE_ROWS, _COLUMNS), dtype, transforms=OPERAND)
    if not source.whole:
        return operand
    return plgpu.RefUnion(
        operand,
        plgpu.SMEM((_STAGES * STAGE_CHUNKS, CHUNK, TILE_RANKS, TILE_COLS), dtype, transforms=SWIZZLED),
        plgpu.SMEM((HALVES * _STAGES * STAGE_ROWS, _HALF), dtype, transforms=OPERAND),
    )
