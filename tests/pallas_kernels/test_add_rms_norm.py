"""add_rms_norm against float64: the reference, and the Hopper kernel interpreted, lowered to CUDA and (gpu) on the
machine.
"""

from gpu_memory import poison
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedInput, add_rms_norm
from pallas_kernels.add_rms_norm.kernel_sm90 import add_rms_norm_sm90, unsupported

EPS = 1e-5
HALF_ULP = {jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11, jnp.float32: 2.0**-21}


def inputs(tokens, hidden, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, delta = jnp.asarray(rng.standard_normal((2, tokens, hidden)), dtype)
    return x, delta, jnp.asarray(1 + 0.1 * rng.standard_normal((3, hidden)), dtype)


def check(run, tokens, hidden, dtype=jnp.bfloat16, *, add=True, roundings=2, seed=0):
    x, delta, weight = inputs(tokens, hidden, dtype, seed)
    poison((x, x))
    total, normed = jax.jit(lambda x, delta, weight: run(x, delta, weight, layer=1, eps=EPS))(
        x, delta if add else None, weight
    )
    want = np.asarray(x, np.float32) + (np.asarray(delta, np.float32) if add else 0)
    want = want.astype(x.dtype)
    np.testing.assert_array_equal(np.asarray(total), want)
    want = want.astype(np.float64)
    want = want / np.sqrt((want * want).mean(axis=1, keepdims=True) + EPS) * np.asarray(weight[1], np.float64)
    np.testing.assert_allclose(np.asarray(normed, np.float64), want, rtol=1.05 * roundings * HALF_ULP[dtype], atol=1e-7)
    return total, normed


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("add", [True, False])
def test_reference(dtype, add):
    # compiled, XLA may normalise the sum before it is rounded
    check(add_rms_norm, 5, 96, dtype, add=add, roundings=3)


@pytest.mark.parametrize("hidden, add", [(576, True), (1024, False), (1600, True)])
def test_interpreted(hidden, add):
    check(lambda *a, **k: add_rms_norm_sm90(*a, **k, interpret=True), 2, hidden, add=add)


@pytest.mark.parametrize("hidden", [512, 576, 896, 3584, 4096, 8192])
@pytest.mark.parametrize("add", [True, False])
def test_lowers_to_cuda(hidden, add):
    x, weight = (jax.ShapeDtypeStruct((n, hidden), jnp.bfloat16) for n in (64, 2))
    run = jax.jit(lambda x, d, w: add_rms_norm_sm90(x, d, w, layer=1, eps=EPS))
    text = run.trace(x, x if add else None, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_unsupported():
    assert unsupported(4096, jnp.bfloat16) is None
    for hidden, dtype, reason in (
        (4096, "float32", "float32"),
        (4100, "bfloat16", "4100"),
        (1 << 15, "bfloat16", "at most"),
    ):
        assert reason in unsupported(hidden, dtype)
    with pytest.raises(UnsupportedInput, match="add_rms_norm has no Hopper kernel .* 96 elements"):
        x, delta, weight = inputs(2, 96, jnp.bfloat16)
        add_rms_norm(x, delta, weight, layer=0, eps=EPS, implementation="mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [576, 896, 2048, 3584, 4096, 5120, 8192, 16384])
@pytest.mark.parametrize("tokens", [1, 7, 64, 2048])
def test_on_gpu(hidden, tokens):
    for add in (True, False):
        check(add_rms_norm_sm90, tokens, hidden, add=add, seed=hidden + tokens)
    check(add_rms_norm_sm90, tokens, hidden, jnp.float16)


@pytest.mark.gpu
def test_a_token_does_not_depend_on_its_batch():
    x, delta, weight = inputs(300, 4096, jnp.bfloat16)
    run = jax.jit(lambda x, delta: add_rms_norm_sm90(x, delta, weight, layer=2, eps=EPS))
    whole = run(x, delta)
    for rows in (slice(0, 1), slice(17, 81)):
        for part, want in zip(run(x[rows], delta[rows]), whole, strict=True):
            np.testing.assert_array_equal(np.asarray(part), np.asarray(want[rows]))
