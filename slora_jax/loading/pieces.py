"""Tensors of a checkpoint, and where they go in the stacked parameters."""

from collections.abc import Callable, Mapping
import dataclasses

import numpy as np

_TRANSPOSE_ROWS = 128
"""Rows transposed at a time: keeps both sides in the CPU's cache, five times faster than one call of numpy."""


ReadSlice = Callable[[str, int, int, int], np.ndarray]
"""(name, axis, start, stop) -> elements `start` to `stop` of a tensor's axis, of which nothing else is read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors of a base model by Hugging Face name: shapes known beforehand, values (float) read on demand.

    read_slice: for formats that can.
    """

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    read_slice: ReadSlice | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where one checkpoint tensor goes: ``layer`` of the stacked array, columns ``start:stop`` of its last axis."""

    tensor: str
    layer: int | None
    start: int
    stop: int


def place(target: np.ndarray, value: np.ndarray) -> None:
    """Writes a vector, or a projection [out, in] transposed, to a layer's columns."""
    if value.ndim == 1:
        target[...] = value
        return
    # numpy copies bfloat16 element by element; the same bits as integers go several times faster.
    bits = np.dtype(f"u{target.dtype.itemsize}")
    target, value = target.view(bits), value.view(bits)
    for row in range(0, value.shape[0], _TRANSPOSE_ROWS):
        target[:, row : row + _TRANSPOSE_ROWS] = value[row : row + _TRANSPOSE_ROWS].T
