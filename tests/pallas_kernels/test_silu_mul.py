"""silu_mul against float64: the reference, and the Hopper kernel interpreted, lowered to CUDA and (gpu) on the
machine.
"""

import functools

from gpu_memory import poison
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedInput, silu_mul
from pallas_kernels.silu_mul.kernel_sm90 import silu_mul_sm90, unsupported


def check(run, tokens, size, dtype=jnp.bfloat16, *, rtol=1.05 * 2.0**-8, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(4 * rng.standard_normal((tokens, 2 * size)), dtype)
    poison(x[:, :size])
    got = jax.jit(run)(x)
    assert got.shape == (tokens, size) and got.dtype == dtype
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=1)
    np.testing.assert_allclose(np.asarray(got, np.float64), gate / (1 + np.exp(-gate)) * up, rtol=rtol, atol=1e-7)
    return got


@pytest.mark.parametrize("dtype, rtol", [(jnp.bfloat16, 2.0**-6), (jnp.float32, 1e-5)])
def test_reference(dtype, rtol):
    check(silu_mul, 5, 96, dtype, rtol=rtol)


@pytest.mark.parametrize("size, per_block", [(576, None), (1024, None), (1600, 1), (2752, 2)])
def test_interpreted(size, per_block):
    check(functools.partial(silu_mul_sm90, per_block=per_block, interpret=True), 2, size)


@pytest.mark.parametrize("tokens, size", [(1, 512), (64, 11008), (64, 14336), (8192, 5504), (2048, 28672)])
def test_lowers_to_cuda(tokens, size):
    x = jax.ShapeDtypeStruct((tokens, 2 * size), jnp.bfloat16)
    assert "mosaic_gpu" in jax.jit(silu_mul_sm90).trace(x).lower(lowering_platforms=("cuda",)).as_text()


def test_unsupported():
    assert unsupported(11008, jnp.bfloat16) is None
    for size, dtype, reason in ((11008, "float32", "float32"), (11000, "bfloat16", "11000"), (256, "bfloat16", "256")):
        assert reason in unsupported(size, dtype)
    with pytest.raises(UnsupportedInput, match="silu_mul has no Hopper kernel .* 96 elements"):
        silu_mul(jnp.zeros((2, 192), jnp.bfloat16), implementation="mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [576, 1536, 4864, 5504, 11008, 14336, 28672])
@pytest.mark.parametrize("tokens", [1, 7, 64, 2048])
def test_on_gpu(size, tokens):
    got = check(silu_mul_sm90, tokens, size, seed=size + tokens)
    for per_block in (1, 2, 3):  # the cut over thread blocks changes no bit
        again = check(functools.partial(silu_mul_sm90, per_block=per_block), tokens, size, seed=size + tokens)
        np.testing.assert_array_equal(np.asarray(again), np.asarray(got))


@pytest.mark.gpu
def test_extremes_on_gpu():
    gate = jnp.tile(jnp.asarray([-300.0, -100.0, -88.0, -0.0, 0.0, 88.0, 100.0, 300.0], jnp.bfloat16), 64)[None]
    got = jax.jit(silu_mul_sm90)(jnp.concatenate([gate, jnp.ones_like(gate)], axis=1))
    want = np.maximum(np.asarray(gate, np.float32), 0)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=1e-30)
