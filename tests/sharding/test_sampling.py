"""Sampling from logits that are split over the vocabulary gives the tokens of whole rows, and gathers no logits."""

import dataclasses
import re

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

from sharding import LOGITS
from slora_jax.parallel import make_parallel
from slora_jax.sampling import sample
from slora_jax.sampling_batch import RowSampling, build_sampling
from slora_jax.sampling_params import SamplingParams
from slora_jax.shapes import named_shape
from slora_jax.step import make_sample

pytestmark = pytest.mark.skipif("len(__import__('jax').devices()) < 4", reason="needs 4 devices")

PLAIN = [dict(temperature=t) for t in (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
RANDOM = [dict(temperature=t) for t in (0.0, 0.7, 1.0, 1.5, 0.2, 5.0)]
FILTERED = [{}, dict(top_k=3), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=50, top_p=0.9), dict(top_p=0.01)]
FILTERED = [dict(f, temperature=0.9) for f in FILTERED]
CHANGED = dict(
    presence_penalty=0.5,
    frequency_penalty=0.3,
    repetition_penalty=1.4,
    logit_bias={0: 3.0, 62: -1.0, 63: 4.0, 250: 9.0},
)


def sampling(rows, *, changed=False, logprobs=None, targets=False):
    rng = np.random.default_rng(0)
    made = [
        RowSampling(
            params=SamplingParams(**p, **(CHANGED if changed else {})),
            seed=i,
            tokens=rng.integers(0, 251, 20).tolist(),
            prompt_len=9,
            target=200 if targets and i % 2 else -1,
            top_logprobs=logprobs,
        )
        for i, p in enumerate(rows)
    ]
    return build_sampling(made, 8)


def logits(vocab):
    """Rows with ties over the borders of the devices' parts, one that is not finite, one of large values."""
    x = np.random.default_rng(1).standard_normal((8, vocab)).astype(np.float32)
    x[0, [30, 90, 200]] = 7.0
    x[1, [vocab - 1, 0]] = 5.0
    x[3] *= 1e4
    x[4, 100] = np.nan
    x[5, 3] = np.inf
    x[6] = -np.inf
    return x


def run(vocab, devices, s):
    parallel = make_parallel(dataclasses.replace(named_shape("tiny-gqa"), vocab_size=vocab), devices)
    whole = logits(vocab)
    padded = np.pad(whole, ((0, 0), (0, -vocab % devices)), constant_values=-np.inf)
    given = jax.device_put(padded, NamedSharding(parallel.mesh, LOGITS))
    split = jax.jit(make_sample(parallel))
    return jax.jit(sample)(jnp.asarray(whole), s), split(given, s), split.lower(given, s).compile().as_text()


CASES = {
    "greedy": sampling(PLAIN),
    "greedy, changed, with log-probabilities": sampling(PLAIN, changed=True, logprobs=5),
    "random": sampling(RANDOM, changed=True),
    "random, targets": sampling(RANDOM, logprobs=0, targets=True),
    "random, structured": dataclasses.replace(
        sampling(RANDOM), allowed=np.random.default_rng(2).integers(0, 1 << 32, (8, 8), np.uint32)
    ),
    "filtered": sampling(FILTERED, changed=True, logprobs=20),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("vocab", "devices"), [(251, 4), (256, 2)])
def test_tokens_are_those_of_whole_rows(case, vocab, devices):
    one, many, _ = run(vocab, devices, CASES[case])
    np.testing.assert_array_equal(many.finite, one.finite)
    assert one.finite.tolist() == [True] * 4 + [False] * 3 + [True]
    np.testing.assert_array_equal(many.tokens, one.tokens)
    good = np.flatnonzero(one.finite)
    for field in ("logprobs", "top_logprobs"):
        a, b = getattr(one, field), getattr(many, field)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(b[good], a[good], atol=1e-5, rtol=1e-6)
    if one.top_ids is not None:
        np.testing.assert_array_equal(many.top_ids[good], one.top_ids[good])


@pytest.mark.parametrize(("case", "numbers"), [("greedy", 4), ("random", 6), ("filtered", None)])
def test_only_filters_gather_the_logits(case, numbers):
    """One all-gather of a few numbers a row and device: value and token of each kind, largest, NaN."""
    _, _, text = run(256, 4, CASES[case])
    shapes = re.findall(r"= \S*?\[([\d,]+)\]\S* all-gather\(", text)
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]
    if numbers is None:
        assert 8 * 256 in sizes
    else:
        assert sizes == [4 * 8 * numbers] and "all-reduce(" not in text
