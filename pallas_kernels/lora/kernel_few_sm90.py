"""Hopper kernel of a base projection of up to 64 tokens with the deltas of few adapters: ``x W + y B`` in one.

Reading W takes the time of such a step, and whatever is a launch of its own comes on top. Here y goes on like more
columns of x, zero for tokens of other adapters, and B like more rows of W. A pair of thread blocks takes stripes of 64
outputs and halves the input between them, and the ranks. They add up through distributed shared memory, each half of
the outputs.

A is read once. A block of 64 ranks is shrunk by many pairs, those with fewer stripes first: each multiplies a share of
the input beside its stripes and writes the sums to global memory, where each of them adds all up for a part of the
tokens. When the pairs are through with W, y is there, or nearly so where W is as small as o's.

A pair with many stripes goes through the input several times. Two warpgroups do so in turn, one while the other adds up
and writes; the second one also shrinks. A pass's y and B come after the next pass's base weights, when y is there. A
third warpgroup fills the rings.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry, ceil_div
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import CLUSTER, CLUSTERS, FEW_TOKENS, chunk_tiles
from pallas_kernels.lora.few_items import FewItems, shares_of
from pallas_kernels.lora.few_load import FewLoad
from pallas_kernels.lora.few_plan import FewPlan
from pallas_kernels.lora.few_ring import TOKEN_PARTS, FewRing
from pallas_kernels.lora.few_shrink import FewShrink
from pallas_kernels.lora.few_stripes import Stripes
from pallas_kernels.lora.mosaic_common import SHARED_BYTES, STAGE_ROWS, ChunkSource
from pallas_kernels.lora.pair_sum import PairSum
from pallas_kernels.lora.signals import put_back, wait_signals
from pallas_kernels.paged_attention.decode_schedule import sm_count

_CHUNK = 2
"""Tiles of A of a copy."""
_LEAST_STAGES = 2
"""Of a half of the input: a ring needs two slots, see FewRing.of."""
_WARPGROUPS = 2
_SHRINKS = _WARPGROUPS - 1
_PART = TILE_COLS // CLUSTER
"""Outputs of a stripe that a thread block of a pair writes."""


def unsupported(x, w, shrink: Geometry, expand: Geometry) -> str | None:
    """Why the kernel cannot take what `lora_add` can, or None if it can. w: [layers, in, out]."""
    if not TILE_RANKS <= x.shape[0] <= FEW_TOKENS or x.shape[0] % TILE_RANKS:
        return f"{x.shape[0]} tokens are not 8, 16, ..., {FEW_TOKENS}"
    if w.dtype != x.dtype:
        return f"weights are {w.dtype} and activations {x.dtype}"
    if shrink != expand:
        return "A and B are cut differently"
    if x.shape[1] < CLUSTER * _LEAST_STAGES * TILE_COLS:
        return f"an input of {x.shape[1]} is too narrow to be halved"
    if sm_count() < CLUSTER * CLUSTERS:
        return f"{sm_count()} multiprocessors cannot run {CLUSTER * CLUSTERS} thread blocks that wait for each other"
    return None


def _in_chunks(geometry: Geometry, stages: int, parts: int) -> bool:
    """Whether the parts of an input begin with a chunk of A, and no chunk lies in two pages."""
    half = ceil_div(stages, parts)
    return chunk_tiles(geometry, _CHUNK) == _CHUNK and half % _CHUNK == (stages - half) % _CHUNK == 0


def few_blocks(ranks: int) -> int:
    """Blocks of a module that has so many ranks: of each thread block's list the same number."""
    return CLUSTER * ceil_div(ranks, CLUSTER * STAGE_ROWS)


def few_matmul(x, w, pages, plan: FewPlan, layer, *, group: str, geometry: Geometry, interpret=None):
    """``x @ w[layer]`` and the deltas of the plan's adapters, bfloat16 [T, out]. layer: int32[1]."""
    pairs = len(GROUPS[group]) if interpret else CLUSTERS
    stripes, parts = Stripes.of(geometry, group, pairs), 1 if interpret else CLUSTER
    tiles = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=1, whole=not interpret)
    shared = SHARED_BYTES - 4 * stripes.width * FEW_TOKENS * _PART
    blocks, stages = plan.records.shape[2], x.shape[1] // TILE_COLS
    chunk = _CHUNK if _in_chunks(geometry, stages, parts) else 1
    chunks = dataclasses.replace(tiles, chunk=chunk)
    ring = FewRing.of(stripes.width, tiles, chunks, shared, stages // CLUSTER)
    shares = 1 if interpret else shares_of(stripes, blocks, stages // chunk)
    number = jnp.concatenate([layer, jnp.full(1, x.shape[0], jnp.int32)])
    of_plan = (plan.records, plan.ranks, plan.count, plan.page_ids, plan.signals)
    args = (x, w, tiles.view_of_pool(pages), *of_plan, number, chunks.view_of_pool(pages))
    rows = blocks * len(GROUPS[group]) * (shares * parts + 1) * FEW_TOKENS
    ys = jax.ShapeDtypeStruct((rows, STAGE_ROWS), x.dtype)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    options: dict[str, Any] = dict(ring=ring, stripes=stripes, shares=shares)
    with jax.named_scope("lora_matmul_few"):
        if interpret:
            return _launch(*args, **options, out=(out, ys), interpret=interpret)[0]
        options |= dict(out=(jax.ShapeDtypeStruct((FEW_TOKENS, w.shape[2]), x.dtype), ys))
        return any_rows(_launch, args, rows={0: FEW_TOKENS}, out=(out, ys), in_place=False, options=options)[0]


def _launch(*args, ring: FewRing, stripes: Stripes, shares: int, out, interpret=None):
    stages, dtype, width = args[0].shape[1] // TILE_COLS, out[0].dtype, stripes.width
    layers, blocks = args[3].shape[0], args[3].shape[2]
    pairs, parts = (len(stripes.parts), 1) if interpret else (CLUSTERS, CLUSTER)
    columns = TILE_COLS // parts

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
        a_pool,
        out_ref,
        ys,
        *,
        slots,
        a_tokens,
        a_slots,
        y_slot,
        results,
        full,
        empty,
        a_full,
        a_empty,
        has_y=None,
        a_asked=None,
        sent=None,
        taken=None,
    ):
        (slots, slot_tiles), (a_slots, a_tiles) = ring.tiles.views(slots), ring.chunks.views(a_slots)
        (a_tokens, _), (y_slot, _) = ring.tiles.views(a_tokens), ring.tiles.views(y_slot)
        wg, part, pair = lax.axis_index("wg"), 0 if interpret else lax.axis_index("part"), lax.axis_index("pair")
        mine = stripes.of_pair(pair)
        layer, tokens = number[0], number[1]
        half = jnp.int32(ceil_div(stages, parts))
        first = part * half
        count = jnp.minimum(stages - first, half)
        items = FewItems(
            stripes=mine,
            blocks=[counts[layer, m] for m in mine.modules],
            shares=shares,
            part=part,
            parts=parts,
            own=bool(interpret),
        )
        deltas = lax.div(items.blocks_of(mine.place), jnp.int32(parts))

        def y_signal(block):
            """Counts the parts of a block's y."""
            return items.signal(layer, layers, mine.module, block) + 1

        def wait_y(block):
            if interpret:
                plgpu.barrier_wait(has_y.at[block])
            else:
                wait_signals(signals, y_signal(block), shares)

        def done_with_y(block):
            if not interpret:
                put_back(signals, y_signal(block), shares + mine.users)

        @pl.when(wg == _WARPGROUPS)
        def load():
            plgpu.set_max_registers(88, action="decrease")

            @plgpu.warp_map
            def _(warp):
                FewLoad(
                    ring=ring,
                    warp=warp,
                    x=x_ref,
                    w=w_ref,
                    pool=pool,
                    records=records,
                    page_ids=page_ids,
                    ys=ys,
                    slots=slots,
                    slot_tiles=slot_tiles,
                    full=full,
                    empty=empty,
                    a_pool=a_pool,
                    a_tokens=a_tokens,
                    a_tiles=a_tiles,
                    a_full=a_full,
                    a_empty=a_empty,
                    a_asked=a_asked,
                    layer=layer,
                    tokens=tokens,
                    first=first,
                    count=count,
                    stripes=mine,
                    items=items,
                    deltas=deltas,
                    wait_y=wait_y,
                    done_with_y=done_with_y,
                ).run()

        def slot_of(stage):
            return lax.rem(stage, jnp.int32(ring.slots))

        def free(stage):
            plgpu.barrier_arrive(empty.at[slot_of(stage)])

        def products(user, number):
            """Of a pass: sums of the stripes, float32 [64, 64] each."""
            first_base, first_delta = mine.first_stages(number, count, deltas)

            def accumulate(*sums):
                def multiply(stage):
                    slot = slot_of(stage)
                    plgpu.barrier_wait(full[user].at[slot])
                    for i, total in enumerate(sums):
                        plgpu.wgmma(total, slots.at[ring.tokens(slot)], slots.at[ring.weights(slot, i)])

                def multiply_all(begin, length):
                    @pl.loop(0, length)
                    def _(k):
                        multiply(begin + k)
                        plgpu.wgmma_wait(ring.held * width)
                        pl.when(k >= ring.held)(lambda: free(begin + k - ring.held))

                    plgpu.wgmma_wait(0)
                    if ring.held:
                        pl.when(length > 0)(lambda: free(begin + length - 1))

                multiply_all(first_base, count)
                multiply_all(first_delta, deltas)
                return [total[...] for total in sums]

            return pl.run_scoped(accumulate, *[plgpu.ACC((FEW_TOKENS, TILE_COLS), jnp.float32)] * width)

        def write(i, value, stripe):
            """A stripe's outputs, or this thread block's half of them."""
            target = results[1].at[i]
            target[...] = value.astype(dtype)
            plgpu.commit_smem()
            outputs = pl.ds(stripe * TILE_COLS + part * columns, columns)

            def copy(row, size):
                rows = pl.ds(row if isinstance(row, int) else pl.multiple_of(row, TILE_RANKS), size)
                plgpu.copy_smem_to_gmem(target.at[rows], out_ref.at[rows, outputs])

            @pl.when(tokens == FEW_TOKENS)
            def _():
                copy(0, FEW_TOKENS)

            for size in TOKEN_PARTS:

                @pl.when((tokens < FEW_TOKENS) & (tokens & size != 0))
                def _(size=size):
                    copy(tokens & (FEW_TOKENS - 2 * size), size)

        def multiply_pass(user, number, stripe, stripe_count):
            found = products(user, number)
            if not interpret:
                if number:  # until both have taken what they got in the pass before
                    plgpu.barrier_wait(taken.at[(number - 1) % _WARPGROUPS])
                found = PairSum(parts=results[0], sent=sent.at[user], part=part).exchange(found, stripe_count)
            for i, value in enumerate(found):

                @pl.when(i < stripe_count)
                def _(i=i, value=value):
                    write(i, value, mine.first + stripe + i)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if not interpret and number + 1 < stripes.passes:
                following = mine.pass_of(number + 1)[1]
                pl.when(following > 0)(lambda: plgpu.barrier_arrive(taken.at[user]))

        def multiply(user):
            plgpu.set_max_registers(208, action="increase")
            if user == _SHRINKS:
                FewShrink(
                    ring=ring,
                    items=items,
                    ranks=ranks,
                    ys=ys,
                    signals=signals,
                    a_tokens=a_tokens,
                    a_slots=a_slots,
                    y_slot=y_slot,
                    a_full=a_full,
                    a_empty=a_empty,
                    has_y=has_y,
                    layer=layer,
                    layers=layers,
                    count=count,
                ).run()
            for number in range(user, stripes.passes, _WARPGROUPS):
                stripe, stripe_count = mine.pass_of(number)

                @pl.when(stripe_count > 0)
                def _(number=number, stripe=stripe, stripe_count=stripe_count):
                    multiply_pass(user, number, stripe, stripe_count)

        for user in range(_WARPGROUPS):

            @pl.when(wg == user)
            def _(user=user):
                multiply(user)

    body.__name__ = "lora_matmul_few"
    outputs = plgpu.SMEM((width, FEW_TOKENS, columns), dtype)
    scratch: dict[str, Any] = dict(
        **ring.types(dtype),
        results=plgpu.RefUnion(plgpu.SMEM((width, FEW_TOKENS, _PART), jnp.float32), outputs),
        full=tuple(plgpu.Barrier(num_arrivals=ring.arrivals, num_barriers=ring.slots) for _ in range(_WARPGROUPS)),
        empty=plgpu.Barrier(num_barriers=ring.slots),
    )
    options: dict[str, Any] = dict(grid=(pairs,))
    if interpret:
        scratch |= dict(results=(outputs, outputs), has_y=plgpu.Barrier(num_barriers=blocks))
    else:
        options |= dict(cluster=(CLUSTER,), cluster_names=("part",))
        scratch |= dict(
            a_asked=plgpu.Barrier(),
            sent=plgpu.Barrier(num_barriers=_WARPGROUPS),
            taken=plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=_WARPGROUPS),
        )
    return plgpu.kernel(
        body,
        out_type=out,
        grid_names=("pair",),
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        interpret=interpret,
        # commit_smem or sync_warpgroup stands wherever a thread reads what another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=not interpret),
        **options,
    )(*args)
