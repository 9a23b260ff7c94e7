"""Hopper kernel of gate and up with the deltas of long segments, and of what follows: ``silu(gate) * up``.

As kernel_matmul_sm90, but a tile has 128 outputs of gate and the 128 of up beside them, so that both of an element's
inputs are in the registers of one thread, and neither crosses memory. Gate is summed, then up: an adapter's B of either
is half as wide, and used once. Where short segments add to gate or up later on, the kernel also writes these two, for
64 tokens at a time (`windows`); silu_mul is then done again there.

Each of gate and up is rounded before it goes on, as if silu_mul had followed: the bits do not show which of the two it
was. Where the last round has tiles for half of the programs at most, each is cut in two along its tokens.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, Geometry
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import NUM_SMS, LoraConfig
from pallas_kernels.lora.expand_items import ExpandItems
from pallas_kernels.lora.gated_load import GatedLoad
from pallas_kernels.lora.gated_ring import CHUNK, COLUMNS, MATRICES, GatedRing, weights_type
from pallas_kernels.lora.mosaic_common import OPERAND, PLAN_ROWS, STAGE_ROWS, STEP_ROWS, ChunkSource, capacity
from pallas_kernels.lora.plan import Half
from pallas_kernels.lora.product_tiles import HALVES, ProductTiles
from pallas_kernels.lora.stage_ring import STAGES, arrivals
from pallas_kernels.lora.windows import TILE, WINDOW, Tiles
from pallas_kernels.vectors_sm90 import unsupported_row

GROUP = "gu"
_SLOTS = COLUMNS // TILE_COLS
"""Outputs of a warpgroup on their way to memory, and gate on its way to up."""


def unsupported(geometry: Geometry) -> str | None:
    """Why the kernel cannot take what kernel_matmul_sm90 can, or None if it can. geometry: of the B's."""
    gate, up = (geometry.out_sizes[m] for m in GROUPS[GROUP])
    if gate != up or gate % COLUMNS:
        return f"gate and up have {gate} and {up} columns, not equally many and a multiple of {COLUMNS}"
    return unsupported_row(gate, jnp.bfloat16)


def gated_matmul(x, w, y, pages, half: Half, tiles: Tiles, windows, layer, *, config: LoraConfig, interpret=None):
    """``(h, gate_up)``: ``silu(gate) * up`` of ``x @ w[layer]`` and the deltas of the plan's segments, bfloat16 [T, F],
    and gate and up, [T, 2F], written where `windows` is not zero.

    w: [layers, in, 2F]. y: of `shrink_y`. half: of the adapters' B, cut at windows, as `tiles` is. windows: int32
    [T / 64]. layer: int32[1].
    """
    source = ChunkSource(geometry=half.geometry, num_pages=pages.shape[1], chunk=CHUNK, whole=not interpret)
    num_tokens, columns = x.shape[0], w.shape[2]
    out = tuple(jax.ShapeDtypeStruct((num_tokens, n), x.dtype) for n in (columns // MATRICES, columns))
    number = jnp.concatenate([layer, jnp.full(1, num_tokens // TILE, jnp.int32)])
    adapters = source.view_of_pool(pages), half.page_ids, half.plan.records
    args = (x, w, y, *adapters, tiles.first_block, tiles.stages, tiles.reach, tiles.units, windows, number)
    options = dict(config=config, source=source)
    with jax.named_scope("lora_matmul_silu_mul"):
        if interpret:
            return _launch(*args, **options, out=out, interpret=interpret)
        most, blocks = capacity(STEP_ROWS, num_tokens), capacity(PLAN_ROWS, half.plan.records.shape[0])
        rows = {0: most, 2: most, 5: blocks, 6: most // TILE + 1} | dict.fromkeys((7, 8, 9), most // TILE)
        rows[10] = most // WINDOW
        largest = tuple(jax.ShapeDtypeStruct((most, o.shape[1]), o.dtype) for o in out)
        return any_rows(_launch, args, rows=rows, out=out, in_place=False, options=options | dict(out=largest))


def _launch(*args, out, config, source, interpret=None):
    x, w, y, *_ = args
    geometry, modules, up_column = source.geometry, GROUPS[GROUP], w.shape[2] // MATRICES
    ctas = 2 if interpret else NUM_SMS
    steps = x.shape[1] // STAGE_ROWS
    most_stages = y.shape[1] // (len(modules) * STAGE_ROWS)

    def lora_matmul_silu_mul(
        x_ref,
        w_ref,
        y_ref,
        pool,
        page_ids,
        records,
        first_block,
        stages,
        reach,
        units,
        windows,
        number,
        h_ref,
        gate_up_ref,
        *,
        a,
        b,
        c,
        full,
        empty,
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

        @pl.when(wg == 2)
        def load():
            plgpu.set_max_registers(56, action="decrease")
            options = dict(first_block=first_block, stages=stages, units=units, most_stages=most_stages)
            refs = dict(x=x_ref, w=w_ref, y=y_ref, pool=pool, page_ids=page_ids)

            @plgpu.warp_map
            def _(warp):
                GatedLoad(ring=ring, items=items, order=order, warp=warp, **refs, **options).run()

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

            def base(seen):
                """Gate and up of x, before deltas, rounded."""

                def accumulate(gate, up):
                    def run(k, slot):
                        del k
                        for matrix, acc in enumerate((gate, up)):
                            plgpu.wgmma(acc, ring.rows.at[slot, mine], ring.weights(slot, matrix))
                        plgpu.wgmma_wait(0)

                    for_stages(seen, steps, run)
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

            def whole(seen, lengths, reached, tile, column):
                window = tile * (TILE // WINDOW) + wg
                rows = pl.ds(pl.multiple_of(window * WINDOW, WINDOW), WINDOW)
                column *= COLUMNS
                keep = windows[window] != 0
                gate, up = base(seen)
                seen += steps
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
                length = steps + sum(lengths)
                pl.when(mine)(lambda: whole(seen, lengths, reached, tile, column))
                pl.when(~mine)(lambda: for_stages(seen, length, lambda k, slot: None))
                return seen + length, following

            @pl.when(count > 0)
            def _():
                lax.fori_loop(0, count, tile_body, (jnp.int32(0), of_tile(jnp.int32(0))))
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
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),  # as silu_mul
        interpret=interpret,
    )(*args)


def _columns(array, i: int):
    return array[:, i * TILE_COLS : (i + 1) * TILE_COLS]


def _load(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA)
