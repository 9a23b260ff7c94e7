"""The adapter table between steps: whatever was evicted and loaded again meanwhile, adapters are where it says."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np

from slora_jax.adapter_pages import adapter_owner
from slora_jax.adapter_rows import AdapterRows
from slora_jax.adapters import random_adapter
from slora_jax.page_pool import PagePool
from slora_jax.shapes import named_shape

CONFIG = named_shape("tiny-gqa")
ADAPTERS = {a.digest: a for a in (random_adapter(CONFIG, rank, seed=rank) for rank in (4, 8, 12, 16))}
DIGESTS = list(ADAPTERS)
_PAGES = 256  # enough for all of them and a page for each operation

OPERATIONS = st.one_of(
    st.tuples(st.just("evict"), st.integers(0, 3)),
    st.tuples(st.just("load"), st.integers(0, 3)),
    st.tuples(st.just("share"), st.integers(0, 3)),
    st.tuples(st.just("step"), st.sets(st.integers(0, 3), max_size=3)),
)
LOADED_WHILE_ANOTHER_RUNS = [
    *(("load", i) for i in range(2)),
    ("step", {0, 1}),
    ("evict", 1),
    ("share", 0),  # takes its pages
    ("load", 1),
    ("step", {0}),
    ("step", {0, 1}),
]


@settings(max_examples=200)
@example(operations=LOADED_WHILE_ANOTHER_RUNS)
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=30))
def test_adapters_are_where_the_table_says(operations):
    pool = PagePool(_PAGES)
    rows = AdapterRows(CONFIG.geometry, _PAGES, 3)
    pool.allocate("a prompt", 1)
    for number, (kind, which) in enumerate(operations):
        if kind == "step":
            wanted = [DIGESTS[i] for i in sorted(which) if pool.holds(adapter_owner(DIGESTS[i]))]
            row_of, table = rows.place(wanted, pool, ADAPTERS)
            for digest in wanted:
                row, pages = row_of[digest], pool.pages(adapter_owner(digest))
                start = table.page_start[row]
                assert table.pages[start : start + len(pages)].tolist() == list(pages)
                np.testing.assert_array_equal(table.granules[row], ADAPTERS[digest].granules)
            continue
        owner = adapter_owner(DIGESTS[which])
        if kind == "evict" and pool.holds(owner):
            pool.release(owner)
        elif kind == "load" and not pool.holds(owner):
            pool.allocate(owner, ADAPTERS[DIGESTS[which]].num_pages(CONFIG.geometry))
        elif kind == "share":  # a sequence that begins with a cached prefix, and grows
            pool.share(number, pool.pages("a prompt"))
            pool.allocate(number, 1)
