"""What steps take from the host, at the same places in the device's memory step after step.

XLA launches a step's kernels from CUDA graphs. Before each run it enters anew, one by one, the kernels of which an
argument lies elsewhere than last time (CommandBufferThunk in its source). Kernels of every layer read the batch and the
adapter table, so these are copied to where those of the last step lay.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from sharding.table import PER_DEVICE, ShardedTable
from slora_jax.adapter_rows import Table
from slora_jax.batch import Batch


def _unpack(old: list[jax.Array], packed: jax.Array) -> list[jax.Array]:
    """Cuts `packed` into arrays like `old`."""
    ends = itertools.accumulate(array.size for array in old)
    return [packed[end - array.size : end].reshape(array.shape) for array, end in zip(old, ends, strict=True)]


def _copy(old: Table, new: Table) -> Table:
    del old
    return jax.tree.map(jnp.copy, new)


_LISTS = ("pages", "page_start")  # of a table; the other fields have a row for each adapter
_MOST_ROWS = (8, 64)


def _row_fields(table: Table) -> list[tuple[str, Any, int]]:
    """Name, array and axis of the adapters of each field with a row for each of them."""
    fields = [(field.name, getattr(table, field.name)) for field in dataclasses.fields(table)]
    sharded = isinstance(table, ShardedTable)
    return [(name, array, int(sharded and name in PER_DEVICE)) for name, array in fields if name not in _LISTS]


def _pack_rows(table: Table, rows: Sequence[int], most: int) -> np.ndarray:
    """int32: a table's lists, which of `most` changed rows each row is now (-1: none), and those."""
    which = np.full(len(table.page_start), -1, np.int32)
    which[list(rows)] = np.arange(len(rows))
    padded = np.resize(np.array(rows or [0], np.int32), most)
    fields = [np.take(array, padded, axis).view(np.int32).reshape(-1) for _, array, axis in _row_fields(table)]
    return np.concatenate([*(getattr(table, name) for name in _LISTS), which, *fields])


def _unpack_rows(old: Table, packed: jax.Array) -> Table:
    """`old` with what _pack_rows packed."""
    adapters = len(old.page_start)
    sizes = [len(getattr(old, name)) for name in _LISTS] + [adapters]
    *lists, which, rest = jnp.split(packed, np.cumsum(sizes))
    fields = _row_fields(old)
    most = rest.size // sum(array.size // adapters for _, array, _ in fields)
    changed: dict[str, jax.Array] = dict(zip(_LISTS, lists, strict=True))
    for name, array, axis in fields:
        size = array.size // adapters * most
        values, rest = rest[:size], rest[size:]
        values = values.reshape(*array.shape[:axis], most, *array.shape[axis + 1 :])
        values = jnp.take(lax.bitcast_convert_type(values, array.dtype), jnp.maximum(which, 0), axis)
        is_new = (which >= 0).reshape(-1, *[1] * (array.ndim - axis - 1))
        changed[name] = jnp.where(is_new, values, array)
    return type(old)(**changed)


class Staging:
    """Batches and adapter tables, each put where the last one lay. That one's arrays are deleted: the steps that read
    them must have been dispatched.

    put: brings an array to the device, or to all of them. put_table: the same for an adapter table. whole: the sharding
    of the former; None with one device.
    """

    def __init__(
        self,
        put: Callable[[np.ndarray], jax.Array],
        put_table: Callable[[Table], Table],
        whole: NamedSharding | None = None,
    ):
        self._put = put
        self._put_table = put_table
        self._whole = whole
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

    def table(self, table: Table, rows: Sequence[int] | None = None) -> Table:
        """Begins to copy an adapter table, in numpy, to the device. All have the same shapes.

        rows: adapters' rows, which alone differ from the last table's; None: all may. Few cross the bus alone.
        """
        place, self._table = self._table, None
        most = next((n for n in _MOST_ROWS if rows is not None and len(rows) <= n), None)
        if place is None:
            self._table = self._begin(table)
        elif most is None:
            self._table = self._copy(place, self._put_table(jax.tree.map(np.copy, table)))
        else:
            self._table = self._change(place, _pack_rows(table, rows or (), most))
        return self._table

    def _begin(self, table: Table) -> Table:
        """The first table. What later ones need is compiled now, and not while others wait."""
        placed = self._put_table(jax.tree.map(np.copy, table))
        shardings = None if self._whole is None else jax.tree.map(lambda array: array.sharding, placed)
        options: dict[str, Any] = dict(donate_argnums=0, keep_unused=True, out_shardings=shardings)
        if shardings is not None:
            options["in_shardings"] = shardings, self._whole
        self._change = jax.jit(_unpack_rows, **options)
        placed = self._copy(jax.tree.map(jnp.copy, placed), placed)
        for most in _MOST_ROWS:
            placed = self._change(placed, _pack_rows(table, (), most))
        return placed
