"""Batches and adapter tables keep their places."""

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels import AdapterTable
from sharding.table import PER_DEVICE, ShardedTable
from slora_jax.batch import Batch
from slora_jax.staging import Staging

NAMES = [field.name for field in dataclasses.fields(Batch) if field.default is dataclasses.MISSING]


def a_table(rng):
    granules = rng.integers(0, 9, (3, 2, 7)).astype(np.int32)
    return AdapterTable(
        pages=rng.integers(0, 9, 12).astype(np.int32),
        page_start=np.arange(3, dtype=np.int32),
        tile_start=rng.integers(0, 9, (3, 2)).astype(np.int32),
        granules=granules,
        scaling=rng.standard_normal(granules.shape).astype(np.float32),
    )


def a_sharded_table(rng):
    fields = vars(a_table(rng))
    starts = fields.pop("tile_start")
    more = dict(shrink_start=np.stack([starts, starts + 1]), expand_start=np.stack([starts + 2, starts]))
    return ShardedTable(**fields, **more, shrink_granules=rng.integers(0, 9, (2, 3, 2, 7)).astype(np.int32))


def a_batch(rng, rows):
    arrays = {name: rng.integers(-9, 9, rows + i).astype(np.int32) for i, name in enumerate(NAMES)}
    arrays["page_tables"] = rng.integers(0, 9, (rows, 3)).astype(np.int32)
    return Batch(**arrays | dict(adapters=jax.device_put(a_table(rng))))


def addresses(tree):
    return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(tree)]


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.fixture
def staging():
    return Staging(jax.device_put, jax.device_put)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_batches_of_a_shape_follow_one_another_in_one_place(staging, rng):
    where = lambda batch: addresses(dataclasses.replace(batch, adapters=None))  # noqa: E731
    first = {rows: where(staging.batch(a_batch(rng, rows))) for rows in (4, 8)}
    for rows in (8, 4, 4, 8):
        given = a_batch(rng, rows)
        placed = staging.batch(given)
        assert placed.adapters is given.adapters
        assert_equal(placed, given)
        assert where(placed) == first[rows]


def test_tables_stay_as_well(staging, rng):
    first = addresses(staging.table(a_table(rng)))
    for _ in range(3):
        given = a_table(rng)
        placed = staging.table(given)
        assert_equal(placed, given)
        assert addresses(placed) == first


@pytest.mark.parametrize("make", [a_table, a_sharded_table])
@pytest.mark.parametrize("rows", [[], [1], [2, 0]])
def test_of_a_table_rows_that_changed_are_enough(staging, rng, rows, make):
    before = make(rng)
    first = addresses(staging.table(before))
    other = make(rng)
    changed = {name: array.copy() for name, array in vars(before).items() if name not in ("pages", "page_start")}
    for name, array in changed.items():
        where = (slice(None), rows) if name in PER_DEVICE else rows
        array[where] = getattr(other, name)[where]
    given = dataclasses.replace(other, **changed)  # with other lists of pages
    placed = staging.table(given, rows)
    assert_equal(placed, given)
    assert addresses(placed) == first


def test_tables_do_not_follow_the_arrays_they_came_from(staging, rng):
    given = a_table(rng)
    placed, wanted = staging.table(given), jax.tree.map(np.copy, given)
    for array in jax.tree.leaves(given):
        array += 1
    assert_equal(placed, wanted)


def test_what_was_there_is_gone(staging, rng):
    old, table = staging.batch(a_batch(rng, 4)), staging.table(a_table(rng))
    staging.batch(a_batch(rng, 4))
    staging.table(a_table(rng))
    assert old.tokens.is_deleted() and table.pages.is_deleted()
