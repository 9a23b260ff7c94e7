"""Hopper kernel of a base projection of up to 64 tokens with the deltas of few adapters: ``x W + y B`` in one.

Reading W takes the time of such a step, and whatever is a launch of its own comes on top. Here the ranks of all
adapters go side by side through the same loop as W: each stage of columns of x is multiplied with W and with A. Then y,
zero for tokens of other adapters, goes on like more columns of x, and B like more rows of W. A pair of thread blocks
takes stripes of 64 outputs and halves the input between them: each multiplies what it has of y with all of B, because
the sum of both is then that of the whole input. They add up through distributed shared memory, each half of the
outputs.

Two warpgroups multiply in turn, one while the other adds up and writes; a third fills the ring.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import CLUSTER, CLUSTERS, FEW_TOKENS, MOST_FEW, chunk_tiles
from pallas_kernels.lora.few_load import FewLoad, FewRing, delta_stages
from pallas_kernels.lora.few_plan import FewPlan
from pallas_kernels.lora.few_stripes import Stripes
from pallas_kernels.lora.mosaic_common import SHARED_BYTES, STAGE_ROWS, ChunkSource, ceil_div
from pallas_kernels.lora.pair_sum import PairSum

_MOST_SLOTS = 6
_WARPGROUPS = 2
_HALVES = MOST_FEW // STAGE_ROWS
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
    if x.shape[1] < CLUSTER * TILE_COLS:
        return f"an input of {x.shape[1]} is too narrow to be halved"
    return None


def few_matmul(x, w, pages, plan: FewPlan, layer, *, group: str, geometry: Geometry, interpret=None):
    """``x @ w[layer]`` and the deltas of the plan's adapters, bfloat16 [T, out]. layer: int32[1]."""
    stripes = Stripes.of(geometry, group, _INTERPRETED_PAIRS if interpret else CLUSTERS)
    ring = _ring(stripes, geometry, pages.shape[1], group, interpret)
    number, index = jnp.concatenate([layer, jnp.full(1, x.shape[0], jnp.int32)]), list(GROUPS).index(group)
    pools = ring.a.view_of_pool(pages), ring.b.view_of_pool(pages)
    args = (
        x,
        w,
        *pools,
        plan.a_tiles[index],
        plan.b_tiles[index],
        plan.count,
        plan.first,
        plan.last,
        plan.scale,
        number,
    )
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)
    options = dict(ring=ring, stripes=stripes)
    with jax.named_scope("lora_matmul_few"):
        if interpret:
            return _launch(*args, **options, out=out, interpret=interpret)
        largest = jax.ShapeDtypeStruct((FEW_TOKENS, w.shape[2]), x.dtype)
        return any_rows(
            _launch, args, rows={0: FEW_TOKENS}, out=(out,), in_place=False, options=options | dict(out=largest)
        )[0]


def _ring(stripes: Stripes, geometry: Geometry, num_pages: int, group: str, interpret) -> FewRing:
    """Stages of narrow outputs are two tiles deep where tiles lie side by side: half as many copies of the same."""
    in_tiles = geometry.in_tiles(GROUPS[group][0])
    depth = 2 if stripes.width == 1 and chunk_tiles(geometry, 2) == 2 and in_tiles >= 2 * CLUSTER else 1
    options = dict(geometry=geometry, num_pages=num_pages, whole=not interpret)
    sums = min(stripes.passes, _WARPGROUPS) * stripes.width * FEW_TOKENS * _PART * (4 + 2)
    slots = min(_MOST_SLOTS, (SHARED_BYTES - sums) // FewRing.slot_bytes(depth, stripes.width))
    return FewRing(
        # No slot has B before it had base weights: what B does not fill must be finite.
        slots=min(slots, in_tiles // depth // CLUSTER),
        depth=depth,
        width=stripes.width,
        a=ChunkSource(chunk=depth, **options),
        b=ChunkSource(chunk=1, **options),
    )


def _launch(*args, ring: FewRing, stripes: Stripes, out, interpret=None):
    x, dtype, width = args[0], out.dtype, stripes.width
    stages = x.shape[1] // ring.columns
    parts = 1 if interpret else CLUSTER
    columns = TILE_COLS // parts
    users = min(stripes.passes, _WARPGROUPS)

    def body(
        x_ref,
        w_ref,
        a_pool,
        b_pool,
        a_tiles,
        b_tiles,
        counts,
        first_ref,
        last_ref,
        scale_ref,
        number,
        out_ref,
        *,
        x_ring,
        w_ring,
        a_ring,
        sums,
        c,
        full,
        empty,
        sent=None,
        free=None,
        y_smem=None,
    ):
        w_operand, w_tiles = ring.b.views(w_ring)
        a_operand, a_target = ring.a.views(a_ring)
        wg, part = lax.axis_index("wg"), 0 if interpret else lax.axis_index("part")
        mine = stripes.of_pair(lax.axis_index("pair"))
        layer, tokens = number[0], number[1]
        granules = counts[layer, mine.module]
        half = ceil_div(jnp.int32(stages), parts)
        first = part * half
        count = jnp.minimum(stages - first, half)
        each = count + delta_stages(granules)

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
                    a_pool=a_pool,
                    b_pool=b_pool,
                    a_tiles=a_tiles,
                    b_tiles=b_tiles,
                    x_ring=x_ring,
                    w_ring=w_operand,
                    w_tiles=w_tiles,
                    a_ring=a_target,
                    full=full,
                    empty=empty,
                    layer=layer,
                    tokens=tokens,
                    first=first,
                    count=count,
                    granules=granules,
                    stripes=mine,
                ).run()

        def y_of(total, h):
            """Of 64 ranks, zero for tokens that are not their adapter's."""
            ranks = pl.ds(h * STAGE_ROWS, STAGE_ROWS)

            def load(ref):
                vector = plgpu.load(ref.at[layer, mine.module, ranks], layout=_WGMMA.reduce(0), optimized=False)
                return lax.broadcast_in_dim(vector, total.shape, (1,))

            token = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=_WGMMA)
            own = (token >= load(first_ref)) & (token < load(last_ref))
            return jnp.where(own, total * load(scale_ref), 0.0).astype(dtype)

        def products(user, seen):
            """Of a pass: sums of the stripes, float32 [64, 64] each."""
            full_of = full[user]

            def accumulate(*acc):
                outputs, ranks = acc[:width], acc[width:]

                def stage(k, multiply):
                    slot = lax.rem(seen + k, jnp.int32(ring.slots))
                    plgpu.barrier_wait(full_of.at[slot])
                    multiply(slot)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[slot])

                @pl.loop(0, count)
                def _(k):
                    def multiply(slot):
                        tokens = x_ring.at[ring.tokens(slot)]
                        for i, sum_ in enumerate(outputs):
                            plgpu.wgmma(sum_, tokens, w_operand.at[ring.weights(slot, i, ring.columns)])
                        for h, y in enumerate(ranks):
                            # a loop, because a condition has no accumulator
                            @pl.loop(0, jnp.where(granules > h * STAGE_ROWS // TILE_RANKS, 1, 0))
                            def _(_, h=h, y=y):
                                plgpu.wgmma(y, tokens, a_operand.at[ring.ranks(slot, h)].T)

                    stage(k, multiply)

                for h, y in enumerate(ranks):
                    y = y_of(y[...], h)
                    if interpret:  # which takes no operand from registers
                        y_smem[user, h] = y
                        y = y_smem.at[user, h]

                    @pl.loop(0, jnp.where(granules > h * STAGE_ROWS // TILE_RANKS, 1, 0))
                    def _(_, h=h, y=y):
                        def multiply(slot):
                            for i, sum_ in enumerate(outputs):
                                plgpu.wgmma(sum_, y, w_operand.at[ring.weights(slot, i, STAGE_ROWS)])

                        stage(count + h, multiply)

                return [sum_[...] for sum_ in outputs]

            kinds = [plgpu.ACC((FEW_TOKENS, TILE_COLS), jnp.float32)] * width
            kinds += [plgpu.ACC((FEW_TOKENS, STAGE_ROWS), jnp.float32)] * _HALVES
            return pl.run_scoped(accumulate, *kinds)

        def write(user, i, value, stripe):
            """A stripe's outputs, or this thread block's half of them."""
            target = c.at[user, i]
            target[...] = value.astype(dtype)
            plgpu.commit_smem()
            outputs = pl.ds(stripe * TILE_COLS + part * columns, columns)

            def copy(row, size):
                rows = pl.ds(row if isinstance(row, int) else pl.multiple_of(row, TILE_RANKS), size)
                plgpu.copy_smem_to_gmem(target.at[rows], out_ref.at[rows, outputs])

            pl.when(tokens == FEW_TOKENS)(lambda: copy(0, FEW_TOKENS))
            for size in (32, 16, 8):
                before = tokens & (FEW_TOKENS - 2 * size)
                wanted = (tokens < FEW_TOKENS) & (tokens & size != 0)
                pl.when(wanted)(lambda before=before, size=size: copy(before, size))

        def multiply(user):
            plgpu.set_max_registers(224, action="increase")
            for n, number in enumerate(range(user, stripes.passes, _WARPGROUPS)):
                begin, stripe_count = mine.pass_of(number)

                @pl.when(stripe_count > 0)
                def _(n=n, number=number, begin=begin, stripe_count=stripe_count):
                    found = products(user, number * each)
                    if not interpret:
                        if n:
                            plgpu.barrier_wait(free.at[user])
                        pair = PairSum(parts=sums.at[user], sent=sent.at[user], free=free.at[user], part=part)
                        found = pair.exchange(found, stripe_count)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for i, value in enumerate(found):
                        stripe = mine.first + begin + i
                        pl.when(i < stripe_count)(lambda i=i, value=value, s=stripe: write(user, i, value, s))

            @pl.when(mine.pass_of(user)[1] > 0)
            def _():
                if not interpret:  # nobody ends while the other one arrives at its barrier
                    plgpu.barrier_wait(free.at[user])
                plgpu.wait_smem_to_gmem(0)

        for user in range(users):
            pl.when(wg == user)(lambda user=user: multiply(user))

    body.__name__ = "lora_matmul_few"
    scratch = dict(
        **ring.types(dtype),
        sums=plgpu.SMEM((users, width, FEW_TOKENS, _PART), jnp.float32),
        c=plgpu.SMEM((users, width, FEW_TOKENS, columns), dtype),
        full=tuple(plgpu.Barrier(num_arrivals=ring.arrivals, num_barriers=ring.slots) for _ in range(users)),
        empty=plgpu.Barrier(num_barriers=ring.slots),
    )
    cluster: dict = {}
    if interpret:
        scratch |= dict(y_smem=plgpu.SMEM((users, _HALVES, FEW_TOKENS, STAGE_ROWS), dtype))
    else:
        scratch |= dict(
            sent=plgpu.Barrier(num_barriers=users),
            free=plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=users),
        )
        cluster = dict(cluster=(CLUSTER,), cluster_names=("part",))
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(_INTERPRETED_PAIRS if interpret else CLUSTERS,),
        grid_names=("pair",),
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        interpret=interpret,
        # commit_smem or sync_warpgroup stands wherever a thread reads what another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=not interpret),
        **cluster,
    )(*args)
