"""The Hopper write_kv kernel against a plain loop: interpreted, lowered to CUDA, and (marked gpu) on the machine."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels.geometry import PAGE_TOKENS
from pallas_kernels.paged_attention.arg_specs import geometry
from pallas_kernels.write_kv.kernel_sm90 import unsupported, write_kv_sm90


def check(kv_heads, dim, num_tokens, dtype=jnp.bfloat16, **options):
    rng = np.random.default_rng(num_tokens)
    g = geometry(kv_heads, kv_heads, dim, 2)
    num_pages = num_tokens // PAGE_TOKENS + 2
    where = rng.permutation(num_pages * PAGE_TOKENS)[:num_tokens].astype(np.int32)
    ids, slots = where // PAGE_TOKENS, where % PAGE_TOKENS
    ids[num_tokens // 2] = num_pages  # a padding token
    pages = jnp.asarray(rng.standard_normal((2, num_pages, g.page_elements)), dtype)
    k, v = jnp.asarray(rng.standard_normal((2, num_tokens, kv_heads, dim)), dtype)
    want = np.array(pages).reshape(2, num_pages, 2, kv_heads, PAGE_TOKENS, dim)
    for t in range(num_tokens):
        if ids[t] < num_pages:
            want[1, ids[t], 0, :, slots[t]], want[1, ids[t], 1, :, slots[t]] = k[t], v[t]
    run = jax.jit(lambda *a: write_kv_sm90(*a, layer=1, geometry=g, **options))
    got = run(pages, k, v, jnp.asarray(ids), jnp.asarray(slots))
    np.testing.assert_array_equal(np.asarray(got).reshape(want.shape), want)


def test_interpreted():
    check(2, 64, 3, interpret=True)


@pytest.mark.parametrize("kv_heads, dim", [(32, 128), (8, 128), (8, 80), (4, 256)])
def test_lowers_to_cuda_in_place(kv_heads, dim):
    g = geometry(kv_heads, kv_heads, dim, 2)
    assert unsupported(g, jnp.bfloat16) is None
    s = jax.ShapeDtypeStruct
    kv, ids = s((64, kv_heads, dim), jnp.bfloat16), s((64,), jnp.int32)
    run = jax.jit(lambda *a: write_kv_sm90(*a, layer=1, geometry=g), donate_argnums=0)
    lowered = run.trace(s((2, 9, g.page_elements), jnp.bfloat16), kv, kv, ids, ids).lower(lowering_platforms=("cuda",))
    assert "output_operand_aliases" in lowered.as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads, dim", [(32, 128), (8, 128), (1, 64), (8, 80)])
@pytest.mark.parametrize("num_tokens", [1, 64, 1000, 3000])
def test_on_gpu(kv_heads, dim, num_tokens):
    check(kv_heads, dim, num_tokens)
