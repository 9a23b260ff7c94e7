"""lora_shrink and lora_expand (XLA) against float64, over random segments, ranks, page places and widths."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
from oracles import image_pages, place_adapter, relative_error
import pytest

from pallas_kernels import GROUPS, AdapterTable, Geometry, UnsupportedInput, lora_expand, lora_shrink

# widths that are not multiples of 64, and grouped-query sizes
GEOMETRY = Geometry(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    in_sizes=(96, 96, 96, 64, 96, 96, 160),
    out_sizes=(64, 32, 32, 96, 160, 160, 96),
)
MAX_RANK = 64


def make_adapters(rng, rank_tables, num_pages):
    """Random adapters in a pool of random pages. rank_tables: one [L, 7] array of true ranks an adapter (0 = no
    target).
    """
    g = GEOMETRY
    pages = rng.standard_normal((g.num_layers, num_pages, g.page_elements))  # what is not an adapter's is noise
    ids = rng.permutation(num_pages).astype(np.int32)
    rows, at = [], 0
    for ranks in rank_tables:
        factors = {
            (layer, m): (rng.standard_normal((r, g.in_sizes[m])) / 8, rng.standard_normal((g.out_sizes[m], r)) / 8)
            for layer in range(g.num_layers)
            for m, r in enumerate(ranks[layer])
            if r
        }
        n = image_pages(factors, g)
        tile_start, granules = place_adapter(pages, ids[at : at + n], factors, g)
        rows.append((factors, at, tile_start, granules, rng.uniform(0.5, 4, (g.num_layers, 7))))
        at += n
    assert at <= num_pages
    table = AdapterTable(
        pages=jnp.asarray(ids),
        page_start=jnp.array([r[1] for r in rows], jnp.int32),
        tile_start=jnp.asarray(np.stack([r[2] for r in rows])),
        granules=jnp.asarray(np.stack([r[3] for r in rows])),
        scaling=jnp.asarray(np.stack([r[4] for r in rows]), jnp.float32),
    )
    return pages, table, [(r[0], r[4]) for r in rows]


def expected(x, out, adapters, seg_start, seg_adapter, layer, group):
    out = np.array(out, np.float64)
    for s, a in enumerate(seg_adapter):
        if a < 0:
            continue
        factors, scaling = adapters[a]
        rows = slice(seg_start[s], seg_start[s + 1])
        column = 0
        for m in GROUPS[group]:
            width = GEOMETRY.out_sizes[m]
            if (layer, m) in factors:
                fa, fb = factors[layer, m]
                delta = np.float32(scaling[layer, m]) * (np.asarray(x, np.float64)[rows] @ fa.T @ fb.T)
                out[rows, column : column + width] += delta
            column += width
    return out


@functools.partial(jax.jit, static_argnames="group")
def run(x, out, pages, table, seg_start, seg_adapter, layer, group):
    where = (pages, table, seg_start, seg_adapter)
    options = dict(layer=layer, group=group, geometry=GEOMETRY, max_rank=MAX_RANK, implementation="xla")
    return lora_expand(out, lora_shrink(x, *where, **options), *where, **options)


ranks = st.sampled_from([0, 0, 1, 4, 8, 12, 16, 24, 64])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rank_tables=st.lists(st.lists(ranks, min_size=14, max_size=14), min_size=3, max_size=3),
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 7, 8, 9, 20]), min_size=6, max_size=6),
    group=st.sampled_from(sorted(GROUPS)),
    layer=st.integers(0, 1),
)
def test_any_mix_equals_float64(seed, rank_tables, lengths, group, layer):
    rng = np.random.default_rng(seed)
    tables = [np.reshape(t, (2, 7)) for t in rank_tables]
    pages, table, adapters = make_adapters(rng, tables, 300)
    seg_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    seg_adapter = rng.integers(-1, len(tables), len(lengths)).astype(np.int32)
    tokens = 128  # those past the last segment are padding
    m = GROUPS[group][0]
    x = rng.standard_normal((tokens, GEOMETRY.in_sizes[m])).astype(np.float32)
    out = rng.standard_normal((tokens, sum(GEOMETRY.out_sizes[i] for i in GROUPS[group]))).astype(np.float32)
    got = run(x, out, jnp.asarray(pages, jnp.float32), table, seg_start, seg_adapter, layer, group)
    want = expected(x, out, adapters, seg_start, seg_adapter, layer, group)
    used = int(seg_start[-1])
    assert relative_error(got[:used], want[:used]) < 1e-5
    for s, a in enumerate(seg_adapter):
        if a < 0:
            rows = slice(seg_start[s], seg_start[s + 1])
            np.testing.assert_array_equal(np.asarray(got)[rows], out[rows])


def test_bfloat16():
    rng = np.random.default_rng(1)
    pages, table, adapters = make_adapters(rng, [np.full((2, 7), 16), np.full((2, 7), 4)], 300)
    x = jnp.asarray(rng.standard_normal((12, 96)), jnp.bfloat16)
    out = jnp.asarray(rng.standard_normal((12, 128)), jnp.bfloat16)
    seg_start, seg_adapter = np.array([0, 5, 9, 12], np.int32), np.array([1, -1, 0], np.int32)
    bf16 = jnp.asarray(pages, jnp.bfloat16)
    got = run(x, out, bf16, table, seg_start, seg_adapter, 1, "qkv")
    want = expected(x, out, adapters, seg_start, seg_adapter, 1, "qkv")
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, want) < 1e-2


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(2)
    pages, table, _ = make_adapters(rng, [np.full((2, 7), 24), np.full((2, 7), 8)], 300)
    pages = jnp.asarray(pages, jnp.float32)
    x = rng.standard_normal((20, 96)).astype(np.float32)
    out = rng.standard_normal((20, 128)).astype(np.float32)

    def deltas(seg_start, seg_adapter):
        return run(x, out, pages, table, np.array(seg_start, np.int32), np.array(seg_adapter, np.int32), 0, "qkv")

    alone = deltas([0, 4, 5, 5], [-1, 0, -1])
    mixed = deltas([0, 3, 11, 20], [1, 0, 1])
    np.testing.assert_array_equal(alone[4], mixed[4])


def test_no_compilation_for_other_adapters_ranks_segments_or_layers():
    traces = 0

    @jax.jit
    def step(x, out, pages, table, seg_start, seg_adapter, layer):
        nonlocal traces
        traces += 1
        return run(x, out, pages, table, seg_start, seg_adapter, layer, "gu")

    rng = np.random.default_rng(3)
    for rank in (1, 16, 64):
        pages, table, _ = make_adapters(rng, [np.full((2, 7), rank)], 300)
        x = rng.standard_normal((9, 96)).astype(np.float32)
        out = np.zeros((9, 320), np.float32)
        step(x, out, jnp.asarray(pages, jnp.float32), table, jnp.array([0, rank % 9, 9]), jnp.array([0, -1]), rank % 2)
    assert traces == 1


def test_unknown_implementation_is_named():
    rng = np.random.default_rng(4)
    pages, table, _ = make_adapters(rng, [np.full((2, 7), 8)], 100)
    with pytest.raises(ValueError, match="'fast'"):
        lora_shrink(
            jnp.zeros((1, 96)),
            jnp.asarray(pages, jnp.float32),
            table,
            jnp.array([0, 1]),
            jnp.array([0]),
            layer=0,
            group="qkv",
            geometry=GEOMETRY,
            max_rank=8,
            implementation="fast",
        )
    assert issubclass(UnsupportedInput, ValueError)
