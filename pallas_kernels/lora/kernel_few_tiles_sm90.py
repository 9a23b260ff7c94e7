"""Hopper kernel of a base projection of 256 tokens with the deltas of few adapters: ``x W + y B`` in one.

At so many tokens the tensor cores are as busy as memory, so where kernel_few_sm90 gives a thread block all tokens and
few outputs, here it has tiles of 128 tokens and 192 outputs, and two neighbours share the weights. Two warpgroups
multiply, 64 tokens each. As there, y goes on like more columns of x and B like more rows of W, and a block of 64 ranks
is shrunk by many thread blocks: each takes a share of the input after a few stages of base weights. Halfway through
these the warpgroup that fills the ring, which is then full, adds up for some tokens what all have found. When the base
weights are through, y has long been there.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import expect
from pallas_kernels.geometry import GROUPS, TILE_COLS, Geometry, ceil_div
from pallas_kernels.lora.config import CLUSTER, CLUSTERS, FEW_TILE_TOKENS, FEW_TOKENS
from pallas_kernels.lora.few_items import WindowItems, shares_of
from pallas_kernels.lora.few_plan import FewPlan
from pallas_kernels.lora.few_shrink import FewShrink
from pallas_kernels.lora.few_stripes import Stripes
from pallas_kernels.lora.few_tile_load import FewTileLoad
from pallas_kernels.lora.few_tile_multiply import FewTileMultiply
from pallas_kernels.lora.few_tile_ring import WINDOWS, FewTileRing, FewTileSlots
from pallas_kernels.lora.mosaic_common import STAGE_ROWS, ChunkSource
from pallas_kernels.lora.signals import leave_signals, wait_signals
from pallas_kernels.lora.windows import TILE, WINDOW
from pallas_kernels.paged_attention.decode_schedule import sm_count

LISTS = 1
"""Of FewPlan."""
TILES = FEW_TILE_TOKENS // TILE
"""Of tokens."""
_WIDTH = 3
"""Stripes that a thread block takes at a time: with fewer the tensor cores wait for shared memory, with more the ring
has too few slots.
"""
_MOST_PASSES = 2
"""Through the input: with more, cuBLAS and lora_add are faster."""
_LEAST_STAGES = 2
"""A slot is free when the next stage is being multiplied."""
assert WINDOW == FEW_TOKENS


def unsupported(x, w, shrink: Geometry, expand: Geometry) -> str | None:
    """Why the kernel cannot take what `lora_add` can, or None if it can. w: [layers, in, out]."""
    if w.dtype != x.dtype:
        return f"weights are {w.dtype} and activations {x.dtype}"
    if shrink != expand:
        return "A and B are cut differently"
    if x.shape[1] < _LEAST_STAGES * TILE_COLS or x.shape[1] % TILE_COLS:
        return f"an input of {x.shape[1]} is not a multiple of {TILE_COLS}, {_LEAST_STAGES * TILE_COLS} or more"
    if sm_count() < CLUSTER * CLUSTERS:
        return f"{sm_count()} multiprocessors cannot run {CLUSTER * CLUSTERS} thread blocks that wait for each other"
    return None


@functools.cache  # asked of every step
def is_wide(geometry: Geometry, group: str) -> bool:
    """Whether a group's outputs can be shared so that it pays."""
    stripes = _stripes(geometry, group, CLUSTERS)
    return stripes.width == _WIDTH and stripes.passes <= _MOST_PASSES


def few_tile_blocks(ranks: int) -> int:
    """Blocks of a module that has so many ranks."""
    return ceil_div(ranks, STAGE_ROWS)


def _stripes(geometry: Geometry, group: str, pairs: int) -> Stripes:
    return Stripes.of(geometry, group, pairs, most_each=1, most_wide=_WIDTH)


def few_tile_matmul(x, w, pages, plan: FewPlan, layer, *, group: str, geometry: Geometry, interpret=None):
    """``x @ w[layer]`` and the deltas of the plan's adapters, bfloat16 [256, out]. layer: int32[1]."""
    stripes = _stripes(geometry, group, len(GROUPS[group]) if interpret else CLUSTERS)
    tiles = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=1, whole=not interpret)
    blocks, stages = plan.records.shape[2], x.shape[1] // TILE_COLS
    ring = FewTileRing.of(stripes.width, tiles, stages)
    shares = 1 if interpret else shares_of(stripes, blocks, stages)
    of_plan = (plan.records, plan.ranks, plan.count, plan.page_ids, plan.signals)
    rows = x.shape[0] * blocks * len(GROUPS[group]) * (shares + 1)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype), jax.ShapeDtypeStruct((rows, STAGE_ROWS), x.dtype)
    with jax.named_scope("lora_matmul_few_tiles"):
        launch = _kernel(ring, stripes, shares, plan.records.shape, stages, out, interpret)
        return launch(x, w, tiles.view_of_pool(pages), *of_plan, layer)[0]


def _kernel(ring: FewTileRing, stripes: Stripes, shares: int, records, stages: int, out, interpret):
    layers, _, blocks, *_ = records
    programs = stripes.pairs * TILES

    def body(
        x_ref,
        w_ref,
        pool,
        records,
        ranks,
        counts,
        page_ids,
        signals,
        number,
        out_ref,
        ys,
        *,
        rows,
        weights,
        full,
        empty,
        results,
        has_y,
    ):
        slots = FewTileSlots.of(ring, rows, weights, full, empty)
        wg, program, layer = lax.axis_index("wg"), lax.axis_index("program"), number[0]
        pair, tile = lax.div(program, jnp.int32(TILES)), lax.rem(program, jnp.int32(TILES))
        mine, count = stripes.of_pair(pair, 0), jnp.int32(stages)

        def items(window):
            return WindowItems(
                stripes=mine,
                blocks=[counts[layer, m] for m in mine.modules],
                shares=shares,
                part=0,
                parts=1,
                own=bool(interpret),
                window=tile * WINDOWS + window,
                windows=TILES * WINDOWS,
                tile=tile,
                tiles=TILES,
            )

        def shrink(window):
            return FewShrink(
                items=items(window),
                ranks=ranks,
                ys=ys,
                signals=signals,
                operands=lambda slot: (slots.window(slot, window), slots.a(slot)),
                slots=ring.slots,
                full=full,
                empty=empty,
                has_y=has_y if interpret else None,
                layer=layer,
                layers=layers,
                count=count,
                first_token=tile * TILE + window * WINDOW,
            )

        def await_y():
            if interpret:  # where the thread block has added all up
                return

            @pl.loop(0, deltas)
            def _(block):
                signal = items(0).signal(layer, layers, mine.module, block) + 1
                wait_signals(signals, signal, shares)
                leave_signals(signals, signal, shares + mine.users)
                expect(has_y.at[block], 0)

        deltas = items(0).blocks_of(mine.place)

        @pl.when(wg < WINDOWS)
        def multiply():
            plgpu.set_max_registers(216, action="increase")
            share = shrink(wg)

            def shrink_items(before):
                share.shrink(before)
                if interpret:
                    share.add_up()

            FewTileMultiply(
                window=wg,
                tile=tile,
                slots=slots,
                results=results,
                out=out_ref,
                stripes=mine,
                count=count,
                deltas=deltas,
                shrink=shrink_items,
                shrink_stages=items(0).all_stages(count),
            ).run()

        @pl.when(wg == WINDOWS)
        def load():
            plgpu.set_max_registers(72, action="decrease")

            def of_warp(warp):
                return FewTileLoad(
                    ring=ring,
                    warp=warp,
                    slots=slots,
                    x=x_ref,
                    w=w_ref,
                    pool=pool,
                    records=records,
                    page_ids=page_ids,
                    ys=ys,
                    empty=empty,
                    layer=layer,
                    tile=tile,
                    count=count,
                    stripes=mine,
                    windows=[items(window) for window in range(WINDOWS)],
                    deltas=deltas,
                    has_y=has_y,
                    await_y=await_y,
                )

            plgpu.warp_map(lambda warp: of_warp(warp).begin())
            if not interpret:
                shrink(0).add_up(*[shrink(window) for window in range(1, WINDOWS)])
            plgpu.warp_map(lambda warp: of_warp(warp).finish())

    body.__name__ = "lora_matmul_few_tiles"
    has_y = plgpu.Barrier(num_arrivals=WINDOWS if interpret else 1, num_barriers=blocks)
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        num_threads=WINDOWS + 1,
        thread_name="wg",
        scratch_types=dict(**ring.types(out[0].dtype), has_y=has_y),
        interpret=interpret,
    )
