"""Hopper kernel for short segments that shrinks and expands in one launch, with Mosaic GPU.

A cluster of thread blocks takes a token block and a module: each sums its part of the input width, they exchange their
sums through distributed shared memory, and each expands its part of the outputs. So nobody waits for a stranger, and a
thread block streams weights without pause: while an item's sums are on their way it is at the next item's A.

Roles of a thread block: a warpgroup streams weight chunks into a ring in shared memory in the order A0 A1 B0 A2 B1 ...,
one multiplies A, one prepares y, one multiplies B. Each split of the input width is summed on its own, always in the
same order, and the splits are added in order, as in kernel_short_sm90: the bits are the same.
"""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_RANKS
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.cluster_exchange import SLOTS, Exchange
from pallas_kernels.lora.cluster_items import AddItem, AddItems
from pallas_kernels.lora.config import CLUSTER, CLUSTERS, LoraConfig
from pallas_kernels.lora.expand_items import ExpandItems
from pallas_kernels.lora.expand_y import RowTiles
from pallas_kernels.lora.kernel_short_sm90 import ExpandScratch, ring_stages
from pallas_kernels.lora.mosaic_common import PLAN_ROWS, STAGE_ROWS, STEP_ROWS, ChunkSource, capacity, drain
from pallas_kernels.lora.plan import Half, y_rows
from pallas_kernels.lora.ranges import MAX_LOG_RANGES
from pallas_kernels.lora.short_expand import ShortExpand
from pallas_kernels.lora.short_items import ShrinkItems, split_chunks
from pallas_kernels.lora.short_ring import ShortRing, full_arrivals, ring_type, sync_warpgroup
from pallas_kernels.lora.short_shrink import ShortShrink

_REGISTERS = 128
"""That a thread of four warpgroups has. Who multiplies B takes some from the others: it would keep sums in memory."""


def add(pages, layer, a: Half, b: Half, *, x, out, group: str, config: LoraConfig, chunk: int, max_rank: int):
    """`out` with the deltas of `x` added. layer: int32[1]. a, b: where the adapters' two matrices lie."""
    sources = tuple(
        ChunkSource(geometry=half.geometry, num_pages=pages.shape[1], chunk=chunk, whole=True, read_once=True)
        for half in (a, b)
    )
    args = dict(out=out, x=sources[0].view_of_tokens(x), scaling=b.plan.scaling)
    args |= dict(a_ids=a.page_ids, a_records=a.plan.records, b_ids=b.page_ids, b_records=b.plan.records)
    args |= dict(pool=sources[0].view_of_pool(pages), counts=a.plan.counts, cut=a.plan.cut, layer=layer)
    options: dict[str, Any] = dict(names=tuple(args), group=group, config=config, sources=sources, max_rank=max_rank)
    with jax.named_scope("lora_add"):
        if out.shape[0] < TILE_RANKS:
            return _launch(*args.values(), **options)[0]
        rows = dict.fromkeys(("scaling", "a_records", "b_records"), capacity(PLAN_ROWS, len(a.plan.records)))
        rows |= dict.fromkeys(("x", "out"), capacity(STEP_ROWS, out.shape[0]))
        return any_rows(
            _launch,
            tuple(args.values()),
            rows={i: rows[name] for i, name in enumerate(args) if name in rows},
            out=(jax.ShapeDtypeStruct(out.shape, out.dtype),),
            in_place=True,
            options=options,
        )[0]


def _launch(*args, names, group, config: LoraConfig, sources: tuple[ChunkSource, ChunkSource], max_rank):
    dtype, scratch = args[names.index("pool")].dtype, ExpandScratch.of(sources[1], config, max_rank)
    splits = split_chunks(sources[0].geometry, group, config, sources[0].chunk)[2]
    parts = (SLOTS, splits, STAGE_ROWS, TILE_RANKS)
    stages = ring_stages(sources[0], config, scratch.num_bytes + 4 * math.prod(parts))

    def body(*refs, ring, a_full, b_full, empty, parts, sent, free, y_smem, moved, y_full, y_empty):
        ref = dict(zip(names, refs, strict=True))
        wg, layer, num_blocks = lax.axis_index("wg"), ref["layer"][0], ref["counts"][0]
        known: dict[str, Any] = dict(
            group=group, config=config, chunk=sources[0].chunk, num_blocks=num_blocks, layer=layer
        )
        shrink = ShortShrink(
            items=ShrinkItems(geometry=sources[0].geometry, rank_blocks=None, records=ref["a_records"], **known),
            source=sources[0],
            x=ref["x"],
            page_ids=ref["a_ids"],
            max_granules=y_rows(group, max_rank) // TILE_RANKS,
            pool=ref["pool"],
            ring=ShortRing.of(sources[0], stages, ring, a_full, empty),
        )
        expand = ShortExpand(
            items=ExpandItems(geometry=sources[1].geometry, records=ref["b_records"], **known),
            source=sources[1],
            out=ref["out"],
            page_ids=ref["b_ids"],
            y_smem=y_smem,
            y_full=y_full,
            y_empty=y_empty,
            moved=moved,
            interpret=False,
            pool=ref["pool"],
            ring=ShortRing.of(sources[1], stages, ring, b_full, empty),
        )
        items = AddItems(
            shrink=shrink.items,
            expand=expand.items,
            cut=tuple(ref["cut"][list(GROUPS).index(group), i] for i in range(MAX_LOG_RANGES)),
            cluster=lax.axis_index("cluster"),
            part=lax.axis_index("part"),
        )
        exchange = Exchange(parts=parts, sent=sent, free=free)
        zero = jnp.int32(0)

        def load():
            @plgpu.warp_map
            def _(warp):
                def load_a(item: AddItem, issued):
                    one = lambda k, issued: shrink.load(items.shrink_of(item, k), warp, issued)  # noqa: E731
                    return lax.fori_loop(0, item.rank_tiles, one, issued)

                load_b = lambda item, issued: expand.load(item.expand, warp, issued)  # noqa: E731
                drain(empty, _in_order(items, load_a, load_b, zero), stages)

        def multiply_a():
            def one(item: AddItem, carry):
                def rank_body(k, carry):
                    seen, number = carry
                    part = items.shrink_of(item, k)
                    exchange.wait_free(number)
                    send = lambda which, total: exchange.send(number, part, which, total)  # noqa: E731
                    return shrink.multiply(part, seen, send), number + 1

                return lax.fori_loop(0, item.rank_tiles, rank_body, carry)

            def skip(item: AddItem, carry):
                seen, number = carry
                return seen + item.expand.num_stages, number

            exchange.finish(_in_order(items, one, skip, (zero, zero))[1])

        def multiply_b():
            def skip(item: AddItem, carry):
                seen, used = carry
                return seen + items.shrink_stages(item), used

            _in_order(items, skip, lambda item, carry: expand.multiply(item.expand, carry), (zero, zero))

        def prepare():
            tiles = RowTiles(y_smem=y_smem, interpret=False)

            def item_body(n, carry):
                number, prepared, fetched = carry
                item = items.describe(n, fetched)
                scale = ref["scaling"][item.expand.block, layer, item.expand.module]
                fetched = items.fetch(jnp.minimum(n + 1, items.count - 1))
                buffer, targeted = lax.rem(prepared, 2), item.expand.length > 0

                @pl.when(targeted & (prepared >= 2))
                def _():
                    plgpu.barrier_wait(y_empty.at[buffer])

                def round_body(k, number):
                    with jax.named_scope("receive"):
                        sums = exchange.receive(number, items.shrink_of(item, k).granules)
                    with jax.named_scope("lay_out"):
                        pl.when(targeted)(lambda: tiles.lay_out(item.expand, buffer, k, scale, sums))
                    sync_warpgroup()
                    exchange.release(number)
                    return number + 1

                number = lax.fori_loop(0, item.rank_tiles, round_body, number)
                pl.when(targeted)(lambda: plgpu.barrier_arrive(y_full.at[buffer]))
                return number, prepared + jnp.where(targeted, 1, 0), fetched

            _, prepared, _ = lax.fori_loop(0, items.count, item_body, (zero, zero, items.fetch(zero)))
            drain(y_empty, prepared, 2)

        roles = ((multiply_a, 96), (multiply_b, 216), (load, 96), (prepare, 104))
        for i, (role, registers) in enumerate(roles):
            # Without short segments nobody waits for records of a plan that has none.
            @pl.when((wg == i) & (num_blocks > 0))
            def _(role=role, registers=registers):
                plgpu.set_max_registers(registers, action="increase" if registers > _REGISTERS else "decrease")
                role()

    body.__name__ = "lora_add_short"
    target = jax.new_ref(args[0])
    plgpu.kernel(
        body,
        out_type=(),
        grid=(CLUSTERS,),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("part",),
        num_threads=4,
        thread_name="wg",
        scratch_types=dict(
            ring=ring_type(sources[0], stages, dtype),
            a_full=plgpu.Barrier(num_arrivals=full_arrivals(sources[0], 0), num_barriers=stages),
            b_full=plgpu.Barrier(num_arrivals=full_arrivals(sources[1], 0), num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages),
            parts=plgpu.SMEM(parts, jnp.float32),
            sent=plgpu.Barrier(num_barriers=SLOTS),
            free=plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=SLOTS),
            **scratch.types(dtype),
        ),
        # commit_smem or sync_warpgroup stands wherever a thread reads what another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(target, *args[1:])
    return [jax.freeze(target)]


def _in_order(items: AddItems, shrink_one, expand_one, carry):
    """Folds the two over all items in the order of the launch. Records are fetched one item ahead: who computes on what
    was just loaded waits.
    """
    last = jnp.maximum(items.count - 1, 0)

    def described(n, fetched, wanted) -> AddItem:
        item = items.describe(n, fetched)
        return dataclasses.replace(item, rank_tiles=jnp.where(wanted, item.rank_tiles, 0))

    def body(n, state):
        item, fetched, carry = state
        ahead = jnp.minimum(n + 1, last)
        following = described(ahead, fetched, n < last)
        fetched = items.fetch(jnp.minimum(n + 2, last))
        return following, fetched, expand_one(item, shrink_one(following, carry))

    zero = jnp.int32(0)
    first = described(zero, items.fetch(zero), items.count > 0)
    state = first, items.fetch(jnp.minimum(1, last)), shrink_one(first, carry)
    return lax.fori_loop(0, items.count, body, state)[2]
