"""The adapter table of a step, kept from one step to the next: only what changed is written."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from pallas_kernels import MODULES, AdapterTable, Geometry, few_ranks
from pallas_kernels.geometry import TILE_RANKS
from sharding import Layout, ShardedTable
from slora_jax.adapter_pages import adapter_owner
from slora_jax.adapters import AdapterShape
from slora_jax.adapters.shards import table_rows
from slora_jax.page_pool import PagePool

Table = AdapterTable | ShardedTable


class AdapterRows:
    """Gives adapters rows of a table with `size` rows. An adapter keeps its row until the row is needed.

    put: brings a new table to the device, once for all the steps that use it, with the rows that alone differ from the
    last one's; it must not keep the arrays. None leaves the table in numpy.
    """

    def __init__(
        self,
        geometry: Geometry,
        num_pages: int,
        size: int,
        layout: Layout | None = None,
        put: Callable[[Table, Sequence[int]], Table] | None = None,
    ):
        self._geometry = geometry
        self._num_pages = num_pages
        self._layout = layout
        self._put = put
        self._row: dict[str, int] = {}  # by digest
        self._pages: list[Sequence[int] | None] = [None] * size  # of each row, the pool's own list
        self._page_arrays = [np.zeros(0, np.int32)] * size
        self._free = list(range(size - 1, -1, -1))
        self._module_ranks = np.zeros((size + 1, len(MODULES)), np.int32)  # the last row, -1, is the base model's
        layers = geometry.num_layers
        self._fields: dict[str, np.ndarray] = dict(
            granules=np.zeros((size, layers, len(MODULES)), np.int32),
            scaling=np.zeros((size, layers, len(MODULES)), np.float32),
        )
        if layout is None:
            self._fields["tile_start"] = np.zeros((size, layers), np.int32)
        else:
            self._fields |= table_rows([], layout, size)
        self._table: Table | None = None
        self._changed: set[int] = set()  # rows that the last table did not have as they are
        self._looked_up: tuple[PagePool, int] | None = None  # and its owners_made, when all pages were last looked up

    def current(self, pool: PagePool) -> Table | None:
        """The last table, if the adapters that were last placed still are where it says, and in the same rows. It says
        nothing of others, which may have been evicted and loaded again since.
        """
        return self._table if self._looked_up == (pool, pool.owners_made) else None

    def ranks_in_all(self, rows: np.ndarray) -> int:
        """Ranks that the adapters in these rows take together (`few_ranks`) on the module on which they take most: of
        each adapter those of its largest layer, as often as its row is named. -1: the base model.
        """
        return int(self._module_ranks[rows].sum(axis=0).max())

    def place(
        self, digests: Sequence[str], pool: PagePool, adapters: Mapping[str, AdapterShape]
    ) -> tuple[dict[str, int], Table]:
        """Row of each adapter, and the table. All of them must have their pages in the pool. Arrays of a table that was
        given out never change; `put` may delete them when the next one comes.
        """
        self._looked_up = pool, pool.owners_made
        for digest in digests:
            row = self._row.get(digest)
            pages = pool.pages(adapter_owner(digest))
            if row is None:
                row = self._row[digest] = self._free.pop() if self._free else self._take_row(digests, pool)
                self._write(row, pages, adapters[digest])
            elif self._pages[row] is not pages:  # loaded anew: the pool then makes a new list
                self._write(row, pages, adapters[digest])
        if self._table is None:
            self._forget_evicted(pool)
            table = self._make()
            if self._put is None:
                self._table = jax.tree.map(np.copy, table)
            else:
                self._table = self._put(table, sorted(self._changed))
            self._changed.clear()
        return self._row, self._table

    def _take_row(self, wanted: Sequence[str], pool: PagePool) -> int:
        keep = set(wanted)
        others = [digest for digest in self._row if digest not in keep]
        # rather one that left the pool, or that no running sequence uses
        gone = (d for d in others if not pool.holds(adapter_owner(d)) or pool.is_idle(adapter_owner(d)))
        return self._row.pop(next(gone, others[0]))

    def _forget_evicted(self, pool: PagePool) -> None:
        """Adapters whose pages are others' now; those that are left fit into one list of all pages together."""
        for digest, row in list(self._row.items()):
            owner = adapter_owner(digest)
            if not pool.holds(owner) or pool.pages(owner) is not self._pages[row]:
                del self._row[digest]
                self._free.append(row)

    def _write(self, row: int, pages: Sequence[int], adapter: AdapterShape) -> None:
        self._pages[row] = pages
        self._page_arrays[row] = np.array(pages, np.int32)
        self._module_ranks[row] = few_ranks(adapter.module_granules * TILE_RANKS)
        self._fields["granules"][row] = adapter.granules
        self._fields["scaling"][row] = adapter.scaling
        if self._layout is None:
            self._fields["tile_start"][row] = adapter.tile_start(self._geometry)
        else:
            for name, column in table_rows([adapter], self._layout, 1).items():
                self._fields[name][:, row] = column[:, 0]
        self._changed.add(row)
        self._table = None

    def _make(self) -> Table:
        held = list(self._row.values())
        lengths = np.array([len(self._page_arrays[row]) for row in held], np.int32)
        page_start = np.zeros(len(self._pages), np.int32)
        page_start[held] = np.cumsum(lengths) - lengths
        pages = np.zeros(self._num_pages, np.int32)
        if held:
            flat = np.concatenate([self._page_arrays[row] for row in held])
            pages[: len(flat)] = flat
        fields = dict(pages=pages, page_start=page_start, **self._fields)
        return AdapterTable(**fields) if self._layout is None else ShardedTable(**fields)
