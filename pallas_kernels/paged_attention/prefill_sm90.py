"""Attention of ragged prompt chunks over the pages and themselves, for Hopper.

The structure is FlashAttention 3's as in JAX's attention_mgpu.py: warpgroups of 64 query rows take turns on the tensor
cores (one multiplies while the other takes the exponentials), another one loads. New here: keys and values come page by
page through the page table; chunks are ragged; where query heads share a kv head the warpgroups take different heads of
the same tokens.
"""

import functools
import math

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import PAGE_TOKENS, Geometry
from pallas_kernels.paged_attention import prefill_schedule as schedule
from pallas_kernels.paged_attention.config import SMEM_BYTES, PrefillConfig, prefill_config

_ROW = plgpu.Layout.WGMMA.reduce(1)
_LOG2E = math.log2(math.e)
_ROWS = 64
_WARPS = 4
_NO_SCORE = -1e30
"""Running maximum of a row that has seen no key yet: finite, so that no infinity is subtracted from another."""


def heads_per_block(geometry: Geometry, config: PrefillConfig) -> int:
    """Query heads of one kv head that a thread block computes together."""
    return math.gcd(geometry.num_heads // geometry.num_kv_heads, config.compute_wgs)


def unsupported(geometry: Geometry, dtype, config: PrefillConfig | None = None) -> str | None:
    """Why the prefill kernel cannot take this input, or None if it can."""
    config = config or prefill_config(geometry)
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it works in bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if geometry.head_dim not in (64, 128, 256):
        return f"it has head_dim 64, 128 and 256, not {geometry.head_dim}"
    if (size := config.smem_bytes(geometry.head_dim)) > SMEM_BYTES:
        return f"its config needs {size} bytes of shared memory of {SMEM_BYTES}"
    return None


def _kernel(
    layer_ref,
    blocks_ref,
    tables_ref,
    q_ref,
    kv_ref,
    out_ref,
    *,
    geometry: Geometry,
    config: PrefillConfig,
    num_pages: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
):
    kv_heads, dim = geometry.num_kv_heads, geometry.head_dim
    group = geometry.num_heads // kv_heads
    block, stages, compute_wgs = config.block_kv, config.stages, config.compute_wgs
    heads = heads_per_block(geometry, config)
    tiles = block // PAGE_TOKENS
    num_tokens, dtype = q_ref.shape[0], q_ref.dtype
    row = lax.axis_index("block")
    first_head = lax.axis_index("heads") * heads

    def column(c):
        return blocks_ref[row, c]

    steps = column(schedule.STEPS)

    def load(k_smem, v_smem, k_full, v_full, k_empty, v_empty):
        seq, first_step = column(schedule.SEQ), column(schedule.FIRST_STEP)
        last_page = lax.div(column(schedule.LENGTH) - 1, PAGE_TOKENS)
        layer_base = layer_ref[0] * num_pages
        kv_head = lax.div(first_head, group)

        @plgpu.warp_map
        def _(warp):
            @pl.loop(0, steps)
            def _(step):
                slot = lax.rem(step, stages)
                first = (first_step + step) * tiles + warp
                # a block's pages past the end are read as the last page again: finite, masked, and in the cache
                mine = range(0, tiles, _WARPS)  # a warp copies every fourth tile
                ids = [tables_ref[seq, jnp.minimum(first + t, last_page)] + layer_base for t in mine]
                for kv, smem, full, empty in ((0, k_smem, k_full, k_empty), (1, v_smem, v_full, v_empty)):
                    pl.when(step >= stages)(lambda empty=empty: plgpu.barrier_wait(empty.at[slot]))
                    for t, page in zip(mine, ids, strict=True):
                        plgpu.copy_gmem_to_smem(
                            kv_ref.at[page * (2 * kv_heads) + (kv * kv_heads + kv_head)],
                            smem.at[slot, pl.ds((t + warp) * PAGE_TOKENS, PAGE_TOKENS)],
                            full.at[slot],
                        )

            # every barrier phase is waited for, as the interpreter demands
            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _(step):
                plgpu.barrier_wait(k_empty.at[lax.rem(step, stages)])
                plgpu.barrier_wait(v_empty.at[lax.rem(step, stages)])

    def compute(wg, q_smem, o_smem, p_smem, k_smem, v_smem, k_full, v_full, k_empty, v_empty, turn):
        head = first_head + lax.rem(wg, heads)
        offset = lax.div(wg, heads) * _ROWS
        token = column(schedule.TOKEN) + offset
        base = jnp.minimum(token, num_tokens - _ROWS)
        position = column(schedule.POSITION) + offset - (token - base)
        length, first_step = column(schedule.LENGTH), column(schedule.FIRST_STEP)

        def take_turn():
            if compute_wgs == 2:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        q_smem[...] = plgpu.load(q_ref.at[pl.ds(base, _ROWS), head], layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()
        pl.when(wg == 1)(take_turn)

        def step_fn(masked):
            def body(step, carry):
                acc, top, total = carry
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(k_full.at[slot])

                def scores(s_ref):
                    plgpu.wgmma(s_ref, q_smem, k_smem.at[slot].T)
                    take_turn()
                    return s_ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((_ROWS, block)))
                plgpu.barrier_arrive(k_empty.at[slot])
                factor = scale * _LOG2E
                if soft_cap is not None:
                    s, factor = jnp.tanh(s * (scale / soft_cap)), soft_cap * _LOG2E
                start = (first_step + step) * block
                if masked:
                    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, s.shape, layout=plgpu.Layout.WGMMA)
                    ahead = iota(0) + (position - start) - iota(1)
                    seen = ahead >= 0
                    if window is not None:
                        seen &= ahead < window
                    s = jnp.where(seen, s, -jnp.inf)
                new_top = jnp.maximum(top, jnp.max(s, axis=1) * factor)
                decay = jnp.exp2(top - new_top)
                p = jnp.exp2(s * factor - lax.broadcast_in_dim(new_top, s.shape, [0]))
                total = total * decay + jnp.sum(p, axis=1)
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                p16 = p.astype(dtype)
                acc, total, new_top, p16 = lax.optimization_barrier((acc, total, new_top, p16))
                if compute_wgs == 2:
                    plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                if masked:
                    left = length - start

                    @pl.when(left < block)
                    def _():
                        # Slots past the end may hold anything, and 0 * NaN is NaN. All warpgroups write the same.
                        for r in range(0, block, _ROWS):
                            part = v_smem.at[slot, pl.ds(r, _ROWS)]
                            v_row = plgpu.broadcasted_iota(jnp.int32, (_ROWS, dim), 0, layout=plgpu.Layout.WGMMA) + r
                            v = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                            part[...] = jnp.where(v_row < left, v, jnp.zeros_like(v))
                        plgpu.commit_smem()

                if compute_wgs == 2:
                    plgpu.barrier_wait(turn)

                if interpret:  # the interpreter has no operands in registers and no accumulators with a start value

                    def values(o_ref):
                        p_smem[...] = p16
                        plgpu.wgmma(o_ref, p_smem, v_smem.at[slot])
                        return o_ref[...]

                    acc = acc + pl.run_scoped(values, plgpu.ACC((_ROWS, dim)))
                else:
                    acc = pl.run_state(lambda o_ref: plgpu.wgmma(o_ref, p16, v_smem.at[slot]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_empty.at[slot])
                return acc, new_top, total

            return body

        carry = (
            plgpu.layout_cast(jnp.zeros((_ROWS, dim), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((_ROWS,), _NO_SCORE, jnp.float32), _ROW),
            plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), _ROW),
        )
        # all rows see all of the keys before `full`, if there is no window
        full = jnp.clip(lax.div(jnp.maximum(position + 1, 0), block) - first_step, 0, steps)
        if window is None:
            carry = lax.fori_loop(0, full, step_fn(False), carry)
        carry = lax.fori_loop(full if window is None else 0, steps, step_fn(True), carry)
        acc, _, total = carry
        pl.when(wg == 0)(take_turn)
        acc = acc * lax.broadcast_in_dim(1.0 / jnp.maximum(total, 1e-30), acc.shape, [0])
        plgpu.commit_smem()  # all warps are done with the queries
        o_smem[...] = acc.astype(dtype)
        plgpu.commit_smem()
        skip = token - base
        count = jnp.clip(column(schedule.COUNT) - offset, 0, _ROWS)
        for size in (64, 32, 16, 8, 4, 2, 1):
            # rows are stored in runs whose lengths are the powers of two in their number, longest first
            before = count & ~(2 * size - 1)

            @pl.when((count & size) != 0)
            def _(size=size, before=before):
                plgpu.copy_smem_to_gmem(
                    o_smem.at[pl.ds(skip + before, size)], out_ref.at[pl.ds(token + before, size), head]
                )

        plgpu.wait_smem_to_gmem(0)

    def entry(qo_smem, p_smem, k_smem, v_smem, full, empty, turn):
        q_smem, o_smem = qo_smem  # the result takes the queries' place
        wg = lax.axis_index("wg")

        used = column(schedule.COUNT) > 0

        @pl.when((wg < compute_wgs) & used)
        def _():
            plgpu.set_max_registers(232, action="increase")
            compute(wg, q_smem.at[wg], o_smem.at[wg], p_smem and p_smem.at[wg], k_smem, v_smem, *full, *empty, turn)

        @pl.when((wg == compute_wgs) & used)
        def _():
            # also where there is nothing to load: the others wait for these registers
            plgpu.set_max_registers(40, action="decrease")
            load(k_smem, v_smem, *full, *empty)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    pl.run_scoped(
        entry,
        plgpu.RefUnion(
            plgpu.SMEM((compute_wgs, _ROWS, dim), dtype, transforms=tiled), plgpu.SMEM((compute_wgs, _ROWS, dim), dtype)
        ),
        plgpu.SMEM((compute_wgs, _ROWS, block), dtype, transforms=tiled) if interpret else None,
        plgpu.SMEM((stages, block, dim), dtype, transforms=tiled),
        plgpu.SMEM((stages, block, dim), dtype, transforms=tiled),
        [plgpu.Barrier(num_arrivals=tiles, num_barriers=stages)] * 2,
        [plgpu.Barrier(num_arrivals=compute_wgs, num_barriers=stages)] * 2,
        plgpu.Barrier(num_arrivals=compute_wgs),
        collective_axes="wg",
    )


def prefill_into(
    out_ref,
    q: Float[Array, "T N D"],
    pages: Float[Array, "L P E"],
    page_tables: Int[Array, "B Pmax"],
    q_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""],
    geometry: Geometry,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    config: PrefillConfig | None = None,
    skip_decode: bool = False,
    interpret: bool = False,
) -> None:
    """Writes the rows of out_ref [T, N, D], T >= 64; not those of sequences with one token if skip_decode is set."""
    config = config or prefill_config(geometry)
    num_layers, num_pages, _ = pages.shape
    heads = heads_per_block(geometry, config)
    blocks = schedule.prefill_schedule(
        q_start,
        kv_lens,
        num_tokens=q.shape[0],
        block_q=config.compute_wgs // heads * _ROWS,
        block_kv=config.block_kv,
        sliding_window=sliding_window,
        skip_decode=skip_decode,
    )
    plgpu.kernel(
        functools.partial(
            _kernel,
            geometry=geometry,
            config=config,
            num_pages=num_pages,
            scale=sm_scale,
            window=sliding_window,
            soft_cap=soft_cap,
            interpret=interpret,
        ),
        out_type=(),
        grid=(geometry.num_heads // heads, blocks.shape[0]),
        grid_names=("heads", "block"),
        num_threads=config.compute_wgs + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        blocks,
        page_tables,
        q,
        pages.reshape(num_layers * num_pages * 2 * geometry.num_kv_heads, PAGE_TOKENS, geometry.head_dim),
        out_ref,
    )


def pad_tokens(q: Float[Array, "T N D"]) -> Float[Array, "T2 N D"]:
    """q with rows added up to the fewest that prefill_into takes."""
    return jnp.pad(q, ((0, max(_ROWS - q.shape[0], 0)), (0, 0), (0, 0)))


_STATIC = ("geometry", "sm_scale", "sliding_window", "soft_cap", "config", "skip_decode", "interpret")


@functools.partial(jax.jit, static_argnames=_STATIC)  # so that a model's unrolled layers share one lowering
def prefill_sm90(
    q: Float[Array, "T N D"],
    pages: Float[Array, "L P E"],
    page_tables: Int[Array, "B Pmax"],
    q_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""],
    **kwargs,
) -> Float[Array, "T N D"]:
    """Attention of chunks of any lengths. Padding rows are zero. Keywords as in prefill_into."""
    tokens = q.shape[0]
    q = pad_tokens(q)
    out_ref = jax.new_ref(jnp.empty(q.shape, q.dtype))
    prefill_into(out_ref, q, pages, page_tables, q_start, kv_lens, layer=layer, **kwargs)
    return jax.freeze(out_ref)[:tokens]
