"""Sampling on the device against numpy."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from slora_jax.errors import RequestError
from slora_jax.sampling import sample
from slora_jax.sampling_batch import RowSampling, build_sampling
from slora_jax.sampling_params import SamplingParams

VOCAB = 61
run = jax.jit(sample)


def draw(logits, params, rows=256, seed0=0, **row):
    """`rows` draws from one row of logits, each with a seed of its own."""
    wanted = [RowSampling(params=params, seed=seed0 + i, tokens=[0], prompt_len=1, **row) for i in range(rows)]
    return np.asarray(run(jnp.tile(jnp.asarray(logits, jnp.float32), (rows, 1)), build_sampling(wanted, rows)).tokens)


def allowed(logits, p):
    """Tokens that top_k, top_p and min_p leave, one after another, ties in."""
    x = np.array(logits, np.float64) / p.temperature
    keep = np.ones(len(x), bool)
    if p.top_k:
        keep &= x >= np.sort(x)[-min(p.top_k, len(x))]
    probs = np.where(keep, np.exp(x - x.max()), 0)
    probs /= probs.sum()
    if p.top_p < 1:
        order = np.argsort(-probs)
        count = np.searchsorted(np.cumsum(probs[order]), p.top_p - 1e-6) + 1
        keep &= probs >= probs[order][min(count, len(x)) - 1] - 1e-9
    keep &= probs >= p.min_p * probs.max() - 1e-9
    return np.flatnonzero(keep)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from([0, 1, 2, 5, 61, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
)
def test_draws_stay_in_the_allowed_set_and_reach_all_of_it(seed, top_k, top_p, min_p, temperature):
    logits = np.random.default_rng(seed).standard_normal(VOCAB) * 2
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = set(draw(logits, params).tolist())
    want = set(allowed(logits, params).tolist())
    assert got <= want
    if len(want) <= 3:
        x = np.exp((logits - logits.max()) / temperature)
        likely = {t for t in want if x[t] / sum(x[list(want)]) > 0.05}
        assert likely <= got


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    counts = np.bincount(draw(logits, SamplingParams(temperature=1.0), rows=4096), minlength=4) / 4096
    np.testing.assert_allclose(counts, [0.5, 0.25, 0.125, 0.125], atol=0.03)


def test_a_draw_depends_on_seed_and_position_only():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, VOCAB)).astype(np.float32)
    p = SamplingParams(temperature=1.0, top_p=0.9)
    row = RowSampling(params=p, seed=123456789012345, tokens=[1, 2, 3, 4], prompt_len=2)
    alone = run(jnp.asarray(logits[1:2]), build_sampling([row], 1)).tokens[0]
    other = RowSampling(params=SamplingParams(temperature=0.7, min_p=0.1), seed=5, tokens=[0], prompt_len=1)
    among = run(jnp.asarray(logits), build_sampling([other, row, other], 3)).tokens[1]
    assert alone == among
    flat = jnp.zeros((64, VOCAB))
    rows = [RowSampling(params=p, seed=9, tokens=[0] * (1 + i), prompt_len=1) for i in range(64)]
    assert len(set(run(flat, build_sampling(rows, 64)).tokens.tolist())) > 20


def test_greedy_rows_beside_random_ones_take_the_largest_logit():
    logits = np.random.default_rng(1).standard_normal((2, VOCAB)).astype(np.float32)
    rows = [
        RowSampling(params=SamplingParams()),
        RowSampling(params=SamplingParams(temperature=5.0), seed=3, tokens=[0]),
    ]
    assert run(jnp.asarray(logits), build_sampling(rows, 2)).tokens[0] == logits[0].argmax()


def test_penalties_and_bias():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, :6] = [5.0, 4.9, -1.0, 4.8, 4.6, 4.5]
    history = [0, 1, 1, 3]  # the prompt is [0]

    def best(**kw):
        params = SamplingParams(**kw)
        row = RowSampling(params=params, tokens=history, prompt_len=1)
        return int(run(jnp.asarray(logits), build_sampling([row], 1)).tokens[0])

    assert best() == 0
    assert best(presence_penalty=0.05) == 0  # the prompt is not penalised
    assert best(repetition_penalty=1.2) == 4  # prompt and output are: 5/1.2, 4.9/1.2, 4.8/1.2 fall under 4.6
    assert best(repetition_penalty=0.5) == 0
    assert best(logit_bias={0: -1.0}) == 1
    assert best(logit_bias={0: -1.0}, frequency_penalty=0.15) == 3  # 4.6 after two, 4.65 after one
    assert best(logit_bias={0: -1.0}, frequency_penalty=0.25) == 4
    assert best(logit_bias={60: 100.0}) == 60


def test_logprobs_are_those_of_the_raw_logits():
    logits = np.random.default_rng(2).standard_normal((2, VOCAB)).astype(np.float32)
    rows = [
        RowSampling(params=SamplingParams(logprobs=3, logit_bias={7: 50.0}), top_logprobs=3),
        RowSampling(params=None, target=11, top_logprobs=3),
    ]
    out = run(jnp.asarray(logits), build_sampling(rows, 2))
    ref = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert int(out.tokens[0]) == 7
    np.testing.assert_allclose(out.logprobs, [ref[0, 7], ref[1, 11]], rtol=1e-5)
    np.testing.assert_array_equal(out.top_ids[0, :3], np.argsort(-ref[0])[:3])
    np.testing.assert_allclose(out.top_logprobs[1, :3], np.sort(ref[1])[::-1][:3], rtol=1e-5)


def test_rows_that_are_not_finite_are_reported():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, 5] = np.nan
    logits[2] = -np.inf
    out = run(jnp.asarray(logits), build_sampling([RowSampling(params=SamplingParams())] * 3, 3))
    assert out.finite.tolist() == [True, False, False]


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("max_tokens", 0, "max_tokens must be at least 1"),
        ("temperature", -1, "temperature"),
        ("temperature", float("nan"), "temperature must be a finite number"),
        ("top_k", -1, "top_k"),
        ("top_p", 0.0, "top_p"),
        ("min_p", 1.5, "min_p"),
        ("presence_penalty", 3.0, "presence_penalty"),
        ("frequency_penalty", -3.0, "frequency_penalty"),
        ("repetition_penalty", 0.0, "repetition_penalty"),
        ("seed", -1, "seed"),
        ("logit_bias", {3: float("inf")}, "logit_bias of token 3"),
        ("stop", ("",), "stop must not contain an empty string"),
        ("logprobs", 21, "logprobs"),
        ("prompt_logprobs", -1, "prompt_logprobs"),
        ("n", 0, "n must be from 1"),
    ],
)
def test_bad_values_are_named(field, value, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**{field: value})


def test_a_single_stop_string_may_be_given_as_it_is():
    assert SamplingParams(stop="END").stop == ("END",)
    assert dataclasses.replace(SamplingParams(stop="END"), n=2).stop == ("END",)
