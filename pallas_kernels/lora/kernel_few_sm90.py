"""Hopper kernel of a base projection of up to 64 tokens with the deltas of few adapters: ``x W + y B`` in one.

Reading W takes the time of such a step, and whatever is a launch of its own comes on top. Here y goes on like more
columns of x, zero for tokens of other adapters, and B like more rows of W. Outputs are dealt out in stripes of 64: if
there are enough, each thread block has its own. If not, two take stripes together and halve the input between them, and
the ranks. They add up through distributed shared memory, each half of the outputs.

A is read once. A block of 64 ranks is shrunk by many pairs, those with fewer stripes first: each multiplies a share of
the input beside its stripes and writes the sums to global memory, where each of them adds all up for a part of the
tokens. When the pairs are through with W, y is there, or nearly so where W is as small as o's.

With many stripes it goes through the input several times. Two warpgroups do so in turn, one while the other adds up and
writes; the second one also shrinks. A pass's y and B come after the next pass's base weights, when y is there. A third
warpgroup fills the rings.
"""

from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry, ceil_div
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.config import CLUSTER, CLUSTERS, FEW_TOKENS
from pallas_kernels.lora.few_items import FewItems, shares_of
from pallas_kernels.lora.few_load import FewLoad
from pallas_kernels.lora.few_multiply import WARPGROUPS, FewMultiply
from pallas_kernels.lora.few_plan import FewPlan
from pallas_kernels.lora.few_ring import A_SLOTS, FewRing
from pallas_kernels.lora.few_shrink import FewShrink
from pallas_kernels.lora.few_stripes import Stripes
from pallas_kernels.lora.mosaic_common import SHARED_BYTES, STAGE_ROWS, ChunkSource
from pallas_kernels.lora.signals import leave_signals, wait_signals
from pallas_kernels.paged_attention.decode_schedule import sm_count

_LEAST_STAGES = 2
"""Of a half of the input: a ring needs two slots, see FewRing.of."""
_SHRINKS = WARPGROUPS - 1
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


def few_blocks(ranks: int) -> int:
    """Blocks of a module that has so many ranks: of each thread block's list the same number."""
    return CLUSTER * ceil_div(ranks, CLUSTER * STAGE_ROWS)


def few_matmul(x, w, pages, plan: FewPlan, layer, *, group: str, geometry: Geometry, interpret=None):
    """``x @ w[layer]`` and the deltas of the plan's adapters, bfloat16 [T, out]. layer: int32[1]."""
    pairs = len(GROUPS[group]) if interpret else CLUSTERS
    parts = 1 if interpret else CLUSTER
    stripes = Stripes.of(geometry, group, pairs, parts)
    tiles = ChunkSource(geometry=geometry, num_pages=pages.shape[1], chunk=1, whole=not interpret, read_once=True)
    shared = SHARED_BYTES - 4 * stripes.width * FEW_TOKENS * _PART
    blocks, stages = plan.records.shape[2], x.shape[1] // TILE_COLS
    ring = FewRing.of(stripes.width, tiles, shared, stages // (parts // stripes.each))
    shares = 1 if interpret else shares_of(stripes, blocks, stages)
    number = jnp.concatenate([layer, jnp.full(1, x.shape[0], jnp.int32)])
    of_plan = (plan.records, plan.ranks, plan.count, plan.page_ids, plan.signals)
    args = (x, w, tiles.view_of_pool(pages), *of_plan, number)
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
    halves = parts // stripes.each  # of the input, whose sums the two add up
    columns = TILE_COLS // halves

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
        a_slots,
        results,
        full,
        empty,
        a_full,
        a_empty,
        taken,
        has_y=None,
        sent=None,
    ):
        (slots, slot_tiles), (a_slots, a_tiles) = ring.tiles.views(slots), ring.tiles.views(a_slots)
        wg, part, pair = lax.axis_index("wg"), 0 if interpret else lax.axis_index("part"), lax.axis_index("pair")
        mine = stripes.of_pair(pair, part)
        layer, tokens = number[0], number[1]
        half = jnp.int32(ceil_div(stages, parts))
        a_first = part * half
        a_count = jnp.minimum(stages - a_first, half)
        first, count = (a_first, a_count) if halves > 1 else (jnp.int32(0), jnp.int32(stages))
        items = FewItems(
            stripes=mine,
            blocks=[counts[layer, m] for m in mine.modules],
            shares=shares,
            part=part,
            parts=parts,
            own=bool(interpret),
        )
        deltas = lax.div(items.blocks_of(mine.place), jnp.int32(halves))

        def y_signal(block):
            """Counts the parts of a block's y."""
            return items.signal(layer, layers, mine.module, block) + 1

        def block_of(n):
            return n * halves + part if halves > 1 else n

        def wait_y(block):
            if interpret:
                plgpu.barrier_wait(has_y.at[block])
            else:
                wait_signals(signals, y_signal(block), shares)
                leave_signals(signals, y_signal(block), shares + mine.users)

        @pl.when(wg == WARPGROUPS)
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
                    a_slots=a_slots,
                    a_tiles=a_tiles,
                    a_full=a_full,
                    a_empty=a_empty,
                    layer=layer,
                    tokens=tokens,
                    first=first,
                    count=count,
                    a_first=a_first,
                    a_count=a_count,
                    stripes=mine,
                    items=items,
                    deltas=deltas,
                    block_of=block_of,
                    wait_y=wait_y,
                ).run()

        def multiply(user):
            plgpu.set_max_registers(208, action="increase")
            if user == _SHRINKS:
                FewShrink(
                    items=items,
                    ranks=ranks,
                    ys=ys,
                    signals=signals,
                    operands=lambda slot: (a_slots.at[ring.a_tokens(slot)], a_slots.at[ring.a_weights(slot)]),
                    slots=A_SLOTS,
                    full=a_full,
                    empty=a_empty,
                    has_y=has_y,
                    layer=layer,
                    layers=layers,
                    count=a_count,
                ).run()
            FewMultiply(
                user=user,
                ring=ring,
                slots=slots,
                full=full[user],
                empty=empty,
                results=results,
                sent=sent.at[user] if halves > 1 else None,
                taken=taken,
                out=out_ref,
                stripes=mine,
                part=part,
                halves=halves,
                count=count,
                deltas=deltas,
                tokens=tokens,
            ).run()

        for user in range(WARPGROUPS):

            @pl.when(wg == user)
            def _(user=user):
                multiply(user)

    body.__name__ = "lora_matmul_few"
    outputs = plgpu.SMEM((width, FEW_TOKENS, columns), dtype)
    scratch: dict[str, Any] = dict(
        **ring.types(dtype),
        results=(outputs,),
        full=tuple(plgpu.Barrier(num_arrivals=ring.arrivals, num_barriers=ring.slots) for _ in range(WARPGROUPS)),
        empty=plgpu.Barrier(num_barriers=ring.slots),
        taken=plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    options: dict[str, Any] = dict(grid=(pairs,))
    if interpret:
        scratch |= dict(has_y=plgpu.Barrier(num_barriers=blocks))
    else:
        options |= dict(cluster=(CLUSTER,), cluster_names=("part",))
    if halves > 1:
        scratch |= dict(
            results=plgpu.RefUnion(plgpu.SMEM((width, FEW_TOKENS, _PART), jnp.float32), outputs),
            sent=plgpu.Barrier(num_barriers=WARPGROUPS),
            taken=plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=WARPGROUPS),
        )
    return plgpu.kernel(
        body,
        out_type=out,
        grid_names=("pair",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        interpret=interpret,
        # commit_smem or sync_warpgroup stands wherever a thread reads what another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=not interpret),
        **options,
    )(*args)
