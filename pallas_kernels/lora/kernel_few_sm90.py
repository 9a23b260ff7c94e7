"""Hopper kernel of a base projection of up to 64 tokens with the deltas of few adapters: ``x W + y B`` in one.

Reading W takes the time of such a step, and whatever is a launch of its own comes on top. Here the ranks of all
adapters go side by side through the same loop as W: each stage of columns of x is multiplied with W and with A. Then y,
zero for tokens of other adapters, goes on like more columns of x, and B like more rows of W. A pair of thread blocks
takes stripes of 64 outputs and halves the input between them: each multiplies what it has of y with all of B, because
the sum of both is then that of the whole input. They add up through distributed shared memory, each half of the
outputs.

A pair with many stripes goes through the input several times. Two warpgroups do so in turn, one while the other adds up
and writes; a third fills the ring.
"""

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import CLUSTER, CLUSTERS, FEW_TOKENS, MOST_FEW
from pallas_kernels.lora.few_load import FewLoad
from pallas_kernels.lora.few_plan import FIRST, LAST, SCALE, FewPlan
from pallas_kernels.lora.few_ring import HALVES, TOKEN_PARTS, FewRing, delta_stages
from pallas_kernels.lora.few_stripes import Stripes
from pallas_kernels.lora.mosaic_common import SHARED_BYTES, STAGE_ROWS, ChunkSource, ceil_div
from pallas_kernels.lora.pair_sum import PairSum

_LEAST_SLOTS = 2
"""A slot is freed when the next one's products have begun."""
_WARPGROUPS = 2
_PART = TILE_COLS // CLUSTER
"""Outputs of a stripe that a thread block of a pair writes."""
_INTERPRETED_PAIRS = 3
_WGMMA = plgpu.Layout.WGMMA


def unsupported(x, w, shrink: Geometry, expand: Geometry) -> str | None:
    """Why the kernel cannot take what `lora_add` can, or None if it can. w: [layers, in, out]."""
    if not TILE_RANKS <= x.shape[0] <= FEW_TOKENS or x.shape[0] % TILE_RANKS:
        return f"{x.shape[0]} tokens are not 8, 16, ..., {FEW_TOKENS}"
    if w.dtype != x.dtype:
        return f"weights are {w.dtype} and activations {x.dtype}"
    if shrink != expand:
        return "A and B are cut differently"
    if x.shape[1] < CLUSTER * _LEAST_SLOTS * TILE_COLS:
        return f"an input of {x.shape[1]} is too narrow to be halved"
    return None


def few_matmul(x, w, pages, plan: FewPlan, layer, *, group: str, geometry: Geometry, interpret=None):
    """``x @ w[layer]`` and the deltas of the plan's adapters, bfloat16 [T, out]. layer: int32[1]."""
    stripes = Stripes.of(geometry, group, _INTERPRETED_PAIRS if interpret else CLUSTERS)
    tiles = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=1, whole=not interpret)
    shared = SHARED_BYTES - 4 * stripes.width * FEW_TOKENS * _PART
    ring = FewRing.of(stripes.width, tiles, shared, x.shape[1] // TILE_COLS // CLUSTER)
    number, index = jnp.concatenate([layer, jnp.full(1, x.shape[0], jnp.int32)]), list(GROUPS).index(group)
    places = plan.a_tiles[index], plan.b_tiles[index]
    args = (x, w, tiles.view_of_pool(pages), *places, plan.count, plan.ranks, number)
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    options: dict[str, Any] = dict(ring=ring, stripes=stripes)
    with jax.named_scope("lora_matmul_few"):
        if interpret:
            return _launch(*args, **options, out=out, interpret=interpret)
        options |= dict(out=jax.ShapeDtypeStruct((FEW_TOKENS, w.shape[2]), x.dtype))
        return any_rows(_launch, args, rows={0: FEW_TOKENS}, out=(out,), in_place=False, options=options)[0]


def _launch(*args, ring: FewRing, stripes: Stripes, out, interpret=None):
    stages, dtype, width = args[0].shape[1] // TILE_COLS, out.dtype, stripes.width
    parts = 1 if interpret else CLUSTER
    columns = TILE_COLS // parts
    users = min(stripes.passes, _WARPGROUPS)

    def body(
        x_ref,
        w_ref,
        pool,
        a_tiles,
        b_tiles,
        counts,
        ranks,
        number,
        out_ref,
        *,
        x_ring,
        w_ring,
        a_ring,
        known,
        results,
        full,
        empty,
        has_known,
        has_y,
        sent=None,
        free=None,
    ):
        w_operand, w_tiles = ring.tiles.views(w_ring)
        a_operand, a_target = ring.tiles.views(a_ring)
        wg, part = lax.axis_index("wg"), 0 if interpret else lax.axis_index("part")
        mine = stripes.of_pair(lax.axis_index("pair"))
        layer, tokens = number[0], number[1]
        granules = counts[layer, mine.module]
        half = ceil_div(jnp.int32(stages), parts)
        first = part * half
        count = jnp.minimum(stages - first, half)
        each, slots = count + delta_stages(granules), ring.slots(granules)

        @pl.when(wg == _WARPGROUPS)
        def load():
            plgpu.set_max_registers(56, action="decrease")

            @plgpu.warp_map
            def _(warp):
                FewLoad(
                    ring=ring,
                    warp=warp,
                    x=x_ref,
                    w=w_ref,
                    pool=pool,
                    a_tiles=a_tiles,
                    b_tiles=b_tiles,
                    ranks=ranks,
                    x_ring=x_ring,
                    w_ring=w_operand,
                    w_tiles=w_tiles,
                    a_ring=a_target,
                    known=known,
                    full=full,
                    empty=empty,
                    has_known=has_known,
                    layer=layer,
                    tokens=tokens,
                    first=first,
                    count=count,
                    granules=granules,
                    stripes=mine,
                ).run()

        def y_of(total, half):
            """Zero for tokens that are not their adapter's."""

            def of_ranks(row):
                vector = known.at[row, pl.ds(half * STAGE_ROWS, STAGE_ROWS)]
                vector = plgpu.load(vector, layout=_WGMMA.reduce(0), optimized=False)
                return lax.broadcast_in_dim(vector, total.shape, (1,))

            token = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=_WGMMA).astype(jnp.float32)
            own = (token >= of_ranks(FIRST)) & (token < of_ranks(LAST))
            return jnp.where(own, total * of_ranks(SCALE), 0.0).astype(dtype)

        def products(user, number):
            """Of a pass: sums of the stripes, float32 [64, 64] each. The first one leaves y where A was."""

            def slot_of(k):
                return lax.rem(number * each + k, slots)

            def free_slot(k):
                plgpu.barrier_arrive(empty.at[slot_of(k)])

            def accumulate(*acc):
                sums, y = acc[:width], acc[width:]

                def multiply_stages(halves):
                    """With W, and so many halves of the ranks of A."""

                    @pl.loop(0, count)
                    def _(k):
                        slot = slot_of(k)
                        plgpu.barrier_wait(full[user].at[slot])
                        x = x_ring.at[ring.tokens(slot)]
                        for i, total in enumerate(sums):
                            plgpu.wgmma(total, x, w_operand.at[ring.weights(slot, i)])
                        for h in range(halves):
                            plgpu.wgmma(y[h], x, a_operand.at[ring.ranks(slot, granules, h)].T)
                        plgpu.wgmma_wait(width + halves)
                        pl.when(k > 0)(lambda: free_slot(k - 1))

                    plgpu.wgmma_wait(0)

                if number == 0:
                    # One of two loops, each inside one, because a condition has no accumulator.
                    both = delta_stages(granules) - 1
                    pl.loop(both, 1)(lambda _: multiply_stages(1))
                    pl.loop(0, both)(lambda _: multiply_stages(HALVES))
                else:
                    multiply_stages(0)
                free_slot(count - 1)
                for h, total in enumerate(y):
                    a_operand[ring.y(h)] = y_of(total[...], h)
                if number == 0:
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(has_y)
                if number == 1:
                    plgpu.barrier_wait(has_y)

                def add_deltas(h):
                    slot = slot_of(count + h)
                    plgpu.barrier_wait(full[user].at[slot])
                    for i, total in enumerate(sums):
                        plgpu.wgmma(total, a_operand.at[ring.y(h)], w_operand.at[ring.weights(slot, i)])
                    plgpu.wgmma_wait(0)
                    free_slot(count + h)

                add_deltas(0)

                # a loop, because a condition has no accumulator
                @pl.loop(1, delta_stages(granules))
                def _(_):
                    add_deltas(1)

                return [total[...] for total in sums]

            kinds = [plgpu.ACC((FEW_TOKENS, TILE_COLS), jnp.float32)] * width
            kinds += [plgpu.ACC((FEW_TOKENS, STAGE_ROWS), jnp.float32)] * (HALVES * (number == 0))
            return pl.run_scoped(accumulate, *kinds)

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

        def multiply_pass(user, number, begin, stripe_count):
            if number == 0:
                plgpu.barrier_wait(has_known)
            found = products(user, number)
            if not interpret:
                if number:  # until both have taken what they got in the pass before
                    plgpu.barrier_wait(free.at[(number - 1) % users])
                found = PairSum(parts=results[0], sent=sent.at[user], part=part).exchange(found, stripe_count)
            for i, value in enumerate(found):

                @pl.when(i < stripe_count)
                def _(i=i, value=value):
                    write(i, value, mine.first + begin + i)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if not interpret and number + 1 < stripes.passes:
                following = mine.pass_of(number + 1)[1]
                pl.when(following > 0)(lambda: plgpu.barrier_arrive(free.at[user]))

        def multiply(user):
            plgpu.set_max_registers(224, action="increase")
            for number in range(user, stripes.passes, users):
                begin, stripe_count = mine.pass_of(number)

                @pl.when(stripe_count > 0)
                def _(number=number, begin=begin, stripe_count=stripe_count):
                    multiply_pass(user, number, begin, stripe_count)

        for user in range(users):

            @pl.when(wg == user)
            def _(user=user):
                multiply(user)

    body.__name__ = "lora_matmul_few"
    outputs = plgpu.SMEM((width, FEW_TOKENS, columns), dtype)
    scratch: dict[str, Any] = dict(
        **ring.types(dtype),
        known=plgpu.SMEM((3, MOST_FEW), jnp.float32),
        results=plgpu.RefUnion(plgpu.SMEM((width, FEW_TOKENS, _PART), jnp.float32), outputs),
        full=tuple(plgpu.Barrier(num_arrivals=ring.arrivals, num_barriers=ring.most) for _ in range(users)),
        empty=plgpu.Barrier(num_barriers=ring.most),
        has_known=plgpu.Barrier(),
        has_y=plgpu.Barrier(),
    )
    options: dict[str, Any] = dict(grid=(CLUSTERS,), cluster=(CLUSTER,), cluster_names=("part",))
    if interpret:
        options = dict(grid=(_INTERPRETED_PAIRS,))
        scratch |= dict(results=(outputs, outputs))
    else:
        scratch |= dict(
            sent=plgpu.Barrier(num_barriers=users),
            free=plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=users),
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
