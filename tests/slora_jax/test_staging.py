"""Arrays that steps take keep their places."""

import jax
import numpy as np

from slora_jax.staging import Staging


def batch(rng, rows):
    return dict(
        tokens=rng.integers(-9, 9, rows).astype(np.int32),
        table=rng.integers(0, 9, (rows, 3)).astype(np.int32),
        seeds=rng.integers(0, 2**32, rows, dtype=np.uint32),
        scaling=rng.standard_normal((2, rows)).astype(np.float32),
    )


def addresses(tree):
    return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(tree)]


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)


def test_batches_of_a_shape_follow_one_another_in_one_place():
    staging, rng = Staging(jax.device_put), np.random.default_rng(0)
    first = {rows: addresses(staging.put(batch(rng, rows))) for rows in (4, 8)}
    for rows in (8, 4, 4, 8):
        given = batch(rng, rows)
        placed = staging.put(given)
        assert_equal(placed, given)
        assert addresses(placed) == first[rows]


def test_tables_stay_as_well():
    staging, rng = Staging(jax.device_put), np.random.default_rng(0)
    first = addresses(staging.move(jax.device_put(batch(rng, 5))))
    for _ in range(3):
        given = batch(rng, 5)
        placed = staging.move(jax.device_put(given))
        assert_equal(placed, given)
        assert addresses(placed) == first


def test_what_was_there_is_gone():
    staging, rng = Staging(jax.device_put), np.random.default_rng(0)
    old = staging.put(batch(rng, 4))
    staging.put(batch(rng, 4))
    assert old["tokens"].is_deleted()
