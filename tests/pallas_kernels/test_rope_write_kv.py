"""rope_write_kv against float64: the reference, and the Hopper kernel interpreted, lowered to CUDA and (gpu) on the
machine.
"""

import functools

from gpu_memory import poison
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PAGE_TOKENS, UnsupportedInput, rope_write_kv
from pallas_kernels.paged_attention.arg_specs import geometry
from pallas_kernels.rope_write_kv.kernel_sm90 import rope_write_kv_sm90, unsupported

EPS = 1e-6
SHAPES = [(32, 32, 128), (32, 8, 128), (28, 4, 128), (4, 1, 128), (9, 3, 64), (64, 8, 64), (16, 1, 256)]
SHAPES += [(32, 8, 80), (32, 32, 96)]
"""Query heads, kv heads, head_dim."""


def inputs(g, tokens, dtype, seed, norm):
    """Arguments of rope_write_kv for layer 1 of 2: random pages and slots, and one padding token if there are two."""
    rng = np.random.default_rng(seed)
    heads, kv_heads, dim = g.num_heads, g.num_kv_heads, g.head_dim
    num_pages = tokens // PAGE_TOKENS + 2
    where = rng.permutation(num_pages * PAGE_TOKENS)[:tokens].astype(np.int32)
    ids, slots = where // PAGE_TOKENS, where % PAGE_TOKENS
    if tokens > 1:
        ids[tokens // 2] = num_pages
    angles = rng.uniform(0, 2 * np.pi, (tokens, dim // 2)).astype(np.float32)
    qkv = jnp.asarray(rng.standard_normal((tokens, (heads + 2 * kv_heads) * dim)), dtype)
    pages = jnp.asarray(rng.standard_normal((2, num_pages, g.page_elements)), dtype)
    norms = tuple(jnp.asarray(1 + 0.1 * rng.standard_normal((2, 2, dim)), dtype)) if norm else None
    args = (qkv, jnp.cos(angles), jnp.sin(angles), pages, jnp.asarray(ids), jnp.asarray(slots))
    return args, dict(layer=1, geometry=g, norms=norms, norm_eps=EPS)


def expected(args, *, geometry, norms, **_):
    """Queries and pages in float64, rounded only where the op is defined to: a norm's result, and that times the
    weight, are of qkv's dtype (see rms_norm).
    """
    dtype = args[0].dtype
    qkv, cos, sin, pages, ids, slots = (np.asarray(a) for a in args)
    g, dim = geometry, geometry.head_dim
    x = qkv.astype(np.float64).reshape(len(qkv), -1, dim)
    q, k, v = np.split(x, [g.num_heads, g.num_heads + g.num_kv_heads], axis=1)

    def rounded(x):
        return np.asarray(x.astype(np.float32).astype(dtype), np.float64)

    def rotate(x, norm):
        if norms is not None:
            x = rounded(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS))
            x = rounded(x * np.asarray(norms[norm][1], np.float64))
        a, b = np.split(x, 2, axis=-1)
        c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    q, k = rotate(q, 0), rotate(k, 1)
    after = pages.astype(np.float64).reshape(*pages.shape[:2], 2, g.num_kv_heads, PAGE_TOKENS, dim)
    for t, (page, slot) in enumerate(zip(ids, slots, strict=True)):
        if page < pages.shape[1]:
            after[1, page, :, :, slot] = k[t], v[t]
    return q, after.reshape(pages.shape)


def check(run, heads, kv_heads, dim, tokens, dtype=jnp.bfloat16, *, norm=False, seed=0):
    args, options = inputs(geometry(heads, kv_heads, dim, 2), tokens, dtype, seed, norm)
    want_q, want_pages = expected(args, **options)
    untouched = want_pages == np.asarray(args[3], np.float64)  # before donation
    poison(args[0])
    q, pages = jax.jit(functools.partial(run, **options), donate_argnums=3)(*args)
    assert q.dtype == pages.dtype == dtype
    # one rounding; with norms an input of the rotation may be on the other side of one of its own
    rtol, atol = (1.05 * 2.0**-8, 2.0**-6 if norm else 1e-6) if dtype == jnp.bfloat16 else (1e-5, 1e-5)
    np.testing.assert_allclose(np.asarray(q, np.float64), want_q, rtol=rtol, atol=atol)
    np.testing.assert_allclose(np.asarray(pages, np.float64), want_pages, rtol=rtol, atol=atol)
    np.testing.assert_array_equal(np.asarray(pages, np.float64)[untouched], want_pages[untouched])
    return q, pages


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_reference(dtype, norm):
    check(rope_write_kv, 4, 2, 16, 5, dtype, norm=norm)


@pytest.mark.parametrize(
    "heads, kv_heads, dim, split, norm",
    [(9, 3, 64, True, False), (9, 3, 64, False, True), (4, 1, 128, True, True), (16, 8, 80, False, False)],
)
def test_interpreted(heads, kv_heads, dim, split, norm):
    run = functools.partial(rope_write_kv_sm90, split=split, interpret=True)
    check(run, heads, kv_heads, dim, 2, norm=norm)


@pytest.mark.parametrize("heads, kv_heads, dim", SHAPES)
@pytest.mark.parametrize("tokens, norm", [(64, False), (2048, True)])
def test_lowers_to_cuda_in_place(heads, kv_heads, dim, tokens, norm):
    g = geometry(heads, kv_heads, dim, 2)
    assert unsupported(g, jnp.bfloat16, jnp.bfloat16) is None
    args, options = inputs(g, tokens, jnp.bfloat16, 0, norm)
    run = jax.jit(functools.partial(rope_write_kv_sm90, **options), donate_argnums=3)
    assert "output_operand_aliases" in run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_unsupported():
    for heads, kv_heads, dim, dtype, reason in (
        (32, 8, 128, "float32", "two-byte"),
        (32, 8, 136, "bfloat16", "head_dim is 136"),
        (1, 1, 128, "bfloat16", "1 query heads of 128"),
        (8, 1, 64, "bfloat16", "2 key and value heads of 64"),
    ):
        assert reason in unsupported(geometry(heads, kv_heads, dim), dtype, "bfloat16")
    args, options = inputs(geometry(4, 2, 16, 2), 3, jnp.bfloat16, 0, False)
    with pytest.raises(UnsupportedInput, match="rope_write_kv has no Hopper kernel"):
        rope_write_kv(*args, **options, implementation="mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads, kv_heads, dim",
    [
        (32, 32, 128),
        (32, 8, 128),
        (28, 4, 128),
        (4, 1, 128),
        (9, 3, 64),
        (64, 8, 64),
        (16, 1, 256),
        (32, 8, 80),
        (32, 32, 96),
    ],
)
@pytest.mark.parametrize("tokens", [1, 64, 1000])
@pytest.mark.parametrize("norm", [False, True])
def test_on_gpu(heads, kv_heads, dim, tokens, norm):
    got = check(rope_write_kv_sm90, heads, kv_heads, dim, tokens, norm=norm)
    for split in (True, False):  # the cut over thread blocks changes no bit
        run = functools.partial(rope_write_kv_sm90, split=split)
        for again, want in zip(check(run, heads, kv_heads, dim, tokens, norm=norm), got, strict=True):
            np.testing.assert_array_equal(np.asarray(again), np.asarray(want))
