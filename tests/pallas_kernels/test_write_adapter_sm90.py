"""The Hopper write_adapter kernel against numpy: interpreted, lowered to CUDA, and (marked gpu) on the machine."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.arg_specs import geometry
from pallas_kernels.write_adapter import write_adapter
from pallas_kernels.write_adapter.kernel_sm90 import unsupported, write_adapter_sm90


def check(write, kv_heads, dim, num_pages, layers=3, dtype=jnp.bfloat16):
    rng = np.random.default_rng(num_pages)
    elements = geometry(kv_heads, kv_heads, dim, layers).page_elements
    ids = rng.permutation(num_pages + 5)[:num_pages].astype(np.int32)
    ids[num_pages // 2] = num_pages + 5 + num_pages % 2  # one that is dropped
    pages = jnp.asarray(rng.standard_normal((layers, num_pages + 5, elements)), dtype)
    image = jnp.asarray(rng.standard_normal((num_pages, layers, elements)), dtype)
    want = np.array(pages)
    for i, page in enumerate(ids):
        if page < num_pages + 5:
            want[:, page] = np.asarray(image)[i]
    got = jax.jit(write, donate_argnums=0)(pages, jnp.asarray(ids), image)
    np.testing.assert_array_equal(np.asarray(got), want)


def test_interpreted():
    check(lambda *a: write_adapter_sm90(*a, interpret=True), 1, 48, 3, layers=2)


def test_reference():
    check(write_adapter, 2, 64, 4)


@pytest.mark.parametrize("kv_heads, dim", [(32, 128), (8, 128), (8, 80), (3, 64)])
def test_lowers_to_cuda_in_place(kv_heads, dim):
    elements = geometry(kv_heads, kv_heads, dim, 2).page_elements
    assert unsupported(elements) is None
    s = jax.ShapeDtypeStruct
    run = jax.jit(write_adapter_sm90, donate_argnums=0)
    args = s((2, 9, elements), jnp.bfloat16), s((4,), jnp.int32), s((4, 2, elements), jnp.bfloat16)
    assert "output_operand_aliases" in run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads, dim", [(32, 128), (8, 128), (8, 80), (3, 64)])
@pytest.mark.parametrize("num_pages", [1, 8])
def test_on_gpu(kv_heads, dim, num_pages):
    check(write_adapter_sm90, kv_heads, dim, num_pages)
    check(write_adapter_sm90, kv_heads, dim, num_pages, dtype=jnp.float32)
