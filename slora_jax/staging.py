"""What steps take from the host, at the same places in the device's memory step after step.

XLA launches a step's kernels from CUDA graphs. Before each run it enters anew, one by one, the kernels of which an
argument lies elsewhere than last time (CommandBufferThunk in its source). Kernels of every layer read the batch and the
adapter table, so these are copied to where those of the last step lay.
"""

from collections.abc import Callable
import itertools
from typing import Any, TypeVar

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

Tree = TypeVar("Tree")


def _unpack(old: list[jax.Array], packed: jax.Array) -> list[jax.Array]:
    """Cuts `packed` into arrays like `old`."""
    ends = list(itertools.accumulate(array.size for array in old))
    parts = [packed[end - array.size : end].reshape(array.shape) for array, end in zip(old, ends, strict=True)]
    return [lax.bitcast_convert_type(part, array.dtype) for part, array in zip(parts, old, strict=True)]


def _copy(old: Any, new: Any) -> Any:
    del old
    return jax.tree.map(jnp.copy, new)


class Staging:
    """Arrays that are put one after another in one place. What was put there before is deleted: the steps that read it
    must have been dispatched.

    put: brings an array to the device, or to all of them. whole: the sharding of that; None with one device.
    """

    def __init__(self, put: Callable[[np.ndarray], jax.Array], whole: NamedSharding | None = None):
        self._put = put
        self._places: dict[Any, list[jax.Array]] = {}
        # all in one copy over the bus, as each takes as long as a launch, and the device waits for the last
        self._unpack = jax.jit(_unpack, donate_argnums=0, keep_unused=True, in_shardings=whole, out_shardings=whole)
        self._copy = jax.jit(_copy, donate_argnums=0, keep_unused=True)
        self._tables: dict[Any, Any] = {}

    def put(self, tree: Tree) -> Tree:
        """A pytree of numpy arrays whose elements have four bytes. Trees with the same shapes share a place."""
        leaves, structure = jax.tree.flatten(tree)
        key = tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)
        place = self._places.pop(key, None)
        if place is None:
            place = [self._put(np.zeros(leaf.shape, leaf.dtype)) for leaf in leaves]
        packed = np.concatenate([leaf.reshape(-1).view(np.int32) for leaf in leaves])
        self._places[key] = placed = self._unpack(place, packed)
        return jax.tree.unflatten(structure, placed)

    def move(self, tree: Tree) -> Tree:
        """A pytree of arrays on the device or devices, which have a place of their own each."""
        key = jax.tree.structure(tree)
        place = self._tables.pop(key, None)
        if place is None:
            place = jax.tree.map(jnp.copy, tree)
        self._tables[key] = placed = self._copy(place, tree)
        return placed
