"""silu(gate) * up on Hopper, in float32 and rounded once: a thread block takes a few chunks of one row."""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import ceil_div
from pallas_kernels.vectors_sm90 import ALIGN, chunk_layout, load, unsupported_row

_BLOCKS = 2048
"""About as many thread blocks as run at once. Past that, each takes more than one chunk."""
_MAX_CHUNKS = 4
_ROWS = 2
"""Of a thread block where few windows are wanted, as a rule: most have nothing to do, and few wait for their turn."""


def unsupported(size: int, dtype) -> str | None:
    """Why the kernel cannot take halves of `size` columns, or None if it can."""
    return unsupported_row(size, dtype)


def _kernel(in_ref, out_ref, row, part, *, size: int, per_block: int):
    chunk, layout = chunk_layout(size)
    # The last chunks end with the row: what they share is computed twice. Counted in units, so that the compiler sees
    # how far every address is aligned.
    units = [jnp.minimum((part * per_block + i) * (chunk // ALIGN), (size - chunk) // ALIGN) for i in range(per_block)]
    starts = [unit * ALIGN for unit in units]
    gates = [load(in_ref.at[row, pl.ds(start, chunk)], layout) for start in starts]
    ups = [load(in_ref.at[row, pl.ds((unit + size // ALIGN) * ALIGN, chunk)], layout) for unit in units]
    for start, gate, up in zip(starts, gates, ups, strict=True):
        out_ref[row, pl.ds(start, chunk)] = (gate / (1 + jnp.exp(-gate)) * up).astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnames=("per_block", "interpret"))  # a model's unrolled layers share one lowering
def silu_mul_sm90(
    gate_up: Float[Array, "T F2"], *, per_block: int | None = None, interpret: bool = False
) -> Float[Array, "T F"]:
    """As pallas_kernels.silu_mul.silu_mul. per_block: chunks of a thread block, if not the default."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    chunks = ceil_div(size, chunk_layout(size)[0])
    if per_block is None:
        per_block = max(1, min(rows * chunks // _BLOCKS, _MAX_CHUNKS, chunks))

    def silu_mul(in_ref, out_ref):  # profilers show this name
        place = lax.axis_index("row"), lax.axis_index("part")
        _kernel(in_ref, out_ref, *place, size=size, per_block=per_block)

    return plgpu.kernel(
        silu_mul,
        out_type=jax.ShapeDtypeStruct((rows, size), gate_up.dtype),
        grid=(rows, ceil_div(chunks, per_block)),
        grid_names=("row", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(gate_up)


@functools.partial(jax.jit, static_argnames="interpret")
def silu_mul_again_sm90(
    gate_up: Float[Array, "T F2"], h: Float[Array, "T F"], windows: Int[Array, "W"], *, interpret: bool = False
) -> Float[Array, "T F"]:
    """`h` with silu_mul of `gate_up` in those of its W windows of T / W rows for which `windows` is not zero."""
    size, chunks = h.shape[1], ceil_div(h.shape[1], chunk_layout(h.shape[1])[0])
    height = h.shape[0] // len(windows)
    per_block, rows = min(_MAX_CHUNKS, chunks), min(_ROWS, height)
    target = jax.new_ref(h)

    def silu_mul_again(in_ref, windows_ref, out_ref):
        window, group = lax.axis_index("window"), lax.axis_index("group")

        @pl.when(windows_ref[window] != 0)
        def _():
            @pl.loop(0, rows)
            def _(i):
                row = window * height + group * rows + i
                for part in range(ceil_div(chunks, per_block)):
                    _kernel(in_ref, out_ref, row, jnp.int32(part), size=size, per_block=per_block)

    plgpu.kernel(
        silu_mul_again,
        out_type=(),
        grid=(len(windows), height // rows),
        grid_names=("window", "group"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(gate_up, windows, target)
    return jax.freeze(target)
