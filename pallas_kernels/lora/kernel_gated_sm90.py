"""Hopper kernel of gate and up with the deltas of long segments, and of what follows: ``silu(gate) * up``.

As kernel_matmul_sm90, but a tile has 128 outputs of gate and the 128 of up beside them, so that both of an element's
inputs are in the registers of one thread, and neither crosses memory. Gate is summed, then up: an adapter's B of either
is half as wide, and used once. Where short segments add to gate or up later on, the kernel also writes these two, for
64 tokens at a time (`windows`); silu_mul is then done again there.

Each of gate and up is rounded before it goes on, as if silu_mul had followed: the bits do not show which of the two it
was. Where the last round has tiles for half of the programs at most, each is cut in two along its tokens.
"""

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, Geometry
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.expand_items import ExpandItems
from pallas_kernels.lora.gated_load import GatedLoad
from pallas_kernels.lora.gated_ring import CHUNK, COLUMNS, MATRICES, GatedRing, weights_type
from pallas_kernels.lora.mosaic_common import OPERAND, STAGE_ROWS, ChunkSource
from pallas_kernels.lora.plan import Half
from pallas_kernels.lora.product_shrink import (
    OPERANDS,
    ProductShrink,
    ShrinkShape,
    shrink_operands,
    shrink_out,
    shrink_rows,
)
from pallas_kernels.lora.product_tiles import HALVES, ProductTiles
from pallas_kernels.lora.stage_ring import STAGES, arrivals
from pallas_kernels.lora.tile_shrinks import TileShrinks
from pallas_kernels.lora.windows import TILE, WINDOW, Tiles
from pallas_kernels.vectors_sm90 import unsupported_row

GROUP = "gu"
_SLOTS = COLUMNS // TILE_COLS
"""Outputs of a warpgroup on their way to memory, and gate on its way to up."""
_CTAS = 132


def unsupported(geometry: Geometry) -> str | None:
    """Why the kernel cannot take what kernel_matmul_sm90 can, or None if it can. geometry: of the B's."""
    gate, up = (geometry.out_sizes[m] for m in GROUPS[GROUP])
    if gate != up or gate % COLUMNS:
        return f"gate and up have {gate} and {up} columns, not equally many and a multiple of {COLUMNS}"
    return unsupported_row(gate, jnp.bfloat16)


def gated_matmul(
    x,
    w,
    pages,
    a: Half,
    b: Half,
    tiles: Tiles,
    shrinks: TileShrinks,
    windows,
    layer,
    *,
    config: LoraConfig,
    max_rank: int,
    interpret=None,
):
    """``(h, gate_up)``: ``silu(gate) * up`` of ``x @ w[layer]`` and the deltas of the plans' segments, bfloat16 [T, F],
    and gate and up, [T, 2F], written where `windows` is not zero.

    w: [layers, in, 2F]. a, b: of the adapters' matrices, cut at windows, as `tiles` and `shrinks` are. windows: int32
    [T / 64]. layer: int32[1].
    """
    options: dict[str, Any] = dict(num_pages=pages.shape[1], whole=not interpret)
    source = ChunkSource(geometry=b.geometry, chunk=CHUNK, **options)
    a_source = ChunkSource(geometry=a.geometry, chunk=1, **options)
    shape = ShrinkShape(source=a_source, group=GROUP, config=config, max_rank=max_rank)
    num_tokens, columns, blocks = x.shape[0], w.shape[2], b.plan.records.shape[0]
    number = jnp.concatenate([layer, jnp.full(1, num_tokens // TILE, jnp.int32)])
    operands = shrink_operands(x, pages, a, b.plan, tiles, shrinks, shape)
    args = (*operands, w, source.view_of_pool(pages), b.page_ids, tiles.stages, tiles.reach, windows, number)
    static: dict[str, Any] = dict(config=config, source=source, shape=shape)

    def out(rows: int, blocks: int) -> tuple:
        found = (jax.ShapeDtypeStruct((rows, n), x.dtype) for n in (columns // MATRICES, columns))
        return *found, *shrink_out(shape, blocks, x.dtype)

    with jax.named_scope("lora_matmul_silu_mul"):
        if interpret:
            return _launch(*args, out=out(num_tokens, blocks), **static, interpret=interpret)[:2]
        rows = shrink_rows(num_tokens, operands)
        first = len(operands)
        rows |= dict.fromkeys((first + 3, first + 4), rows[0] // TILE) | {first + 5: rows[0] // WINDOW}
        static |= dict(out=out(rows[0], rows[7]))
        return any_rows(_launch, args, rows=rows, out=out(num_tokens, blocks), in_place=False, options=static)[:2]


def _launch(*args, out, config, source, shape: ShrinkShape, interpret=None):
    x, w = args[0], args[len(OPERANDS)]
    geometry, modules, up_column = source.geometry, GROUPS[GROUP], w.shape[2] // MATRICES
    ctas = 2 if interpret else _CTAS
    steps = x.shape[1] // STAGE_ROWS

    def lora_matmul_silu_mul(
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
        windows,
        number,
        h_ref,
        gate_up_ref,
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
        ring = GatedRing.of(source, a, b, full, empty)
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        layer, tiles = number[0], number[1]
        items = ExpandItems(
            geometry=geometry,
            group=GROUP,
            config=config,
            chunk=CHUNK,
            num_blocks=jnp.int32(0),
            records=records,
            layer=layer,
        )
        order = ProductTiles(geometry=geometry, group=GROUP, cta=cta, ctas=ctas, tiles=tiles)
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
            refs = dict(w=w_ref, pool=pool, page_ids=page_ids, first_block=first_block)

            @plgpu.warp_map
            def _(warp):
                GatedLoad(ring=ring, items=items, order=order, shrink=shrink, warp=warp, **refs).run()

        @pl.when(wg < 2)
        def multiply():
            plgpu.set_max_registers(224, action="increase")
            mine = pl.ds(pl.multiple_of(wg * WINDOW, WINDOW), WINDOW)

            def for_stages(seen, length, run):
                @pl.loop(0, length)
                def _(k):
                    slot = lax.rem(seen + k, jnp.int32(STAGES))
                    plgpu.barrier_wait(full.at[slot])
                    run(k, slot)
                    plgpu.barrier_arrive(empty.at[slot])

            def for_base_stages(n, seen, run):
                stages = lambda seen, first, last: for_stages(seen + first, last - first, run)  # noqa: E731
                shrink.for_base_stages(wg, n, seen, steps, stages)

            def base(n, seen):
                """Gate and up of x, before deltas, rounded."""

                def accumulate(gate, up):
                    def run(k, slot):
                        del k
                        for matrix, acc in enumerate((gate, up)):
                            plgpu.wgmma(acc, ring.rows.at[slot, mine], ring.weights(slot, matrix))
                        plgpu.wgmma_wait(0)

                    for_base_stages(n, seen, run)
                    return gate[...].astype(x.dtype), up[...].astype(x.dtype)

                return pl.run_scoped(accumulate, *[plgpu.ACC((WINDOW, COLUMNS), jnp.float32)] * MATRICES)

            def deltas(seen, length, reached):
                """Of gate or of up. reached: bits of the stages that are not zero in the warpgroup's window."""

                def accumulate(acc):
                    def run(k, slot):
                        @pl.loop(0, lax.shift_right_logical(reached, jnp.minimum(k, 31)) & 1)  # a condition has no acc
                        def _(_):
                            plgpu.wgmma(acc, ring.rows.at[slot, mine], ring.weights(slot, 0))
                            plgpu.wgmma_wait(0)

                    for_stages(seen, length, run)
                    return acc[...]

                return pl.run_scoped(accumulate, plgpu.ACC((WINDOW, COLUMNS), jnp.float32))

            def total(part, delta, i):
                return (part.astype(jnp.float32) + _columns(delta, i)).astype(x.dtype)

            def send(i, value, target, rows, column):
                c[wg, i] = value
                plgpu.commit_smem()
                place = pl.ds(pl.multiple_of(column + i * TILE_COLS, TILE_COLS), TILE_COLS)
                plgpu.copy_smem_to_gmem(c.at[wg, i], target.at[rows, place])

            def whole(n, seen, lengths, reached, tile, column):
                window = tile * (TILE // WINDOW) + wg
                rows = pl.ds(pl.multiple_of(window * WINDOW, WINDOW), WINDOW)
                column *= COLUMNS
                keep = windows[window] != 0
                gate, up = base(n, seen)
                seen += base_stages(n)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i in range(_SLOTS):
                    c[wg, i] = _columns(gate, i)
                delta = deltas(seen, lengths[0], reached[0])
                for i in range(_SLOTS):
                    c[wg, i] = total(_load(c.at[wg, i]), delta, i)
                delta = deltas(seen + lengths[0], lengths[1], reached[1])
                for i in range(_SLOTS):
                    gate_part, up_part = _load(c.at[wg, i]), total(_columns(up, i), delta, i)

                    @pl.when(keep)
                    def _(i=i, parts=(gate_part, up_part)):
                        for matrix, part in enumerate(parts):
                            send(i, part, gate_up_ref, rows, matrix * up_column + column)
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    g, u = gate_part.astype(jnp.float32), up_part.astype(jnp.float32)
                    send(i, (g / (1 + jnp.exp(-g)) * u).astype(x.dtype), h_ref, rows, column)

            def others(n, seen, lengths):
                """The stages of a tile whose other window alone is this program's."""
                nothing = lambda k, slot: None  # noqa: E731
                for_base_stages(n, seen, nothing)
                for_stages(seen + base_stages(n), sum(lengths), nothing)

            def base_stages(n):
                return steps + shrink.sum_stages(n)

            def of_tile(n):
                """How many stages of deltas gate and up of a tile have, and which reach into the warpgroup's window."""
                tile, *_ = order.place(n)
                return [stages[tile, layer, m] for m in modules], [reach[tile, layer, m, wg] for m in modules]

            def tile_body(n, carry):
                seen, (lengths, reached) = carry
                tile, column, half = order.place(n)
                # loaded now, needed when the next tile's base is summed
                following = of_tile(jnp.minimum(n + 1, count - 1))
                mine = (half == HALVES) | (half == wg)
                pl.when(mine)(lambda: whole(n, seen, lengths, reached, tile, column))
                pl.when(~mine)(lambda: others(n, seen, lengths))
                return seen + base_stages(n) + sum(lengths), following

            @pl.when(count > 0)
            def _():
                seen = shrink.multiply(wg, jnp.int32(0))
                lax.fori_loop(0, count, tile_body, (seen, of_tile(jnp.int32(0))))
                plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        lora_matmul_silu_mul,
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
        compiler_params=plgpu.CompilerParams(approx_math=True),  # as silu_mul
        interpret=interpret,
    )(*args)


def _columns(array, i: int):
    return array[:, i * TILE_COLS : (i + 1) * TILE_COLS]


def _load(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA)
