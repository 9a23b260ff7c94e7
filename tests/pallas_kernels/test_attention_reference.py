"""paged_attention and write_kv (XLA) against float64."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
from oracles import attention, fill_kv, relative_error
import pytest

from pallas_kernels import PAGE_TOKENS, Geometry, paged_attention, write_adapter, write_kv


def geometry(kv_heads=2, group=2, dim=16):
    heads = kv_heads * group
    return Geometry(
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        in_sizes=(64,) * 7,
        out_sizes=(heads * dim, kv_heads * dim, kv_heads * dim, 64, 64, 64, 64),
    )


MAX_SEQS, MAX_LEN, MAX_QUERIES = 4, 208, 40


def make_batch(rng, g, lens, queries, layer):
    """Sequences of `lens` tokens whose last `queries` are asked about, in random pages of a pool full of NaN."""
    per_seq = MAX_LEN // PAGE_TOKENS
    num_pages = per_seq * MAX_SEQS + 3
    pages = np.full((g.num_layers, num_pages, g.page_elements), np.nan)
    tables = rng.permutation(num_pages)[: per_seq * MAX_SEQS].reshape(MAX_SEQS, per_seq).astype(np.int32)
    q = rng.standard_normal((MAX_SEQS * MAX_QUERIES + 2, g.num_heads, g.head_dim)).astype(np.float32)
    lens, queries = (np.pad(np.array(x, np.int32), (0, MAX_SEQS - len(x))) for x in (lens, queries))
    q_start = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    kvs = []
    for b, n in enumerate(lens):
        k, v = rng.standard_normal((2, n, g.num_kv_heads, g.head_dim)).astype(np.float32)
        fill_kv(pages, layer, tables[b], k, v, g)
        kvs.append((k, v))
    return pages, tables, q, q_start, lens, kvs


@functools.partial(jax.jit, static_argnames=("geometry", "max_query", "sm_scale", "sliding_window", "soft_cap"))
def run(q, pages, tables, q_start, lens, layer, **options):
    return paged_attention(q, pages, tables, q_start, lens, layer=layer, **options)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    seqs=st.lists(
        st.tuples(st.sampled_from([1, 2, 15, 16, 17, 100, 129, 200]), st.integers(1, MAX_QUERIES)),
        min_size=1,
        max_size=4,
    ),
    variant=st.sampled_from([((1, 1), None, None), ((2, 4), None, None), ((4, 1), 20, 30.0)]),
)
def test_ragged_chunks_equal_float64(seed, seqs, variant):
    rng = np.random.default_rng(seed)
    heads, window, cap = variant
    g = geometry(*heads, dim=16)
    pages, tables, q, q_start, lens, kvs = make_batch(rng, g, [n for n, _ in seqs], [min(s) for s in seqs], 1)
    want = np.zeros(q.shape)
    for b, (k, v) in enumerate(kvs):
        rows = slice(q_start[b], q_start[b + 1])
        if len(k):
            want[rows] = attention(q[rows], k, v, 0.25, window, cap)
    options = dict(geometry=g, max_query=64, sm_scale=0.25, sliding_window=window, soft_cap=cap)
    got = run(q, jnp.asarray(pages, jnp.float32), tables, q_start, lens, 1, **options)
    assert np.isfinite(got).all()
    assert relative_error(got[: q_start[-1]], want[: q_start[-1]]) < 1e-5


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_decode_equals_float64_and_skips_empty_sequences(dtype, bound):
    rng = np.random.default_rng(0)
    g = geometry(2, 3, 32)
    pages, tables, q, q_start, lens, kvs = make_batch(rng, g, [40, 0, 1, 200], [1, 0, 1, 1], 0)
    want = np.concatenate([attention(q[q_start[b]][None], *kvs[b], 0.2) for b in (0, 2, 3)])
    options = dict(geometry=g, max_query=1, sm_scale=0.2)
    got = run(jnp.asarray(q, dtype), jnp.asarray(pages, dtype), tables, q_start, lens, 0, **options)
    assert np.isfinite(np.asarray(got, np.float32)).all()
    assert relative_error(got[:3], want) < bound


def test_decode_equals_the_last_row_of_a_chunk():
    rng = np.random.default_rng(1)
    g = geometry()
    pages, tables, q, q_start, lens, _ = make_batch(rng, g, [50], [10], 0)
    pages = jnp.asarray(pages, jnp.float32)
    options = dict(geometry=g, sm_scale=0.25)
    chunk = run(q, pages, tables, q_start, lens, 0, max_query=10, **options)
    one = np.minimum(q_start, 1)
    decode = run(q[9:], pages, tables, one, lens, 0, max_query=1, **options)
    assert relative_error(decode[0], chunk[9]) < 1e-6


def test_write_kv_fills_slots_and_drops_padding():
    rng = np.random.default_rng(2)
    g = geometry()
    pages = rng.standard_normal((2, 5, g.page_elements)).astype(np.float32)
    k, v = rng.standard_normal((2, 4, 2, 16)).astype(np.float32)
    ids, slots = np.array([3, 0, 5, 3], np.int32), np.array([15, 0, 2, 4], np.int32)  # the third is padding
    got = np.asarray(write_kv(jnp.asarray(pages), *map(jnp.asarray, (k, v, ids, slots)), layer=1, geometry=g))
    want = pages.copy()
    view = want.reshape(2, 5, 2, 2, PAGE_TOKENS, 16)
    for t in (0, 1, 3):
        view[1, ids[t], 0, :, slots[t]] = k[t]
        view[1, ids[t], 1, :, slots[t]] = v[t]
    np.testing.assert_array_equal(got, want)


def test_write_adapter_fills_its_pages_in_every_layer():
    rng = np.random.default_rng(3)
    pages = rng.standard_normal((3, 6, 512)).astype(np.float32)
    image = rng.standard_normal((3, 3, 512)).astype(np.float32)
    got = np.asarray(write_adapter(jnp.asarray(pages), jnp.array([4, 1, 6]), jnp.asarray(image)))
    want = pages.copy()
    want[:, 4], want[:, 1] = image[0], image[1]
    np.testing.assert_array_equal(got, want)
