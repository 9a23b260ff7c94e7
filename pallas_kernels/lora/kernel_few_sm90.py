"""Hopper kernel of a base projection of up to 64 tokens with the deltas of few adapters: ``x W + y B`` in one.

Reading W takes the time of such a step, and whatever is a launch of its own comes on top. Here y goes on like more
columns of x, zero for tokens of other adapters, and B like more rows of W. A pair of thread blocks takes stripes of 64
outputs and halves the input between them, and the ranks. They add up through distributed shared memory, each half of
the outputs.

A is read once. A block of 64 ranks is shrunk by many pairs: each multiplies its share of the input, among the first
stages that it has, with W and with A. Their sums go to global memory, where each adds all of them up for a part of the
tokens. When the pairs are through with W, which takes longer, y has long been there.

A pair with many stripes goes through the input several times. Two warpgroups do so in turn, one while the other adds up
and writes; the second one also brings y together, while the first one goes on. A third fills the ring.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry, ceil_div
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import CLUSTER, CLUSTERS, FEW_TOKENS, MOST_FEW
from pallas_kernels.lora.few_items import FewItems, FewOrder, Shares
from pallas_kernels.lora.few_load import FewLoad
from pallas_kernels.lora.few_plan import FIRST, LAST, SCALE, FewPlan
from pallas_kernels.lora.few_ring import TOKEN_PARTS, FewRing
from pallas_kernels.lora.few_stripes import Stripes
from pallas_kernels.lora.mosaic_common import SHARED_BYTES, STAGE_ROWS, ChunkSource
from pallas_kernels.lora.pair_sum import PairSum
from pallas_kernels.lora.signals import await_signals, put_back, signal, wait_signals
from pallas_kernels.paged_attention.decode_schedule import sm_count

_WARPGROUPS = 2
_PART = TILE_COLS // CLUSTER
"""Outputs of a stripe that a thread block of a pair writes."""
_WGMMA = plgpu.Layout.WGMMA


def unsupported(x, w, shrink: Geometry, expand: Geometry, group: str) -> str | None:
    """Why the kernel cannot take what `lora_add` can, or None if it can. w: [layers, in, out]."""
    if not TILE_RANKS <= x.shape[0] <= FEW_TOKENS or x.shape[0] % TILE_RANKS:
        return f"{x.shape[0]} tokens are not 8, 16, ..., {FEW_TOKENS}"
    if w.dtype != x.dtype:
        return f"weights are {w.dtype} and activations {x.dtype}"
    if shrink != expand:
        return "A and B are cut differently"
    if x.shape[1] < CLUSTER * TILE_COLS:
        return f"an input of {x.shape[1]} is too narrow to be halved"
    ring, shares = _ring_and_shares(expand, group, x.shape[1], few_blocks(MOST_FEW))
    if shares.least_slots > ring.slots:
        return (
            f"an input of {x.shape[1]} is too wide for the pairs of thread blocks that {w.shape[2]} outputs keep busy"
        )
    if sm_count() < CLUSTER * CLUSTERS:
        return f"{sm_count()} multiprocessors cannot run {CLUSTER * CLUSTERS} thread blocks that wait for each other"
    return None


def few_blocks(ranks: int) -> int:
    """Blocks of a module that has so many ranks: of each thread block's list the same number."""
    return CLUSTER * ceil_div(ranks, CLUSTER * STAGE_ROWS)


def _ring_and_shares(geometry: Geometry, group: str, columns: int, blocks: int, num_pages=1, interpret=None):
    stripes = Stripes.of(geometry, group, len(GROUPS[group]) if interpret else CLUSTERS)
    tiles = ChunkSource(geometry=geometry, num_pages=num_pages, chunk=1, whole=not interpret)
    ring = FewRing.of(stripes.width, tiles, SHARED_BYTES - 4 * stripes.width * FEW_TOKENS * _PART)
    stages = columns // TILE_COLS
    if not interpret:
        return ring, Shares.of(stripes, blocks, stages)
    shares = Shares.of_one(blocks, stages, stripes.width)
    return dataclasses.replace(ring, slots=max(ring.slots, shares.least_slots)), shares


def few_matmul(x, w, pages, plan: FewPlan, layer, *, group: str, geometry: Geometry, interpret=None):
    """``x @ w[layer]`` and the deltas of the plan's adapters, bfloat16 [T, out]. layer: int32[1]."""
    stripes = Stripes.of(geometry, group, len(GROUPS[group]) if interpret else CLUSTERS)
    parts, blocks = 1 if interpret else CLUSTER, plan.records.shape[2]
    ring, shares = _ring_and_shares(geometry, group, x.shape[1], blocks, pages.shape[1], interpret)
    assert shares.least_slots <= ring.slots, "see unsupported"
    number = jnp.concatenate([layer, jnp.full(1, x.shape[0], jnp.int32)])
    args = (
        x,
        w,
        ring.tiles.view_of_pool(pages),
        plan.records,
        plan.ranks,
        plan.count,
        plan.page_ids,
        plan.signals,
        number,
    )
    rows = blocks * len(GROUPS[group]) * (shares.count * parts + 1) * FEW_TOKENS
    ys = jax.ShapeDtypeStruct((rows, STAGE_ROWS), x.dtype)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    options: dict[str, Any] = dict(ring=ring, stripes=stripes, shares=shares)
    with jax.named_scope("lora_matmul_few"):
        if interpret:
            return _launch(*args, **options, out=(out, ys), interpret=interpret)[0]
        options |= dict(out=(jax.ShapeDtypeStruct((FEW_TOKENS, w.shape[2]), x.dtype), ys))
        return any_rows(_launch, args, rows={0: FEW_TOKENS}, out=(out, ys), in_place=False, options=options)[0]


def _launch(*args, ring: FewRing, stripes: Stripes, shares: Shares, out, interpret=None):
    stages, dtype, width = args[0].shape[1] // TILE_COLS, out[0].dtype, stripes.width
    layers, blocks = args[3].shape[0], args[3].shape[2]
    pairs, parts = (len(stripes.parts), 1) if interpret else (CLUSTERS, CLUSTER)
    columns, summands = TILE_COLS // parts, shares.count * parts

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
        slots,
        results,
        full,
        empty,
        cleared,
        shrunk,
        has_y=None,
        sent=None,
        taken=None,
    ):
        slots, slot_tiles = ring.tiles.views(slots)
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
            pair=pair,
            part=part,
            parts=parts,
            own=bool(interpret),
        )
        order = FewOrder.of(items, count, ring.slots)
        deltas = lax.div(items.blocks_of(mine.place), jnp.int32(parts))

        def y_signal(block):
            """Counts the parts of a block's y."""
            return items.signal(layer, layers, mine.module, block) + 1

        def wait_y(block):
            if interpret:
                plgpu.barrier_wait(has_y.at[block])
            else:
                wait_signals(signals, y_signal(block), summands)

        def done_with_y(block):
            if not interpret:
                put_back(signals, y_signal(block), summands + mine.users)

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
                    layer=layer,
                    tokens=tokens,
                    first=first,
                    order=order,
                    stripes=mine,
                    items=items,
                    deltas=deltas,
                    wait_slots=lambda: plgpu.barrier_wait(cleared),
                    wait_y=wait_y,
                    done_with_y=done_with_y,
                ).run()

        def slot_of(stage):
            return lax.rem(stage, jnp.int32(ring.slots))

        def free(stage):
            plgpu.barrier_arrive(empty.at[slot_of(stage)])

        def operand(user, stage):
            """The activations or y of a stage that has come."""
            slot = slot_of(stage)
            plgpu.barrier_wait(full[user].at[slot])
            return slots.at[ring.tokens(slot)]

        def multiply_stages(user, first, stages, multiply):
            """``multiply(x, slot, k)``, which says how many products it begins, for so many stages. Each is freed when
            the next one's have begun.
            """

            @pl.loop(0, stages)
            def _(k):
                plgpu.wgmma_wait(multiply(operand(user, first + k), slot_of(first + k), k))
                pl.when(k > 0)(lambda: free(first + k - 1))

            plgpu.wgmma_wait(0)
            pl.when(stages > 0)(lambda: free(first + stages - 1))

        def a_slot(j, i=0):
            """Of the pair's j-th item: the i-th slot's number. The first one's first tile will be its y."""
            return order.blind + j * shares.slots + i

        def shrink(user, multiply, totals):
            """The stages of the pair's share, whose activations are multiplied with A as well."""
            for j in range(len(totals)):
                for i in range(shares.slots):
                    wait = functools.partial(plgpu.barrier_wait, full[user].at[slot_of(a_slot(j, i))])
                    pl.when(j < items.count)(wait)

            def multiply_both(x, slot, k):
                started = multiply(x, slot, k)
                i, tile = ring.a_tile(k)
                for j, total in enumerate(totals):

                    def with_a(_, j=j, total=total):
                        a = slots.at[ring.rows(slot_of(a_slot(j, i)), tile)]
                        plgpu.wgmma(total, x, a.T)

                    if len(totals) == 1:
                        with_a(0)
                    else:  # an accumulator passes no condition
                        pl.loop(0, jnp.where(j < items.count, 1, 0))(with_a)
                return started + 1 if len(totals) == 1 else 0

            multiply_stages(user, order.ring(order.blind), order.shared, multiply_both)
            for j, total in enumerate(totals):
                found = total[...].astype(dtype)

                @pl.when(j < items.count)
                def _(j=j, found=found):
                    slots.at[ring.tokens(slot_of(a_slot(j)))][...] = found
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(shrunk.at[j])
                    for i in range(1, shares.slots):
                        free(a_slot(j, i))

        def hand_on(j):
            """Writes the sums of the pair's j-th item, zero for tokens that are not their adapter's."""
            item = items.item(j)
            its_ranks = ranks.at[layer, item.module, item.block]
            load = lambda row: plgpu.load(its_ranks.at[row], layout=_WGMMA.reduce(0), optimized=False)  # noqa: E731
            shape = (FEW_TOKENS, STAGE_ROWS)
            vectors = [lax.broadcast_in_dim(load(row), shape, (1,)) for row in (FIRST, LAST, SCALE)]
            plgpu.barrier_wait(shrunk.at[j])
            y = slots.at[ring.tokens(slot_of(a_slot(j)))]
            found = plgpu.load(y, layout=_WGMMA).astype(jnp.float32)
            first, last, scale = vectors
            token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_WGMMA).astype(jnp.float32)
            y[...] = jnp.where((token >= first) & (token < last), found * scale, 0.0).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y, ys.at[items.y_rows(item.place, item.block, items.summand(item.share))])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            free(a_slot(j))
            plgpu.wait_smem_to_gmem(0)
            if not interpret:
                signal(signals, items.signal(layer, layers, item.module, item.block))

        def add_up(j):
            """Some tokens' y of the block of the pair's j-th item."""
            item = items.item(j)
            signal_of = items.signal(layer, layers, item.module, item.block)
            if not interpret:
                await_signals(signals, signal_of, summands)
            size = FEW_TOKENS // summands

            def rows(summand):
                first = items.y_row(item.place, item.block, summand) + items.summand(item.share) * size
                return pl.ds(first, size)

            total = sum(ys[rows(summand), :].astype(jnp.float32) for summand in range(summands))
            ys[rows(summands), :] = total.astype(dtype)
            if interpret:
                plgpu.barrier_arrive(has_y.at[item.block])
            else:
                signal(signals, signal_of + 1)

        def clear():
            """What no weights are copied to before B is."""

            @pl.loop(order.blind, ring.slots)
            def _(slot):
                for i in range(width):
                    nothing = jnp.zeros((STAGE_ROWS, TILE_COLS), dtype)
                    slots.at[ring.weights(slot, i)][...] = plgpu.layout_cast(nothing, _WGMMA)

            plgpu.commit_smem()
            plgpu.barrier_arrive(cleared)

        def products(user, number):
            """Of a pass: sums of the stripes, float32 [64, 64] each."""
            begin = order.a_slots + number * (count + deltas)

            def accumulate(*sums):
                sums, totals = sums[:width], sums[width:]

                def multiply(x, slot, _):
                    for i, total in enumerate(sums):
                        plgpu.wgmma(total, x, slots.at[ring.weights(slot, i)])
                    return width

                if number == 0:
                    multiply_stages(user, jnp.int32(0), order.blind, multiply)
                    shrink(user, multiply, totals)
                    rest = order.blind + order.shared
                    multiply_stages(user, order.ring(rest), count - rest, multiply)
                else:
                    multiply_stages(user, begin, count, multiply)

                @pl.loop(0, deltas)
                def _(n):
                    stage = begin + count + n
                    multiply(operand(user, stage), slot_of(stage), n)
                    plgpu.wgmma_wait(0)
                    free(stage)

                return [total[...] for total in sums]

            accumulators = [plgpu.ACC((FEW_TOKENS, TILE_COLS), jnp.float32)] * width
            if number == 0:
                accumulators += [plgpu.ACC((FEW_TOKENS, STAGE_ROWS), jnp.float32)] * shares.most_each
            return pl.run_scoped(accumulate, *accumulators)

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
            if user:
                clear()
                for step in (hand_on, add_up):
                    for j in range(shares.most_each):
                        pl.when(j < items.count)(functools.partial(step, j))
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
        cleared=plgpu.Barrier(),
        shrunk=plgpu.Barrier(num_barriers=shares.most_each),
    )
    options: dict[str, Any] = dict(grid=(pairs,))
    if interpret:
        scratch |= dict(results=(outputs, outputs), has_y=plgpu.Barrier(num_barriers=blocks))
    else:
        options |= dict(cluster=(CLUSTER,), cluster_names=("part",))
        scratch |= dict(
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
