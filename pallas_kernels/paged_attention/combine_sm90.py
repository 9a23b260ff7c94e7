"""Merges the partial results of a context's splits by their log-sum-exp, in order: decode's second step on Hopper."""

import functools
import math

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import Geometry
from pallas_kernels.paged_attention import decode_schedule as schedule

_HEADS = 4
"""Heads of one thread block, if they divide."""
_UNROLL = 4


def _kernel(
    seqs_ref,
    part_ref,
    lse_ref,
    out_ref,
    *,
    geometry: Geometry,
    max_splits: int,
    packed: int,
    rows: int,
    lanes: int,
    per_block: int,
):
    heads, kv_heads, dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    group = heads // kv_heads
    seq = lax.axis_index("seq")
    splits = seqs_ref[seq, schedule.SPLITS]
    shape = (lanes, dim)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=dim * lanes // 128)

    def merge(first):
        """Heads first .. first + lanes - 1."""
        row = seq * max_splits * heads + first

        def lse(split, head):
            kv_head = lax.div(head, group)
            column = lax.rem(kv_head * packed, rows) + lax.rem(head, group)
            return lse_ref[(seq * max_splits + split) * kv_heads + kv_head, column]

        def across(values):
            """A scalar per head as a vector over the heads' elements."""
            if lanes == 1:
                return values[0]
            lane = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            return jnp.where(lane == 0, values[0], values[1])

        def body(i, carry):
            tops, sums, acc = carry
            at = [jnp.minimum(i * _UNROLL + u, splits - 1) for u in range(_UNROLL)]
            values = [plgpu.load(part_ref.at[pl.ds(row + s * heads, lanes)], layout=layout) for s in at]
            logs = [[lse(s, first + n) for n in range(lanes)] for s in at]
            for u in range(_UNROLL):
                inside = i * _UNROLL + u < splits
                new = [jnp.maximum(t, x) for t, x in zip(tops, logs[u], strict=True)]
                decay = [jnp.exp2(t - x) for t, x in zip(tops, new, strict=True)]
                weight = [jnp.where(inside, jnp.exp2(x - t), 0.0) for t, x in zip(new, logs[u], strict=True)]
                sums = [s * d + w for s, d, w in zip(sums, decay, weight, strict=True)]
                acc = acc * across(decay) + values[u] * across(weight)
                tops = new
            return tops, sums, acc

        init = (
            [jnp.float32(-jnp.inf)] * lanes,
            [jnp.float32(0)] * lanes,
            plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout),
        )
        _, sums, acc = lax.fori_loop(0, lax.div(splits + (_UNROLL - 1), _UNROLL), body, init)
        token = seqs_ref[seq, schedule.TOKEN]
        out_ref[token, pl.ds(first, lanes)] = (acc / across(sums)).astype(out_ref.dtype)

    @pl.when(splits > 1)
    def _():
        for n in range(0, per_block, lanes):
            merge(lax.axis_index("heads") * per_block + n)


def combine(
    out_ref,
    part: Float[Array, "R D"],
    lse: Float[Array, "S G"],
    seqs: Int[Array, "B 8"],
    *,
    geometry: Geometry,
    max_splits: int,
    packed: int,
    interpret: bool = False,
) -> None:
    """Writes the rows of out_ref [T, N, D] whose sequence has several splits; leaves the others alone.

    part: normalised results, row (seq x max_splits + split) x heads + head. lse: base-2 log-sum-exp of the scores,
    row (seq x max_splits + split) x kv_heads + kv_head, column as packed by decode_sm90.
    """
    heads, dim = geometry.num_heads, geometry.head_dim
    lanes = max(128 // dim, 1)  # a vector has an element for each of 128 threads
    per_block = math.gcd(heads, _HEADS)
    plgpu.kernel(
        functools.partial(
            _kernel,
            geometry=geometry,
            max_splits=max_splits,
            packed=packed,
            rows=lse.shape[1],
            lanes=lanes,
            per_block=per_block,
        ),
        out_type=(),
        grid=(seqs.shape[0], heads // per_block),
        grid_names=("seq", "heads"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(seqs, part, lse, out_ref)
