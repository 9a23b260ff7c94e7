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

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, Geometry
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import LoraConfig, chunk_tiles
from pallas_kernels.lora.expand_items import ExpandItems
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_ROWS, ChunkSource
from pallas_kernels.lora.plan import Half
from pallas_kernels.lora.product_load import ProductLoad
from pallas_kernels.lora.product_ring import COLUMNS, HALF, ProductRing, weights_type
from pallas_kernels.lora.product_shrink import (
    OPERANDS,
    ProductShrink,
    ShrinkShape,
    shrink_operands,
    shrink_out,
    shrink_rows,
)
from pallas_kernels.lora.product_tiles import CHUNK, HALVES, ProductTiles
from pallas_kernels.lora.stage_ring import STAGES, arrivals
from pallas_kernels.lora.tile_shrinks import TileShrinks
from pallas_kernels.lora.windows import TILE, WINDOW, Tiles

_SLOTS = HALF // TILE_COLS
"""Outputs on their way to memory, of a warpgroup."""
_CTAS = 132


def unsupported(x, w, geometry: Geometry) -> str | None:
    """Why the kernel cannot take what `lora_add` can, or None if it can. w: [layers, in, out]. geometry: of the B's."""
    if x.shape[0] % TILE:
        return f"{x.shape[0]} tokens are not a multiple of {TILE}"
    if w.dtype != x.dtype:
        return f"weights are {w.dtype} and activations {x.dtype}"
    # All widths, not only the group's: else an adapter's sections begin somewhere in a chunk.
    if chunk_tiles(geometry, CHUNK) < CHUNK:
        return f"a page or a projection's width is not a multiple of {CHUNK} tiles ({COLUMNS} columns)"
    return None


def matmul(
    x,
    w,
    pages,
    a: Half,
    b: Half,
    tiles: Tiles,
    shrinks: TileShrinks,
    layer,
    *,
    group: str,
    config: LoraConfig,
    max_rank: int,
    interpret=None,
):
    """``x @ w[layer]`` and the deltas of the plans' segments, bfloat16 [T, out].

    a, b: of the adapters' matrices, cut at windows, as `tiles` and `shrinks` are. layer: int32[1].
    """
    options: dict[str, Any] = dict(num_pages=pages.shape[1], whole=not interpret)
    source = ChunkSource(geometry=b.geometry, chunk=CHUNK, **options)
    a_source = ChunkSource(geometry=a.geometry, chunk=1, **options)
    shape = ShrinkShape(source=a_source, group=group, config=config, max_rank=max_rank)
    num_tokens, blocks = x.shape[0], b.plan.records.shape[0]
    number = jnp.concatenate([layer, jnp.full(1, num_tokens // TILE, jnp.int32)])
    operands = shrink_operands(x, pages, a, b.plan, tiles, shrinks, shape)
    args = (*operands, w, source.view_of_pool(pages), b.page_ids, tiles.stages, tiles.reach, number)
    static: dict[str, Any] = dict(config=config, source=source, shape=shape)

    def out(rows: int, blocks: int) -> tuple:
        return jax.ShapeDtypeStruct((rows, w.shape[2]), x.dtype), *shrink_out(shape, blocks, x.dtype)

    with jax.named_scope("lora_matmul"):
        if interpret:
            return _launch(*args, out=out(num_tokens, blocks), **static, interpret=interpret)[0]
        rows = shrink_rows(num_tokens, operands)
        first = len(operands)
        rows |= dict.fromkeys((first + 3, first + 4), rows[0] // TILE)
        static |= dict(out=out(rows[0], rows[7]))
        return any_rows(_launch, args, rows=rows, out=out(num_tokens, blocks), in_place=False, options=static)[0]


def _launch(*args, out, config, source, shape: ShrinkShape, interpret=None):
    x, geometry, group = args[0], source.geometry, shape.group
    ctas = 2 if interpret else _CTAS
    steps = x.shape[1] // STAGE_ROWS

    def lora_matmul(
        x_ref,
        a_pool,
        a_page_ids,
        entries,
        counts,
        signals,
        first_block,
        records,
        scaling,
        w_ref,
        pool,
        page_ids,
        stages,
        reach,
        number,
        out_ref,
        sums,
        y_ref,
        *,
        a,
        b,
        c,
        full,
        empty,
        barriers=None,
    ):
        ring = ProductRing.of(source, a, b, full, empty)
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
        order = ProductTiles(geometry=geometry, group=group, cta=cta, ctas=ctas, tiles=tiles)
        count = order.count
        read = x_ref, a_pool, a_page_ids, entries, counts, signals, first_block, records, scaling
        shrink = ProductShrink(
            shape=shape,
            ring=ring,
            order=order,
            layer=layer,
            sums=sums,
            y=y_ref,
            barriers=barriers,
            **dict(zip(OPERANDS, read, strict=True)),
        )

        @pl.when(wg == 2)
        def load():
            plgpu.set_max_registers(56, action="decrease")
            refs = dict(w=w_ref, pool=pool, page_ids=page_ids, first_block=first_block, stages=stages)

            @plgpu.warp_map
            def _(warp):
                ProductLoad(ring=ring, items=items, order=order, shrink=shrink, warp=warp, **refs).run()

        @pl.when(wg < 2)
        def multiply():
            plgpu.set_max_registers(224, action="increase")
            mine = pl.ds(pl.multiple_of(wg * WINDOW, WINDOW), WINDOW)

            def base_product(n, seen, weights, width):
                """Sum over a tile's stages of base weights, of some of its outputs: what `weights` gives of a slot."""

                def accumulate(acc):
                    def stages(seen, first, last):
                        @pl.loop(first, last)
                        def _(k):
                            slot = lax.rem(seen + k, jnp.int32(STAGES))
                            plgpu.barrier_wait(full.at[slot])
                            plgpu.wgmma(acc, ring.rows.at[slot, mine], weights(slot))
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(empty.at[slot])

                    shrink.for_base_stages(wg, n, seen, steps, stages)
                    return acc[...]

                return pl.run_scoped(accumulate, plgpu.ACC((WINDOW, width), jnp.float32)).astype(x.dtype)

            def product(seen, length, weights, reach, first=True, last=True):
                """Sum over the ring's next `length` stages of deltas, of half of a tile's outputs. first, last: of the
                times that they are gone through. reach: bits of the stages that are not zero here.
                """

                def accumulate(acc):
                    @pl.loop(0, length)
                    def _(k):
                        slot = lax.rem(seen + k, jnp.int32(STAGES))
                        pl.when(first)(lambda: plgpu.barrier_wait(full.at[slot]))

                        def multiply_stage():
                            plgpu.wgmma(acc, ring.rows.at[slot, mine], weights(slot))
                            plgpu.wgmma_wait(0)

                        wanted = lax.shift_right_logical(reach, jnp.minimum(k, 31)) & 1
                        pl.loop(0, wanted)(lambda _: multiply_stage())  # a condition has no accumulator
                        pl.when(last)(lambda: plgpu.barrier_arrive(empty.at[slot]))

                    return acc[...]

                return pl.run_scoped(accumulate, plgpu.ACC((WINDOW, HALF), jnp.float32))

            def write(slot, part, delta, rows, first):
                """Adds the deltas of the outputs from `first` on to `part` and writes them from a slot of `c`."""
                part = part.astype(jnp.float32) + delta
                c[wg, slot] = part.astype(x.dtype)
                plgpu.commit_smem()
                outputs = pl.ds(pl.multiple_of(first, TILE_COLS), TILE_COLS)
                plgpu.copy_smem_to_gmem(c.at[wg, slot], out_ref.at[rows, outputs])

            def whole_tile(n, seen, length, reached, rows, column):
                base = base_product(n, seen, ring.weights, COLUMNS)
                seen += base_stages(n)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i in range(_SLOTS):
                    c[wg, i] = base[:, i * TILE_COLS : (i + 1) * TILE_COLS]
                again = length > STAGES  # the stages come a second time
                for half in range(HALVES):
                    leave = again | (half == HALVES - 1)
                    delta = product(seen, length, ring.columns(half), reached, again | (half == 0), leave)
                    seen += jnp.where(leave, length, 0)
                    for slot in range(_SLOTS):
                        first = slot * TILE_COLS
                        if half == 0:
                            part = plgpu.load(c.at[wg, slot], layout=plgpu.Layout.WGMMA)
                        else:
                            part = base[:, half * HALF + first : half * HALF + first + TILE_COLS]
                            plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
                        place = column * COLUMNS + half * HALF + first
                        write(slot, part, delta[:, first : first + TILE_COLS], rows, place)

            def half_tile(n, seen, length, reached, rows, column, half):
                base = base_product(n, seen, ring.half_weights, HALF)
                delta = product(seen + base_stages(n), length, ring.columns(half), reached)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for slot in range(_SLOTS):
                    part = slice(slot * TILE_COLS, (slot + 1) * TILE_COLS)
                    place = column * COLUMNS + half * HALF + slot * TILE_COLS
                    write(slot, base[:, part], delta[:, part], rows, place)

            def base_stages(n):
                return steps + shrink.sum_stages(n)

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
                pl.when(whole)(lambda: whole_tile(n, seen, length, reached, rows, column))
                pl.when(~whole)(lambda: half_tile(n, seen, length, reached, rows, column, half))
                twice = whole & (length > STAGES)
                return seen + base_stages(n) + jnp.where(twice, HALVES, 1) * length, *following

            @pl.when(count > 0)
            def _():
                seen = shrink.multiply(wg, jnp.int32(0))
                lax.fori_loop(0, count, tile_body, (seen, *of_tile(jnp.int32(0))))
                plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        lora_matmul,
        out_type=out,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            a=plgpu.SMEM((STAGES, TILE, STAGE_ROWS), x.dtype, transforms=OPERAND),
            b=weights_type(source, x.dtype),
            c=plgpu.SMEM((2, _SLOTS, WINDOW, TILE_COLS), x.dtype, transforms=OPERAND),
            full=plgpu.Barrier(num_arrivals=arrivals(source), num_barriers=STAGES),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            **(dict(barriers=(plgpu.Barrier(num_arrivals=2),) * 2) if interpret else {}),
        ),
        interpret=interpret,
    )(*args)
