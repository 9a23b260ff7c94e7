"""Hopper kernel of lora_shrink before a product with the base weights: y of every tile's stages as wgmma takes it.

A program takes the sixteen tokens of a part of a window, with at most two segments, and sums all ranks and the whole
input width of each, so that nobody waits for a stranger and no partial sum crosses memory; that A is read by four
programs instead of one costs less. The splits of the input width are summed on their own and added in order, as the
other kernels do, so the bits are theirs. Then y is scaled and written tokens first, zero where a stage has ranks of
other tokens. Stages that do not reach into a window are not written there.
"""

import functools
import itertools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import NUM_SMS, LoraConfig
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
from pallas_kernels.lora.plan import NUM_TOKENS, OFFSET, TOKEN, Plan, group_fields, module_field, y_rows
from pallas_kernels.lora.short_items import split_chunks
from pallas_kernels.lora.short_ring import WARPS, full_arrivals
from pallas_kernels.lora.shrink_y_load import ShrinkYLoad
from pallas_kernels.lora.windows import PART, TILE, UNIT_RANKS, WINDOW, Tiles, most_stages

_SEGMENTS = 2
"""That a part can have."""
_MARGIN = STAGE_ROWS
"""Rows around the sums, for stages that begin before a module's ranks or end after them."""
_STAGES = 5
_WGMMA = plgpu.Layout.WGMMA


def shrink_y(
    x,
    pages,
    page_ids,
    a: Plan,
    b: Plan,
    tiles: Tiles,
    layer,
    *,
    group: str,
    geometry: Geometry,
    config: LoraConfig,
    chunk: int,
    max_rank: int,
    interpret=None,
):
    """bfloat16 ``[T, modules x most stages x 64 ranks]``: of the stages that a tile multiplies.

    a, b: plans of the two matrices, cut at windows, as `tiles` is. page_ids, geometry: of A's. layer: int32[1].
    """
    source = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=chunk, whole=not interpret)
    tokens, columns = len(x), len(GROUPS[group]) * most_stages(max_rank) * STAGE_ROWS
    out = jax.ShapeDtypeStruct((tokens, columns), x.dtype)
    views = source.view_of_tokens(x), source.view_of_pool(pages)
    number = jnp.concatenate([layer, jnp.full(1, tokens // PART, jnp.int32)])
    places = tiles.stages, tiles.reach, tiles.first_unit, tiles.parts
    args = (*views, page_ids, a.records, b.records, b.scaling, *places, number)
    options = dict(group=group, config=config, source=source, sums_rows=y_rows(group, max_rank))
    with jax.named_scope("lora_shrink"):
        if interpret:
            return _launch(*args, **options, out=out, interpret=interpret)
        most = capacity(STEP_ROWS, tokens)
        rows = {0: most, 9: max(most // PART, NUM_SMS)} | dict.fromkeys((6, 7), most // TILE)
        rows |= dict.fromkeys((3, 4, 5, 8), capacity(PLAN_ROWS, len(b.records)))
        options["out"] = jax.ShapeDtypeStruct((most, columns), out.dtype)
        return any_rows(_launch, args, rows=rows, out=(out,), in_place=False, options=options)[0]


def _launch(
    x,
    pool,
    page_ids,
    a_records,
    b_records,
    scaling,
    stages_of,
    reach,
    first_unit,
    parts,
    number,
    *,
    group,
    config,
    source,
    sums_rows,
    out,
    interpret=None,
):
    modules, dtype = GROUPS[group], out.dtype
    ctas = 2 if interpret else NUM_SMS
    total, per_split, splits = split_chunks(source.geometry, group, config, source.chunk)
    most = out.shape[1] // (len(modules) * STAGE_ROWS)
    max_span = sums_rows // TILE_RANKS * source.geometry.in_tiles(modules[0])
    sums_rows += 2 * _MARGIN
    fixed_bytes = 4 * sums_rows * PART + 2 * len(modules) * PART * STAGE_ROWS
    stage_bytes = 2 * (STAGE_ROWS + PART) * source.chunk * TILE_COLS
    stages = min(_STAGES, (SHARED_BYTES - fixed_bytes) // stage_bytes)
    assert stages >= 2, "a slot is free once the next one's product is issued"

    def lora_shrink_y(
        x_ref,
        pool,
        page_ids,
        a_records,
        b_records,
        scaling,
        stages_of,
        reach,
        first_unit,
        parts,
        number,
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
        layer, last = number[0], number[1] - 1
        num_items = ceil_div(jnp.maximum(number[1] - cta, 0), ctas)

        def blocks_of(part):
            return [parts[part, i] for i in range(_SEGMENTS)]

        def for_parts(body, init):
            """Folds ``body(part, its token blocks, or -1, how many they are, carry)``. Blocks are read one part ahead,
            of the first one before it is known whether there is one: see Tiles.
            """

            def step(n, state):
                blocks, carry = state
                part = cta + n * ctas
                count = sum(jnp.where(block >= 0, 1, 0) for block in blocks)
                return blocks_of(jnp.minimum(part + ctas, last)), body(part, blocks, count, carry)

            first = blocks_of(cta)
            return lax.fori_loop(0, having_read(first, num_items), step, (first, init))[1]

        @pl.when(wg == 1)
        def load():
            @plgpu.warp_map
            def _(warp):
                options = dict(source=source, group=group, stages=stages, total=total, max_span=max_span)
                refs = dict(x=x_ref, pool=pool, records=a_records, page_ids=page_ids, rows=x_target, chunks=chunks)
                of_warp = ShrinkYLoad(warp=warp, layer=layer, full=full, empty=empty, **refs, **options)
                drain(empty, for_parts(of_warp.part, jnp.int32(0)), stages)

        @pl.when(wg == 0)
        def multiply():
            def chosen(i, values):
                return jnp.where(i == 0, *values)

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

                return pl.run_scoped(accumulate, plgpu.ACC((STAGE_ROWS, PART), jnp.float32))

            def sum_part(part, blocks, count, seen):
                tile, rest = lax.div(part, jnp.int32(TILE // PART)), lax.rem(part, jnp.int32(TILE // PART))
                window = lax.div(rest, jnp.int32(WINDOW // PART))
                lengths = [stages_of[tile, layer, m] for m in modules]
                reached = [reach[tile, layer, m, window] for m in modules]
                present, blocks = [block >= 0 for block in blocks], [jnp.maximum(block, 0) for block in blocks]
                own = [_own_tokens(b_records, block, layer, part * PART) for block in blocks]
                ranks = [[_ranks_of(b_records, first_unit, block, layer, m) for m in modules] for block in blocks]
                scales = [[scaling[block, layer, m] for m in modules] for block in blocks]
                fields = itertools.chain(lengths, reached, *own, *itertools.chain(*ranks))
                count = having_read(list(fields), count, itertools.chain(*scales))
                ranks = [
                    [(jnp.where(p, granules, 0), *rest) for granules, *rest in of]
                    for p, of in zip(present, ranks, strict=True)
                ]

                def is_own(shape, first, length):
                    token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_WGMMA)
                    return (token >= first) & (token < first + length)

                def segment_body(i, seen):
                    all_granules = a_records[chosen(i, blocks), layer, group_fields(group)[1]]
                    first, length = (chosen(i, values) for values in zip(*own, strict=True))

                    def rank_body(rank_block, seen):
                        of_splits = [sum_of(seen, split) for split in range(splits)]
                        place = pl.ds(_MARGIN + rank_block * STAGE_ROWS, STAGE_ROWS)
                        others = plgpu.load(sums.at[place], layout=_WGMMA, optimized=False)
                        found = functools.reduce(jnp.add, of_splits)
                        sums[place] = jnp.where(is_own(found.shape, first, length), found, others)
                        return seen + total

                    return lax.fori_loop(0, ceil_div(all_granules, STAGE_CHUNKS), rank_body, seen)

                seen = lax.fori_loop(0, count, segment_body, seen)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()

                def y_of(stage, m, segments):
                    """What a stage has of the part's tokens, [64 ranks, tokens]."""
                    y: jax.Array | float = 0.0
                    for (first, length), of, scale in list(zip(own, ranks, scales, strict=True))[:segments]:
                        granules, row, unit = of[m]
                        low = unit * UNIT_RANKS - stage * STAGE_ROWS  # where in the stage the ranks begin
                        place = jnp.clip(_MARGIN + row - low, 0, sums_rows - STAGE_ROWS)
                        total = plgpu.load(sums.at[pl.ds(place, STAGE_ROWS)], layout=_WGMMA, optimized=False)
                        rank = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=_WGMMA) - low
                        live = is_own(total.shape, first, length) & (rank >= 0) & (rank < granules * TILE_RANKS)
                        y = jnp.where(live, total * scale[m], y)
                    return jnp.asarray(y).astype(dtype)

                def write(segments):
                    for m in range(len(modules)):

                        @pl.loop(0, lengths[m])
                        def write_stage(stage, m=m):
                            @pl.when(lax.shift_right_logical(reached[m], jnp.minimum(stage, 31)) & 1 == 1)
                            def _():
                                y, target = y_of(stage, m, segments), tiles.at[m]
                                pl.when(stage > 0)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
                                target.T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                                plgpu.commit_smem()
                                tokens = pl.ds(pl.multiple_of(part * PART, PART), PART)
                                column = pl.multiple_of((m * most + stage) * STAGE_ROWS, STAGE_ROWS)
                                plgpu.copy_smem_to_gmem(target, y_ref.at[tokens, pl.ds(column, STAGE_ROWS)])

                pl.when(count < _SEGMENTS)(lambda: write(1))
                pl.when(count == _SEGMENTS)(lambda: write(_SEGMENTS))
                return seen

            for_parts(sum_part, jnp.int32(0))
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
            x_ring=source.tokens((stages,), PART, x.dtype),
            sums=plgpu.SMEM((sums_rows, PART), jnp.float32),
            tiles=plgpu.SMEM((len(modules), PART, STAGE_ROWS), dtype, transforms=OPERAND),
            full=plgpu.Barrier(num_arrivals=full_arrivals(source, WARPS * source.chunk), num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages),
        ),
        interpret=interpret,
    )
    return kernel(x, pool, page_ids, a_records, b_records, scaling, stages_of, reach, first_unit, parts, number)


def _own_tokens(records, block, layer, start) -> tuple:
    """The first of a block's own tokens, counted from `start` on, and how many they are."""
    token, offset, length = (records[block, layer, i] for i in (TOKEN, OFFSET, NUM_TOKENS))
    return token + offset - start, length


def _ranks_of(records, first_unit, block, layer, module) -> tuple:
    """A block's granules of a module, the first of its stacked ranks, and its first unit in the tile."""
    granules, row = (records[block, layer, module_field(module) + i] for i in (1, 2))
    return granules, row, first_unit[block, layer, module]
