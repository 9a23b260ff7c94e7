"""Hopper kernel of a base projection with the deltas of long segments: ``x W`` rounded to bfloat16, then ``+ y B``.

The deltas never cross memory: after its last columns of x, a tile of 128 tokens and 256 outputs goes on with the
segments that reach into it, sixteen ranks of each like as many more columns: y of their tokens, zero for all others,
and their adapter's B. Four times sixteen are a stage, be they one adapter's or four adapters': see Tiles.
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

from pallas_kernels.geometry import GROUPS, TILE_COLS, Geometry
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import NUM_SMS, LoraConfig, chunk_tiles
from pallas_kernels.lora.expand_items import ExpandItems
from pallas_kernels.lora.mosaic_common import OPERAND, PLAN_ROWS, STAGE_ROWS, STEP_ROWS, ChunkSource, capacity
from pallas_kernels.lora.plan import Half
from pallas_kernels.lora.product_load import ProductLoad
from pallas_kernels.lora.product_ring import COLUMNS, HALF, ProductRing, weights_type
from pallas_kernels.lora.product_tiles import CHUNK, HALVES, ProductTiles
from pallas_kernels.lora.stage_ring import STAGES, arrivals
from pallas_kernels.lora.windows import TILE, WINDOW, Tiles

_SLOTS = HALF // TILE_COLS
"""Outputs on their way to memory, of a warpgroup."""


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


def matmul(x, w, y, pages, half: Half, tiles: Tiles, layer, *, group: str, config: LoraConfig, interpret=None):
    """``x @ w[layer]`` and the deltas of the plan's segments, bfloat16 [T, out].

    y: of `shrink_y`. half: of the adapters' B, cut at windows, as `tiles` is. layer: int32[1].
    """
    source = ChunkSource(geometry=half.geometry, num_pages=pages.shape[1], chunk=CHUNK, whole=not interpret)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    number = jnp.concatenate([layer, jnp.full(1, x.shape[0] // TILE, jnp.int32)])
    plan = half.plan
    adapters = source.view_of_pool(pages), half.page_ids, plan.records
    args = (x, w, y, *adapters, tiles.first_block, tiles.stages, tiles.reach, tiles.units, number)
    with jax.named_scope("lora_matmul"):
        if interpret:
            return _launch(*args, out=out, group=group, config=config, source=source, interpret=interpret)
        most, blocks = capacity(STEP_ROWS, x.shape[0]), capacity(PLAN_ROWS, plan.records.shape[0])
        rows = {0: most, 2: most, 5: blocks, 6: most // TILE + 1} | dict.fromkeys((7, 8, 9), most // TILE)
        largest = jax.ShapeDtypeStruct((most, out.shape[1]), out.dtype)
        options = dict(out=largest, group=group, config=config, source=source)
        return any_rows(_launch, args, rows=rows, out=(out,), in_place=False, options=options)[0]


def _launch(*args, out, group, config, source, interpret=None):
    x, _, y, *_ = args
    geometry, modules = source.geometry, GROUPS[group]
    ctas = 2 if interpret else NUM_SMS
    steps = x.shape[1] // STAGE_ROWS
    most_stages = y.shape[1] // (len(modules) * STAGE_ROWS)

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
        units,
        number,
        out_ref,
        *,
        a,
        b,
        c,
        full,
        empty,
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

        @pl.when(wg == 2)
        def load():
            plgpu.set_max_registers(56, action="decrease")
            options = dict(first_block=first_block, stages=stages, units=units, most_stages=most_stages)
            refs = dict(x=x_ref, w=w_ref, y=y_ref, pool=pool, page_ids=page_ids)

            @plgpu.warp_map
            def _(warp):
                ProductLoad(ring=ring, items=items, order=order, warp=warp, **refs, **options).run()

        @pl.when(wg < 2)
        def multiply():
            plgpu.set_max_registers(224, action="increase")
            mine = pl.ds(pl.multiple_of(wg * WINDOW, WINDOW), WINDOW)

            def product(seen, length, weights, width=HALF, first=True, last=True, reach=None):
                """Sum over the ring's next `length` stages, of some of a tile's outputs: what `weights` gives of a
                slot. first, last: of the times that they are gone through. reach: bits of the stages that are not zero
                here.
                """

                def accumulate(acc):
                    @pl.loop(0, length)
                    def _(k):
                        slot = lax.rem(seen + k, jnp.int32(STAGES))
                        pl.when(first)(lambda: plgpu.barrier_wait(full.at[slot]))

                        def multiply_stage():
                            plgpu.wgmma(acc, ring.rows.at[slot, mine], weights(slot))
                            plgpu.wgmma_wait(0)

                        if reach is None:
                            multiply_stage()
                        else:  # a loop, because a condition has no accumulator
                            wanted = lax.shift_right_logical(reach, jnp.minimum(k, 31)) & 1
                            pl.loop(0, wanted)(lambda _: multiply_stage())
                        pl.when(last)(lambda: plgpu.barrier_arrive(empty.at[slot]))

                    return acc[...]

                return pl.run_scoped(accumulate, plgpu.ACC((WINDOW, width), jnp.float32))

            def write(slot, part, delta, rows, first):
                """Adds the deltas of the outputs from `first` on to `part` and writes them from a slot of `c`."""
                part = part.astype(jnp.float32) + delta
                c[wg, slot] = part.astype(out.dtype)
                plgpu.commit_smem()
                outputs = pl.ds(pl.multiple_of(first, TILE_COLS), TILE_COLS)
                plgpu.copy_smem_to_gmem(c.at[wg, slot], out_ref.at[rows, outputs])

            def whole_tile(seen, length, reached, rows, column):
                base = product(seen, steps, ring.weights, COLUMNS).astype(out.dtype)
                seen += steps
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i in range(_SLOTS):
                    c[wg, i] = base[:, i * TILE_COLS : (i + 1) * TILE_COLS]
                again = length > STAGES  # the stages come a second time
                for half in range(HALVES):
                    leave = again | (half == HALVES - 1)
                    delta = product(seen, length, ring.columns(half), HALF, again | (half == 0), leave, reached)
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

            def half_tile(seen, length, reached, rows, column, half):
                base = product(seen, steps, ring.half_weights).astype(out.dtype)
                delta = product(seen + steps, length, ring.columns(half), reach=reached)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for slot in range(_SLOTS):
                    part = slice(slot * TILE_COLS, (slot + 1) * TILE_COLS)
                    place = column * COLUMNS + half * HALF + slot * TILE_COLS
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
                twice = whole & (length > STAGES)
                return seen + steps + jnp.where(twice, HALVES, 1) * length, *following

            @pl.when(count > 0)
            def _():
                lax.fori_loop(0, count, tile_body, (jnp.int32(0), *of_tile(jnp.int32(0))))
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
            c=plgpu.SMEM((2, _SLOTS, WINDOW, TILE_COLS), out.dtype, transforms=OPERAND),
            full=plgpu.Barrier(num_arrivals=arrivals(source), num_barriers=STAGES),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ),
        interpret=interpret,
    )(*args)
