"""Hopper kernels for short segments, shrink and expand each in a launch of its own, with Mosaic GPU.

One program a multiprocessor, and its roles: a warpgroup streams weight chunks into a ring in shared memory, one
multiplies, and of expand one prepares y. Each split of the input width is summed on its own, always in the same order,
and the splits are added in order: kernel_add_sm90, which does both in one launch, has the same bits.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.add_rows import rows_type
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.diagonal import store_diagonal
from pallas_kernels.lora.expand_items import ExpandItems
from pallas_kernels.lora.expand_y import RowTiles, prepare_y
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
from pallas_kernels.lora.plan import Half, y_rows
from pallas_kernels.lora.short_expand import ShortExpand
from pallas_kernels.lora.short_items import ShrinkItems, split_chunks
from pallas_kernels.lora.short_ring import SIDE_BLOCKS, ShortRing, full_arrivals, ring_type
from pallas_kernels.lora.short_shrink import ShortShrink


def short(
    phase: Literal["shrink", "expand"],
    pages,
    layer,
    half: Half,
    *,
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
    deltas of such `y` added.

    layer: int32[1]. Rows past a block's true ranks and columns of other tokens than its own are unspecified in y.
    """
    source = ChunkSource(
        geometry=half.geometry, num_pages=pages.shape[1], chunk=chunk, whole=not interpret, read_once=True
    )
    blocks = half.plan.records.shape[0]
    shrinks = phase == "shrink"
    if shrinks:
        args = dict(x=source.view_of_tokens(x))
        y_shape = (split_chunks(half.geometry, group, config, chunk)[2], y_rows(group, max_rank), TILE_RANKS)
        out_type = jax.ShapeDtypeStruct((blocks, *y_shape), jnp.float32)
    else:
        args = dict(out=out, y=y, scaling=half.plan.scaling)
        out_type = jax.ShapeDtypeStruct(out.shape, out.dtype)
    args |= dict(page_ids=half.page_ids, records=half.plan.records)
    args |= dict(pool=source.view_of_pool(pages), counts=half.plan.counts, layer=layer)
    launch = _shrink if shrinks else _expand
    options: dict[str, Any] = dict(
        names=tuple(args), group=group, config=config, source=source, max_rank=max_rank, interpret=interpret
    )
    tokens = (x if shrinks else out).shape[0]
    with jax.named_scope(f"lora_{phase}"):
        if interpret or tokens < TILE_RANKS:
            return launch(*args.values(), **options, blocks=blocks)[0]
        rows = dict.fromkeys(("y", "scaling", "records"), capacity(PLAN_ROWS, blocks))
        rows |= dict.fromkeys(("x", "out"), capacity(STEP_ROWS, tokens))
        return any_rows(
            launch,
            tuple(args.values()),
            rows={i: rows[name] for i, name in enumerate(args) if name in rows},
            out=(out_type,),
            in_place=not shrinks,
            options=options | dict(blocks=rows["y"]),
        )[0]


def ring_stages(source: ChunkSource, config: LoraConfig, other_bytes: int) -> int:
    """Slots of the ring beside so many bytes of shared memory."""
    slot_bytes = 2 * (STAGE_CHUNKS + SIDE_BLOCKS) * TILE_RANKS * source.chunk * TILE_COLS
    return min(config.expand_stages, (SHARED_BYTES - other_bytes) // slot_bytes)


def _shrink(*args, names, group, config: LoraConfig, source: ChunkSource, max_rank, blocks, interpret=None):
    stages = ring_stages(source, config, 0)
    splits, rows = split_chunks(source.geometry, group, config, source.chunk)[2], y_rows(group, max_rank)

    def body(*refs, ring, full, empty):
        ref = dict(zip((*names, "y"), refs, strict=True))
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        items = ShrinkItems(
            geometry=source.geometry,
            group=group,
            config=config,
            chunk=source.chunk,
            num_blocks=ref["counts"][0],
            rank_blocks=ref["counts"][1 + list(GROUPS).index(group)],
            records=ref["records"],
            layer=ref["layer"][0],
        )
        shrink = ShortShrink(
            items=items,
            source=source,
            ring=ShortRing.of(source, stages, ring, full, empty),
            x=ref["x"],
            pool=ref["pool"],
            page_ids=ref["page_ids"],
            max_granules=rows // TILE_RANKS,
        )
        num_items = items.local(cta)
        each = (num_items, lambda n: items.fetch(cta, n), lambda n, fetched: items.describe(cta, n, fetched))

        @pl.when(wg == 0)
        def multiply():
            def item_body(item, _, seen):
                window = pl.ds(item.first_granule * TILE_RANKS, STAGE_ROWS)

                def store(number, total):
                    y = ref["y"].at[item.block, :, window]
                    store_diagonal(total, item, number, y, interpret=bool(interpret))

                return shrink.multiply(item, seen, store)

            for_items(*each, item_body, jnp.int32(0))

        @pl.when(wg == 1)
        def load():
            @plgpu.warp_map
            def _(warp):
                issued = for_items(*each, lambda item, _, issued: shrink.load(item, warp, issued), jnp.int32(0))
                drain(empty, issued, stages)

    body.__name__ = "lora_shrink_short"
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((blocks, splits, rows, TILE_RANKS), jnp.float32)],
        grid=(config.expand_ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="wg",
        scratch_types=dict(
            ring=ring_type(source, stages, args[names.index("pool")].dtype),
            full=plgpu.Barrier(num_arrivals=full_arrivals(source, SIDE_BLOCKS * source.chunk), num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*args)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpandScratch:
    """Types of what expand needs in shared memory beside the ring."""

    y_smem: tuple[int, ...]
    moved: tuple[int, ...]

    @classmethod
    def of(cls, source: ChunkSource, config: LoraConfig, max_rank: int) -> "ExpandScratch":
        rank_tiles = static_ceil_div(static_ceil_div(max_rank, TILE_RANKS), STAGE_CHUNKS)
        packed = config.expand_packed
        return cls(
            y_smem=(2, rank_tiles, packed * TILE_RANKS, STAGE_ROWS),
            moved=rows_type(source.chunk * TILE_COLS),
        )

    @property
    def num_bytes(self) -> int:
        return 2 * math.prod(self.y_smem) + 4 * math.prod(self.moved)

    def types(self, dtype) -> dict[str, Any]:
        return dict(
            y_smem=plgpu.SMEM(self.y_smem, dtype, transforms=OPERAND),
            moved=plgpu.SMEM(self.moved, jnp.float32),
            y_full=plgpu.Barrier(num_barriers=2),
            y_empty=plgpu.Barrier(num_barriers=2),
        )


def _expand(*args, names, group, config: LoraConfig, source: ChunkSource, max_rank, blocks, interpret=None):
    del blocks
    dtype, scratch = args[names.index("pool")].dtype, ExpandScratch.of(source, config, max_rank)
    stages = ring_stages(source, config, scratch.num_bytes)

    def body(*refs, ring, full, empty, y_smem, moved, y_full, y_empty):
        ref = dict(zip(names, refs, strict=True))
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        items = ExpandItems(
            geometry=source.geometry,
            group=group,
            config=config,
            chunk=source.chunk,
            num_blocks=ref["counts"][0],
            records=ref["records"],
            layer=ref["layer"][0],
        )
        expand = ShortExpand(
            items=items,
            source=source,
            ring=ShortRing.of(source, stages, ring, full, empty),
            out=ref["out"],
            pool=ref["pool"],
            page_ids=ref["page_ids"],
            y_smem=y_smem,
            y_full=y_full,
            y_empty=y_empty,
            moved=moved,
            interpret=bool(interpret),
        )
        num_items = items.local(cta)
        each = (num_items, lambda n: items.fetch(cta, n), lambda n, fetched: items.describe(cta, n, fetched))

        @pl.when(wg == 0)
        def multiply():
            start = (jnp.int32(0), jnp.int32(0))
            for_items(*each, lambda item, _, carry: expand.multiply(item, carry), start)

        @pl.when(wg == 1)
        def load():
            @plgpu.warp_map
            def _(warp):
                issued = for_items(*each, lambda item, _, issued: expand.load(item, warp, issued), jnp.int32(0))
                drain(empty, issued, stages)

        @pl.when(wg == 2)
        def prepare():
            tiles = RowTiles(y_smem=y_smem, interpret=bool(interpret))
            prepare_y(items, *each, ref["y"], ref["scaling"], tiles, y_full, y_empty, ahead=True)

    body.__name__ = "lora_expand_short"
    target = jax.new_ref(args[0])
    plgpu.kernel(
        body,
        out_type=(),
        grid=(config.expand_ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            ring=ring_type(source, stages, dtype),
            full=plgpu.Barrier(
                num_arrivals=full_arrivals(source, config.expand_packed * TILE_RANKS), num_barriers=stages
            ),
            empty=plgpu.Barrier(num_barriers=stages),
            **scratch.types(dtype),
        ),
        # commit_smem or sync_warpgroup stands wherever a thread reads what another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(target, *args[1:])
    return [jax.freeze(target)]
