"""Hopper kernel for short segments: shrink, expand, or one after the other in one launch, with Mosaic GPU.

One program a multiprocessor, and four roles in it: a warpgroup streams weight chunks into a ring in shared memory, two
multiply, one prepares y. In a launch of both the loading warpgroup goes on to expand's weights while others still
shrink; only who prepares y waits until a token block has been shrunk (block_signals). So the memory never rests between
the two, and there is one start instead of two.

Each split of the input width is summed on its own, always in the same order, and the splits are added in order:
whether both halves run in one launch leaves no trace in the bits.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.block_signals import ShortSignals, take_ticket, wait_for
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.expand_items import ExpandItems
from pallas_kernels.lora.expand_y import prepare_y
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
)
from pallas_kernels.lora.plan import Plan, y_rows
from pallas_kernels.lora.short_expand import ShortExpand
from pallas_kernels.lora.short_items import ShrinkItems, split_chunks
from pallas_kernels.lora.short_ring import SIDE_BLOCKS, WARPS, ShortRing, ring_type
from pallas_kernels.lora.short_shrink import ShortShrink

Phase = Literal["shrink", "expand", "both"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Half:
    """Where one of the two matrices of every adapter lies, in a step."""

    page_ids: jax.Array
    plan: Plan
    geometry: Geometry = dataclasses.field(metadata=dict(static=True))


def short(
    phase: Phase,
    pages,
    layer,
    *,
    shrink: Half | None = None,
    expand: Half | None = None,
    x=None,
    out=None,
    y=None,
    group: str,
    config: LoraConfig,
    chunk: int,
    max_rank: int,
    interpret,
):
    """Phase "shrink": of `x`, partial sums float32 ``[token blocks, splits, y_rows, 8]``. "expand": `out` with the
    deltas of such `y` added. "both": `out` with the deltas of `x` added.

    layer: int32[1]. Rows past a block's true ranks and columns of other tokens than its own are unspecified in y.
    """
    sources = tuple(
        ChunkSource(geometry=half.geometry, num_pages=pages.shape[1], chunk=chunk, whole=not interpret)
        if half
        else None
        for half in (shrink, expand)
    )
    one, source = shrink or expand, sources[0] or sources[1]
    assert one is not None and source is not None
    blocks = one.plan.records.shape[0]
    args: dict[str, jax.Array] = {}
    y_shape = None
    if expand is not None:
        args |= dict(out=out, scaling=expand.plan.scaling)
        args |= dict(expand_ids=expand.page_ids, expand_records=expand.plan.records)
    if shrink is not None:
        args |= dict(x=source.view_of_tokens(x), shrink_ids=shrink.page_ids, shrink_records=shrink.plan.records)
        y_shape = (split_chunks(shrink.geometry, group, config, chunk)[2], y_rows(group, max_rank), TILE_RANKS)
    else:
        args["y"] = y
    if phase == "both":
        args |= dict(tickets=one.plan.tickets, done=one.plan.done)
    args |= dict(pool=source.view_of_pool(pages), counts=one.plan.counts, layer=layer)
    options: dict[str, Any] = dict(
        names=tuple(args), phase=phase, group=group, config=config, sources=sources, max_rank=max_rank, y_shape=y_shape
    )
    tokens = (x if out is None else out).shape[0]
    with jax.named_scope("lora_add" if phase == "both" else f"lora_{phase}"):
        if interpret or tokens < TILE_RANKS:
            return _launch(*args.values(), **options, blocks=blocks, interpret=interpret)[-1]
        rows = dict.fromkeys(("y", "scaling", "done", "shrink_records", "expand_records"), capacity(PLAN_ROWS, blocks))
        rows |= dict.fromkeys(("x", "out"), capacity(STEP_ROWS, tokens))
        types = [jax.ShapeDtypeStruct((blocks, *y_shape), jnp.float32)] if y_shape else []
        types += [jax.ShapeDtypeStruct(out.shape, out.dtype)] if expand else []
        return any_rows(
            _launch,
            tuple(args.values()),
            rows={i: rows[name] for i, name in enumerate(args) if name in rows},
            out=tuple(types),
            in_place=expand is not None,
            options=options | dict(blocks=rows["y"]),
        )[-1]


def _launch(*args, names, phase: Phase, group, config: LoraConfig, sources, max_rank, y_shape, blocks, interpret=None):
    """What the kernel returns: y, if it shrinks, and out, if it expands."""
    source = sources[0] or sources[1]
    chunk, dtype = source.chunk, args[names.index("pool")].dtype
    shrinks, expands = phase != "expand", phase != "shrink"
    consumers = 2 if chunk == 4 else 1
    columns = chunk * TILE_COLS
    rank_tiles = static_ceil_div(static_ceil_div(max_rank, TILE_RANKS), STAGE_CHUNKS)
    packed, ctas = config.expand_packed, config.expand_ctas
    y_type = (2, rank_tiles, packed * TILE_RANKS, STAGE_ROWS)
    shifted_type = (2 * STAGE_ROWS - STAGE_ROWS // packed, TILE_RANKS)
    rows_type = (consumers, 2, packed, columns // consumers)
    fixed_bytes = 2 * math.prod(y_type) + 2 * math.prod(shifted_type) + 4 * math.prod(rows_type)
    slot_bytes = 2 * (STAGE_CHUNKS + SIDE_BLOCKS) * TILE_RANKS * columns
    stages = min(config.expand_stages, (SHARED_BYTES - fixed_bytes) // slot_bytes)
    group_index = list(GROUPS).index(group)

    def body(*refs, ring, y_smem, shifted, rows, ticket, bars):
        ref = dict(zip((*names, *(("y",) if shrinks else ())), refs, strict=True))
        full, empty, y_full, y_empty, finished, told = bars
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        layer, counts = ref["layer"][0], ref["counts"]
        num_blocks, rank_blocks = counts[0], counts[1 + group_index]
        where: dict[str, Any] = dict(pool=ref["pool"], ring=ShortRing.of(source, stages, ring, full, empty))
        cut: dict[str, Any] = dict(group=group, config=config, chunk=chunk, num_blocks=num_blocks, layer=layer)
        signals = ShortSignals(
            finished=finished,
            told=told,
            done=lambda block: ref["done"].at[block, layer, pl.ds(group_index, 1)],
            sides=consumers,
        )
        if shrinks:
            shrink = ShortShrink(
                items=ShrinkItems(
                    geometry=sources[0].geometry,
                    sides=consumers,
                    rank_blocks=rank_blocks,
                    records=ref["shrink_records"],
                    **cut,
                ),
                source=sources[0],
                cta=cta,
                x=ref["x"],
                y=ref["y"],
                page_ids=ref["shrink_ids"],
                signals=signals if expands else None,
                **where,
            )
        if expands:
            expand = ShortExpand(
                items=ExpandItems(geometry=sources[1].geometry, records=ref["expand_records"], **cut),
                source=sources[1],
                # who had an item more to shrink has one less to expand
                cta=ctas - 1 - cta if shrinks else cta,
                out=ref["out"],
                page_ids=ref["expand_ids"],
                y_smem=y_smem,
                y_full=y_full,
                y_empty=y_empty,
                rows=rows,
                consumers=consumers,
                interpret=bool(interpret),
                **where,
            )

        def produce():
            @plgpu.warp_map
            def _(warp):
                issued = jnp.int32(0)
                if shrinks:
                    with jax.named_scope("load_a"):
                        issued = shrink.load(warp)
                if expands:
                    with jax.named_scope("load_b"):
                        issued = expand.load(warp, issued)
                drain(empty, issued, stages)

        def prepare():
            ready = None
            if shrinks:
                launches = take_ticket(ref["tickets"].at[layer, pl.ds(group_index, 1)], ticket, ctas)
                target = (launches + 1) * shrink.items.signals
                ready = lambda item: wait_for(signals.done(item.block), target)  # noqa: E731
                signals.tell(shrink.num_items, lambda n: shrink.items.block(cta, n))
            prepare_y(
                expand.items,
                expand.num_items,
                expand.fetch,
                expand.describe,
                ref["y"],
                ref["scaling"],
                shifted,
                y_smem,
                y_full,
                y_empty,
                rank_tiles=rank_tiles,
                by_rows=True,
                ready=ready,
            )

        def consume():
            seen = jnp.int32(0)
            if shrinks:
                with jax.named_scope("multiply_a"):
                    seen = shrink.multiply(wg)
            if expands:
                with jax.named_scope("multiply_b"):
                    expand.multiply(wg, seen)

        # The same for all programs: without work nobody takes a ticket.
        @pl.when(num_blocks * rank_blocks > 0)
        def _():
            pl.when(wg < consumers)(consume)
            pl.when(wg == consumers)(produce)
            if expands:
                pl.when(wg == consumers + 1)(prepare)

    body.__name__ = f"lora_{'add' if phase == 'both' else phase}_short"
    side_arrivals = SIDE_BLOCKS * chunk if shrinks else packed * TILE_RANKS  # interpreted
    full_arrivals = WARPS if source.whole else STAGE_CHUNKS * chunk + side_arrivals
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((blocks, *y_shape), jnp.float32)] if shrinks else (),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=consumers + (2 if expands else 1),
        thread_name="wg",
        scratch_types=dict(
            ring=ring_type(source, stages, dtype),
            y_smem=plgpu.SMEM(y_type, dtype, transforms=OPERAND),
            shifted=plgpu.SMEM(shifted_type, dtype),
            rows=plgpu.SMEM(rows_type, jnp.float32),
            ticket=plgpu.SMEM((1,), jnp.int32),
            bars=(
                plgpu.Barrier(num_arrivals=full_arrivals, num_barriers=stages),
                plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
                plgpu.Barrier(num_barriers=2),
                plgpu.Barrier(num_arrivals=consumers, num_barriers=2),
                plgpu.Barrier(num_arrivals=consumers, num_barriers=ShortSignals.depth),
                plgpu.Barrier(num_barriers=ShortSignals.depth),
            ),
        ),
        # commit_smem or sync_warpgroup stands wherever a thread reads what another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    if not expands:
        return kernel(*args)
    assert names[0] == "out"
    target = jax.new_ref(args[0])
    partial = kernel(target, *args[1:])
    return [*(partial or ()), jax.freeze(target)]
