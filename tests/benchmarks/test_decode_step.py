"""What the benchmark of a step says of its adapters."""

import dataclasses

import pytest

from benchmarks.decode_step import Case, has_few_adapters, make_batch
from slora_jax.shapes import named_shape


@pytest.mark.parametrize(
    ("case", "ranks", "few"),
    [
        ("8x16x8", (16,), True),
        ("9x16x9", (16,), False),
        ("8x16x8", (10, 16), True),
        ("8x16x8", (10, 17), False),
        ("64x16x1", (128,), True),
        ("65x16x1", (8,), False),
        ("4x16x2p", (64,), True),
        ("5x16x2p", (64,), False),
        ("1x16x1", (8,), False),
        ("8x16x0", (8,), False),
    ],
)
def test_small_steps_with_few_adapters_are_recognised(case, ranks, few):
    config = named_shape("tiny-gqa")
    batch, _ = make_batch(Case.parse(case, ranks, ("q", "up")), config)
    assert has_few_adapters(batch, config) is few


def test_steps_of_256_tokens_are_small_where_outputs_are_many():
    narrow = named_shape("tiny-gqa")
    wide = dataclasses.replace(narrow, mlp_size=64 * 141)
    case = Case.parse("256x16x8", (16,), ("q", "up"))
    assert has_few_adapters(make_batch(case, wide)[0], wide)
    assert not has_few_adapters(make_batch(case, narrow)[0], narrow)
