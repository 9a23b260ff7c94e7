"""How the elementwise Hopper kernels cut a row: into vectors of one warpgroup, with wide loads."""

from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP = 128
WIDTHS = (8, 4)
"""Elements of a thread's load: 16 bytes of bfloat16 or float16 if the row is long enough, otherwise 8."""
MIN_ROW = WARPGROUP * WIDTHS[-1]
ALIGN = 64


def unsupported_row(size: int, dtype) -> str | None:
    """Why rows of `size` elements cannot be cut, or None if they can."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"elements are {jnp.dtype(dtype).name}, not of two bytes"
    if size < MIN_ROW or size % ALIGN:
        return f"rows have {size} elements, not a multiple of {ALIGN} from {MIN_ROW} on"
    return None


def chunk_layout(size: int):
    """Elements of a chunk of a row of `size` elements, and its layout in registers."""
    width = next(w for w in WIDTHS if WARPGROUP * w <= size)
    chunk = WARPGROUP * width
    return chunk, plgpu.Layout.WG_STRIDED((chunk,), vec_size=width)


def load(ref, layout):
    """A chunk of global memory in float32."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
