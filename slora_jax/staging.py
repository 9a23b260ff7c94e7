"""What steps take from the host, at the same places in the device's memory step after step.

XLA launches a step's kernels from CUDA graphs. Before each run it enters anew, one by one, the kernels of which an
argument lies elsewhere than last time (CommandBufferThunk in its source). Kernels of every layer read the batch and the
adapter table, so these are copied to where those of the last step lay.
"""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from slora_jax.adapter_rows import Table
from slora_jax.batch import Batch


def _unpack(old: list[jax.Array], packed: jax.Array) -> list[jax.Array]:
    """Cuts `packed` into arrays like `old`."""
    ends = itertools.accumulate(array.size for array in old)
    return [packed[end - array.size : end].reshape(array.shape) for array, end in zip(old, ends, strict=True)]


def _copy(old: Table, new: Table) -> Table:
    del old
    return jax.tree.map(jnp.copy, new)


class Staging:
    """Batches and adapter tables, each put where the last one lay. That one's arrays are deleted: the steps that read
    them must have been dispatched.

    put: brings an array to the device, or to all of them. whole: the sharding of that; None with one device.
    """

    def __init__(self, put: Callable[[np.ndarray], jax.Array], whole: NamedSharding | None = None):
        self._put = put
        self._places: dict[tuple[tuple[int, ...], ...], list[jax.Array]] = {}  # by shapes
        self._table: Table | None = None
        # all in one copy over the bus, as each takes as long as a launch, and the device waits for the last
        self._unpack = jax.jit(_unpack, donate_argnums=0, keep_unused=True, in_shardings=whole, out_shardings=whole)
        self._copy = jax.jit(_copy, donate_argnums=0, keep_unused=True)

    def batch(self, batch: Batch) -> Batch:
        """Begins to copy a batch's arrays, int32 in numpy, to the device. Batches of the same shapes share a place."""
        arrays = {name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
        shapes = tuple(array.shape for array in arrays.values())
        place = self._places.pop(shapes, None)  # until the new one is there: should it fail, another is made
        if place is None:
            place = [self._put(np.zeros(shape, np.int32)) for shape in shapes]
        packed = np.concatenate([array.reshape(-1) for array in arrays.values()])
        assert packed.dtype == np.int32, "a batch's arrays are int32"
        self._places[shapes] = placed = self._unpack(place, packed)
        fields: dict[str, Any] = dict(zip(arrays, placed, strict=True))
        return dataclasses.replace(batch, **fields)

    def table(self, table: Table) -> Table:
        """An adapter table that is on the device, or the devices, already. All have the same shapes."""
        place, self._table = self._table, None
        if place is None:
            place = jax.tree.map(jnp.copy, table)
        self._table = self._copy(place, table)
        return self._table
