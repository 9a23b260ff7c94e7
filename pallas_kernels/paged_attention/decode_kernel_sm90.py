"""The decode kernel itself; decode_sm90 prepares its inputs and launches it.

Scores are computed transposed, with the tokens as wgmma's 64-row side: S^T[tokens, heads] = K q^T and
O^T[dim, heads] += V^T P^T. So 8 columns hold the query heads of a kv head, and a group of 1 wastes columns that cost
nothing instead of 64-row tiles. Thread blocks are persistent; in each, a loading warpgroup runs through the items
ahead of the computing one, so that copies are in flight across the items' borders. Never two computing warpgroups in
one block: a maximum over tokens crosses warps, and Mosaic gives a block one scratch space for such reductions.
"""

import math

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import expect, start_copy
from pallas_kernels.geometry import PAGE_TOKENS, Geometry
from pallas_kernels.paged_attention import decode_schedule as schedule
from pallas_kernels.paged_attention.config import DecodeConfig

_COL = plgpu.Layout.WGMMA.reduce(0)
_LOG2E = math.log2(math.e)
_Q_SLOTS = 2
_WARPS = 4


def decode_kernel(
    layer_ref,
    workers_ref,
    seqs_ref,
    tables_ref,
    q_ref,
    kv_ref,
    out_ref,
    part_ref,
    lse_ref,
    *,
    tokens: int,
    geometry: Geometry,
    config: DecodeConfig,
    num_pages: int,
    num_workers: int,
    packed: int,
    rows: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    single: bool,
    max_splits: int,
    interpret: bool,
):
    heads, kv_heads, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    group = heads // kv_heads
    block, stages = config.block_kv, config.stages
    tiles = block // PAGE_TOKENS
    dtype = q_ref.dtype
    worker = lax.axis_index("worker")
    layer_base = layer_ref[0] * num_pages

    def copy_page(source, target, barrier, number, shared):
        if interpret:  # a copy announces itself
            plgpu.copy_gmem_to_smem(source, target, barrier)
        else:
            start_copy(source, target, barrier, number < shared)
            start_copy(source, target, barrier, number >= shared, read_once=True)

    def for_items(step_item, carry):
        """Calls carry = step_item(number, seq, split, head, carry) for each item. Returns their number and carry."""
        seq, item, count = (workers_ref[worker, c] for c in (schedule.SEQ, schedule.ITEM, schedule.COUNT))

        def body(n, state):
            seq, item, *carry = state
            carry = step_item(n, seq, lax.div(item, kv_heads), lax.rem(item, kv_heads), carry)
            done = item + 1 == seqs_ref[seq, schedule.SPLITS] * kv_heads
            following = jnp.where(done, seqs_ref[seq, schedule.NEXT], seq)
            return following, jnp.where(done, 0, item + 1), *carry

        _, _, *carry = lax.fori_loop(0, count, body, (seq, item, *carry))
        return count, *carry

    def split_range(seq, split):
        """First block of a split and their number."""
        per = seqs_ref[seq, schedule.PER_SPLIT]
        begin = split * per
        return begin, jnp.minimum(per, seqs_ref[seq, schedule.BLOCKS] - begin)

    def load(warp, q_smem, k_smem, v_smem, bars):
        q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
        mine = range(0, tiles, _WARPS)  # a warp copies every fourth tile

        def load_item(n, seq, split, head, carry):
            (step,) = carry
            q_slot = lax.rem(n, _Q_SLOTS)
            pl.when(n >= _Q_SLOTS)(lambda: plgpu.barrier_wait(q_empty.at[q_slot]))

            @pl.when(warp == 0)
            def _():
                block = lax.div(seqs_ref[seq, schedule.TOKEN] * kv_heads * packed + head * packed, rows)
                plgpu.copy_gmem_to_smem(q_ref.at[block], q_smem.at[q_slot], q_full.at[q_slot])

            begin, num = split_range(seq, split)
            last_page = lax.div(seqs_ref[seq, schedule.LENGTH] - 1, PAGE_TOKENS)
            first_page = lax.div(seqs_ref[seq, schedule.FIRST], PAGE_TOKENS) + begin * tiles + warp

            def load_block(i, step):
                slot = lax.rem(step, stages)
                # a block's pages past the end are read as the last page again: finite, masked, and in the cache
                numbers = [jnp.minimum(first_page + i * tiles + t, last_page) for t in mine]
                ids = [tables_ref[seq, number] + layer_base for number in numbers]
                for kv, smem, full, empty in ((0, k_smem, k_full, k_empty), (1, v_smem, v_full, v_empty)):
                    pl.when(step >= stages)(lambda empty=empty: plgpu.barrier_wait(empty.at[slot]))
                    if not interpret:
                        expect(full.at[slot], len(mine) * PAGE_TOKENS * dim * dtype.itemsize)
                    for t, number, page in zip(mine, numbers, ids, strict=True):
                        copy_page(
                            kv_ref.at[page * (2 * kv_heads) + (kv * kv_heads + head)],
                            smem.at[slot, pl.ds((t + warp) * PAGE_TOKENS, PAGE_TOKENS)],
                            full.at[slot],
                            number,
                            seqs_ref[seq, schedule.SHARED],
                        )
                return step + 1

            return (lax.fori_loop(0, num, load_block, step),)

        count, steps = for_items(load_item, (jnp.int32(0),))

        # every barrier phase is waited for, as the interpreter demands
        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(k_empty.at[lax.rem(step, stages)])
            plgpu.barrier_wait(v_empty.at[lax.rem(step, stages)])

        @pl.loop(jnp.maximum(count - _Q_SLOTS, 0), count)
        def _(n):
            plgpu.barrier_wait(q_empty.at[lax.rem(n, _Q_SLOTS)])

    def compute(q_smem, k_smem, v_smem, p_smem, o32_smem, o16_smem, bars):
        q_full, q_empty, k_full, k_empty, v_full, v_empty = bars

        def compute_item(n, seq, split, head, carry):
            (step,) = carry
            q_slot = lax.rem(n, _Q_SLOTS)
            begin, num = split_range(seq, split)
            length = seqs_ref[seq, schedule.LENGTH]
            origin = seqs_ref[seq, schedule.FIRST] + begin * block
            plgpu.barrier_wait(q_full.at[q_slot])

            def compute_block(i, state):
                acc, top, total, step = state
                slot = lax.rem(step, stages)
                left = length - (origin + i * block)
                plgpu.barrier_wait(k_full.at[slot])

                def scores(s_ref):
                    plgpu.wgmma(s_ref, k_smem.at[slot], q_smem.at[q_slot].T)
                    return s_ref[...]

                s = pl.run_scoped(scores, plgpu.ACC((block, rows)))
                plgpu.barrier_arrive(k_empty.at[slot])
                if soft_cap is None:
                    s = s * (scale * _LOG2E)
                else:
                    s = jnp.tanh(s * (scale / soft_cap)) * (soft_cap * _LOG2E)
                token = plgpu.broadcasted_iota(jnp.int32, (block, rows), 0, layout=plgpu.Layout.WGMMA)
                seen = token < left
                if window is not None:
                    seen &= token >= left - window
                s = jnp.where(seen, s, -jnp.inf)
                new_top = jnp.maximum(top, jnp.max(s, axis=0))
                decay = jnp.exp2(top - new_top)
                p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [1]))
                total = total * lax.broadcast_in_dim(decay, s.shape, [1]) + p
                p_smem.T[...] = plgpu.layout_cast(p.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.barrier_wait(v_full.at[slot])

                @pl.when(left < block)
                def _():
                    # slots past the end may hold anything, and 0 * NaN is NaN
                    for r in range(0, block, 64):
                        half = v_smem.at[slot, pl.ds(r, 64)]
                        row = plgpu.broadcasted_iota(jnp.int32, (64, dim), 0, layout=plgpu.Layout.WGMMA) + r
                        v = plgpu.load(half, layout=plgpu.Layout.WGMMA)
                        half[...] = jnp.where(row < left, v, jnp.zeros_like(v))

                plgpu.commit_smem()

                def values(o_ref):
                    plgpu.wgmma(o_ref, v_smem.at[slot].T, p_smem.T)
                    return o_ref[...]

                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [1]) + pl.run_scoped(values, plgpu.ACC((dim, rows)))
                plgpu.barrier_arrive(v_empty.at[slot])
                return acc, new_top, total, step + 1

            acc = plgpu.layout_cast(jnp.zeros((dim, rows), jnp.float32), plgpu.Layout.WGMMA)
            top = plgpu.layout_cast(jnp.full((rows,), -jnp.inf, jnp.float32), _COL)
            total = plgpu.layout_cast(jnp.zeros((block, rows), jnp.float32), plgpu.Layout.WGMMA)
            acc, top, total, step = lax.fori_loop(0, num, compute_block, (acc, top, total, step))
            plgpu.barrier_arrive(q_empty.at[q_slot])
            total = jnp.sum(total, axis=0)
            acc = acc / lax.broadcast_in_dim(total, acc.shape, [1])
            # the kv head's own rows of the block of queries
            mine = pl.ds(lax.rem(head * packed, rows), group)
            one_split = seqs_ref[seq, schedule.SPLITS] == 1
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def write_result():
                o16_smem.T[...] = plgpu.layout_cast(acc.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                token = seqs_ref[seq, schedule.TOKEN]
                plgpu.copy_smem_to_gmem(o16_smem.at[mine], out_ref.at[token, pl.ds(head * group, group)])

            def write_part():
                o32_smem.T[...] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                slot = seq * max_splits + split
                plgpu.copy_smem_to_gmem(o32_smem.at[mine], part_ref.at[pl.ds(slot * heads + head * group, group)])
                lse_ref[slot * kv_heads + head] = top + jnp.log2(total)

            if single:
                write_result()
            else:
                pl.when(one_split)(write_result)
                pl.when(jnp.logical_not(one_split))(write_part)
            return (step,)

        @pl.loop(workers_ref[worker, schedule.ROWS_END] + worker, tokens, step=num_workers)
        def _(row):
            layout = plgpu.Layout.WG_STRIDED((heads, dim), vec_size=math.gcd(heads * dim // 128, 8))
            out_ref[row] = plgpu.layout_cast(jnp.zeros((heads, dim), dtype), layout)

        for_items(compute_item, (jnp.int32(0),))
        plgpu.wait_smem_to_gmem(0)

    def entry(q_smem, k_smem, v_smem, p_smem, o32_smem, o16_smem, full, empty):
        bars = [b for pair in zip(full, empty, strict=True) for b in pair]
        thread = lax.axis_index("wg")

        @pl.when(thread == 0)
        def _():
            compute(q_smem, k_smem, v_smem, p_smem, o32_smem, o16_smem, bars)

        @pl.when(thread == 1)
        def _():
            plgpu.warp_map(lambda warp: load(warp, q_smem, k_smem, v_smem, bars))

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    arrivals = tiles if interpret else _WARPS
    pl.run_scoped(
        entry,
        plgpu.SMEM((_Q_SLOTS, rows, dim), dtype, transforms=tiled),
        plgpu.SMEM((stages, block, dim), dtype, transforms=tiled),
        plgpu.SMEM((stages, block, dim), dtype, transforms=tiled),
        plgpu.SMEM((rows, block), dtype, transforms=tiled),
        plgpu.SMEM((rows, dim), jnp.float32),
        plgpu.SMEM((rows, dim), dtype),
        [
            plgpu.Barrier(num_barriers=_Q_SLOTS),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        ],
        [
            plgpu.Barrier(num_barriers=_Q_SLOTS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        collective_axes="wg",
    )
