"""A stacked parameter straight into its shards: every device's part is filled from its own slices of the tensors.

Only the devices of this process, one after another, so that the host holds one part at a time and reads nothing that
another process needs.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from sharding import Shards, take
from slora_jax.loading.pieces import Piece, ReadSlice, place


def load_shards(
    where: Shards,
    shape: tuple[int, ...],
    dtype: np.dtype,
    pieces: Sequence[Piece],
    read: ReadSlice,
    rounded: Callable[[np.ndarray], np.ndarray],
) -> jax.Array:
    """The array on the devices. shape: of the whole parameter. rounded: values as they are to be kept."""
    on_devices = where.shape(shape)
    width = where.index.shape[1]
    numbers = {
        device: (index[where.axis].start or 0) // width
        for device, index in where.sharding.addressable_devices_indices_map(on_devices).items()
        if index is not None
    }
    part, filled, arrays = np.empty(0), -1, []
    for device, number in sorted(numbers.items(), key=lambda item: item[1]):
        if number != filled:  # a mesh with another axis has devices with the same part
            part = np.zeros((*shape[: where.axis], width, *shape[where.axis + 1 :]), dtype)
            for piece in pieces:
                _fill(part, piece, where.axis, where.index[number], read, rounded)
            filled = number
        # Waiting lets go of the host copy before the next part is filled.
        arrays.append(jax.block_until_ready(jax.device_put(part, device)))
    return jax.make_array_from_single_device_arrays(on_devices, where.sharding, arrays)


def _fill(part, piece: Piece, axis: int, own, read: ReadSlice, rounded) -> None:
    """Puts a tensor's elements that belong to a device into its part. own: what it has of the parameter's axis."""
    last = part.ndim - 1
    start, stop = (piece.start, piece.stop) if axis == last else (0, int(own.max(initial=-1)) + 1)
    at = np.flatnonzero((own >= start) & (own < stop))
    if not at.size:
        return
    # one run of the part; zeros that stand between the elements are filled in with them
    low, high = int(at[0]), int(at[-1]) + 1
    index = np.where(own[low:high] >= 0, own[low:high] - start, -1)
    first, end = int(own[at].min()) - start, int(own[at].max()) - start + 1
    # a projection is [out, in] in the file and [layer, in, out] here
    in_file = 1 if part.ndim == 3 and axis == 1 else 0
    value = rounded(read(piece.tensor, in_file, first, end))
    value = take(value, in_file, np.where(index >= 0, index - first, -1))
    if piece.layer is None:
        part[low:high] = value
    elif axis == last:
        place(part[piece.layer, ..., low:high], value)
    else:
        place(part[piece.layer, low:high, piece.start : piece.stop], value)
