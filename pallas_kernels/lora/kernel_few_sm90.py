"""Hopper kernel of a base projection of up to 64 tokens with the deltas of few adapters: ``x W + y B`` in one.

Reading W takes the time of such a step, and whatever is a launch of its own comes on top. Here y goes on like more
columns of x, zero for tokens of other adapters, and B like more rows of W. A pair of thread blocks takes stripes of 64
outputs and halves the input between them: each has a y of its half, because the sum of both is that of the whole. They
add up through distributed shared memory, each half of the outputs.

A is read once: a quarter of a block of 64 ranks is shrunk by one pair, beside its stripes, which writes that y to
global memory and says so. When the others are through with W, which takes longer, y has long been there.

A pair with many stripes goes through the input several times. Two warpgroups do so in turn, one while the other adds up
and writes; the second one also shrinks. A third fills the ring.
"""

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import CLUSTER, CLUSTERS, FEW_TOKENS
from pallas_kernels.lora.few_items import FewItems
from pallas_kernels.lora.few_load import FewLoad
from pallas_kernels.lora.few_plan import FIRST, LAST, SCALE, FewPlan
from pallas_kernels.lora.few_ring import TOKEN_PARTS, FewRing
from pallas_kernels.lora.few_stripes import Stripes
from pallas_kernels.lora.mosaic_common import SHARED_BYTES, STAGE_CHUNKS, STAGE_ROWS, ChunkSource, ceil_div
from pallas_kernels.lora.pair_sum import PairSum
from pallas_kernels.lora.signals import signal, wait_signals
from pallas_kernels.paged_attention.decode_schedule import sm_count

_LEAST_STAGES = 3
"""Of a half of the input: a ring needs two slots, see FewRing.of."""
_WARPGROUPS = 2
_SHRINKS = _WARPGROUPS - 1
_PART = TILE_COLS // CLUSTER
"""Outputs of a stripe that a thread block of a pair writes."""
_WGMMA = plgpu.Layout.WGMMA


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


def few_matmul(x, w, pages, plan: FewPlan, layer, *, group: str, geometry: Geometry, interpret=None):
    """``x @ w[layer]`` and the deltas of the plan's adapters, bfloat16 [T, out]. layer: int32[1]."""
    pairs = len(GROUPS[group]) if interpret else CLUSTERS
    stripes, parts = Stripes.of(geometry, group, pairs), 1 if interpret else CLUSTER
    tiles = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=1, whole=not interpret)
    shared = SHARED_BYTES - 4 * stripes.width * FEW_TOKENS * _PART
    ring = FewRing.of(stripes.width, tiles, shared, x.shape[1] // TILE_COLS // CLUSTER)
    number = jnp.concatenate([layer, jnp.full(1, x.shape[0], jnp.int32)])
    args = (x, w, tiles.view_of_pool(pages), plan.records, plan.ranks, plan.count, plan.page_ids, plan.signals, number)
    most = plan.records.shape[2] * len(GROUPS[group]) * ring.quarters
    assert interpret or most <= CLUSTERS, "more blocks of ranks than there are pairs to shrink them"
    ys = jax.ShapeDtypeStruct((most * parts * FEW_TOKENS, STAGE_ROWS), x.dtype)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    options: dict[str, Any] = dict(ring=ring, stripes=stripes)
    with jax.named_scope("lora_matmul_few"):
        if interpret:
            return _launch(*args, **options, out=(out, ys), interpret=interpret)[0]
        options |= dict(out=(jax.ShapeDtypeStruct((FEW_TOKENS, w.shape[2]), x.dtype), ys))
        return any_rows(_launch, args, rows={0: FEW_TOKENS}, out=(out, ys), in_place=False, options=options)[0]


def _launch(*args, ring: FewRing, stripes: Stripes, out, interpret=None):
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
        out_ref,
        ys,
        *,
        x_ring,
        w_ring,
        results,
        full,
        empty,
        has_y=None,
        sent=None,
        taken=None,
    ):
        w_operand, w_tiles = ring.tiles.views(w_ring)
        wg, part, pair = lax.axis_index("wg"), 0 if interpret else lax.axis_index("part"), lax.axis_index("pair")
        mine = stripes.of_pair(pair)
        layer, tokens = number[0], number[1]
        half = ceil_div(jnp.int32(stages), parts)
        first = part * half
        count = jnp.minimum(stages - first, half)
        items = FewItems(
            stripes=mine,
            blocks=[ceil_div(counts[layer, m], STAGE_CHUNKS) for m in mine.modules],
            quarters=ring.quarters,
            most=blocks * len(stripes.parts) * ring.quarters,
            pair=pair,
            pairs=pairs,
            part=part,
            parts=parts,
            own=bool(interpret),
        )
        deltas, ahead = items.blocks_of(mine.place), items.ahead(ring.slots, count)
        each = count + deltas * ring.quarters

        def signal_of(module, block):
            return items.signal(layer, layers, module, block)

        def wait_y(module, block):
            if interpret:
                plgpu.barrier_wait(has_y.at[block])
            else:
                wait_signals(signals, signal_of(module, block), ring.quarters)

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
                    x_ring=x_ring,
                    w_ring=w_operand,
                    w_tiles=w_tiles,
                    full=full,
                    empty=empty,
                    layer=layer,
                    tokens=tokens,
                    first=first,
                    count=count,
                    stripes=mine,
                    items=items,
                    wait_y=wait_y,
                ).run()

        def slot_of(stage):
            return lax.rem(stage, jnp.int32(ring.slots))

        def free(stage):
            plgpu.barrier_arrive(empty.at[slot_of(stage)])

        def operand(user, stage):
            """The activations or y of a stage that has come."""
            slot = slot_of(stage)
            plgpu.barrier_wait(full[user].at[slot])
            return x_ring.at[ring.tokens(slot)]

        def multiply_stages(user, first, stages, multiply):
            """``multiply(x, slot)``, which says how many products it begins, for so many stages. Each is freed when the
            next one's have begun, and the last one, if there is one, is not.
            """

            @pl.loop(0, stages)
            def _(k):
                plgpu.wgmma_wait(multiply(operand(user, first + k), slot_of(first + k)))
                pl.when(k > 0)(lambda: free(first + k - 1))

            plgpu.wgmma_wait(0)

        def y_of(total, ranks):
            """Zero for tokens that are not their adapter's."""
            first, last, scale = (lax.broadcast_in_dim(vector, total.shape, (1,)) for vector in ranks)
            token = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=_WGMMA).astype(jnp.float32)
            return jnp.where((token >= first) & (token < last), total * scale, 0.0).astype(dtype)

        def shrink(j, begin):
            """The pair's j-th item, whose stages begin there. Returns where they end."""
            item = items.item(j)
            _, stages = items.stages(item.quarter, count)
            its_ranks = ranks.at[layer, item.module, item.block]
            load = lambda row: plgpu.load(its_ranks.at[row], layout=_WGMMA.reduce(0), optimized=False)  # noqa: E731
            vectors = [load(row) for row in (FIRST, LAST, SCALE)]

            def accumulate(total):
                def multiply(x, slot):
                    plgpu.wgmma(total, x, w_operand.at[ring.weights(slot, 0)].T)
                    return 1

                multiply_stages(_SHRINKS, begin, stages, multiply)
                return total[...]

            total = pl.run_scoped(accumulate, plgpu.ACC((FEW_TOKENS, STAGE_ROWS), jnp.float32))
            y = x_ring.at[ring.tokens(slot_of(begin + stages - 1))]
            y[...] = y_of(total, vectors)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y, ys.at[items.y_rows(item.place, item.block, item.quarter)])
            plgpu.wait_smem_to_gmem(0)
            if interpret:
                plgpu.barrier_arrive(has_y.at[item.block])
            else:
                signal(signals, signal_of(item.module, item.block))
            free(begin + stages - 1)
            return begin + stages

        def products(user, number, before):
            """Of a pass: sums of the stripes, float32 [64, 64] each. before: stages of the pair's items."""
            begin = before + number * each
            parts = [(begin, count)] if number else [(jnp.int32(0), ahead), (before + ahead, count - ahead)]

            def accumulate(*sums):
                def multiply(x, slot):
                    for i, total in enumerate(sums):
                        plgpu.wgmma(total, x, w_operand.at[ring.weights(slot, i)])
                    return width

                for first, stages in parts:  # what stands between them must not wait for the last one
                    multiply_stages(user, first, stages, multiply)

                    @pl.when(stages > 0)
                    def _(first=first, stages=stages):
                        free(first + stages - 1)

                @pl.loop(0, deltas)
                def _(n):
                    first = begin + count + n * ring.quarters
                    for q in range(ring.quarters):
                        multiply(operand(user, first + q), slot_of(first))
                    plgpu.wgmma_wait(0)
                    for q in range(ring.quarters):
                        free(first + q)

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

        def multiply_pass(user, number, before, stripe, stripe_count):
            found = products(user, number, before)
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
            skip = lambda j, begin: begin + items.stages(items.item(j).quarter, count)[1]  # noqa: E731
            begin = lax.fori_loop(0, items.count, shrink if user == _SHRINKS else skip, ahead)
            for number in range(user, stripes.passes, _WARPGROUPS):
                stripe, stripe_count = mine.pass_of(number)

                @pl.when(stripe_count > 0)
                def _(number=number, stripe=stripe, stripe_count=stripe_count):
                    multiply_pass(user, number, begin - ahead, stripe, stripe_count)

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
        scratch |= dict(
            results=(outputs, outputs), has_y=plgpu.Barrier(num_arrivals=ring.quarters, num_barriers=blocks)
        )
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
