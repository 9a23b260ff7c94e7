"""The Hopper kernel of a base projection with the deltas of few adapters: its plan, interpreted, lowered to CUDA, and
(marked gpu) on the machine.
"""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from lora_batches import MEDIUM, TINY, WIDE, Batch, abstract, abstract_table, geometry
import numpy as np
from oracles import relative_error
import pytest

from pallas_kernels import FEW_TOKENS, lora_matmul
from pallas_kernels.geometry import GROUPS, MODULES
from pallas_kernels.lora.arg_specs import SPECS
from pallas_kernels.lora.config import CLUSTERS
from pallas_kernels.lora.few_plan import FIRST, GRANULES, LAST, SCALE
from pallas_kernels.lora.few_stripes import MOST_WIDE, Stripes
from pallas_kernels.lora.kernel_few_sm90 import unsupported
from pallas_kernels.lora.kernel_sm90 import Matrices, _make_few_plan, few_sm90

_GEOMETRY = {name.split("_")[0]: spec.geometry for name, spec in SPECS.items()}
NARROW = geometry(320, 64, 448, heads=5, kv_heads=1)  # widths of an odd number of tiles
LARGE = geometry(2048, 1024, 5632, heads=16, kv_heads=8, dim=128)


class Few:
    """A batch of tokens, and base weights whose product with them is the batch's base output."""

    def __init__(self, g, ranks, lengths, adapters, group, padding=0, seed=0):
        self.batch = batch = Batch(g, ranks, lengths, adapters, group, padding=padding, seed=seed)
        width = batch.x.shape[1], batch.out.shape[1]
        weights = np.random.default_rng(5).standard_normal((g.num_layers, *width)) / 16
        self.weights = jnp.asarray(weights, jnp.bfloat16)

    def run(self, interpret=None, x=None, pages=None):
        batch = self.batch
        options = dict(layer=batch.layer, group=batch.group, interpret=interpret)

        @jax.jit
        def run(x, weights, pages, table, *segments):
            adapters = Matrices(table=table, geometry=batch.geometry)
            return few_sm90(x, weights, pages, adapters, *segments, **options)

        segments = jnp.asarray(batch.seg_start), jnp.asarray(batch.adapters, jnp.int32)
        x, pages = batch.x if x is None else x, batch.pages if pages is None else pages
        return np.asarray(run(x, self.weights, pages, batch.table, *segments))

    def check(self, result):
        batch = self.batch
        base = np.asarray(batch.x, np.float64) @ np.asarray(self.weights[batch.layer], np.float64)
        batch.out = jnp.asarray(base, jnp.bfloat16)
        assert relative_error(result, batch.expected()) < 5e-3


@pytest.mark.parametrize(
    "g, ranks, lengths, adapters, group, padding",
    [
        (TINY, [[16] * 7], (8,), (0,), "qkv", 0),
        (TINY, [[8] * 7, [4, 0, 24, 8, 8, 1, 30], [64, 12, 16, 50, 8, 8, 40]], (3, 1, 7, 12), (0, -1, 1, 2), "qkv", 1),
        (WIDE, [[64] * 7, [56, 64, 8, 32, 64, 8, 8]], (40, 24), (1, 0), "gu", 0),
        (NARROW, [[12] * 7, [100, 8, 8, 100, 8, 8, 90]], (5, 11), (0, 1), "o", 0),
        (geometry(256, 128, 1024, kv_heads=4), [[16] * 7, [8] * 6 + [112]], (9, 1, 6), (0, -1, 1), "down", 0),
        (WIDE, [[16] * 7], (10, 6), (-1, -1), "o", 8),
    ],
    ids=["one", "mixed", "full", "odd", "down", "none"],
)
def test_interpreted(g, ranks, lengths, adapters, group, padding):
    few = Few(g, ranks, lengths, adapters, group, padding)
    few.check(few.run(interpret=plgpu.InterpretGPUParams()))


@settings(max_examples=10, deadline=None)
@given(
    ranks=st.lists(st.lists(st.integers(0, 60), min_size=7, max_size=7), min_size=1, max_size=4),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    chosen=st.lists(st.integers(-1, 3), min_size=8, max_size=8),
    seed=st.integers(0, 99),
)
def test_plan_finds_every_granule(ranks, lengths, chosen, seed):
    """What lies at the places that it names is what the adapters have, in order, and each rank knows its tokens."""
    adapters = [min(a, len(ranks) - 1) for a in chosen]
    lengths = lengths + [0] * (len(chosen) - len(lengths))
    batch = Batch(TINY, ranks, lengths, adapters, "qkv", seed=seed)
    g, table = TINY, batch.table
    segments = jnp.asarray(batch.seg_start), jnp.asarray(adapters, jnp.int32)
    plan = _make_few_plan(table, *segments, num_pages=batch.pages.shape[1], geometry=g)
    a_tiles, b_tiles = ([np.asarray(t) for t in tiles] for tiles in (plan.a_tiles, plan.b_tiles))
    count, ranks_of = np.asarray(plan.count), np.asarray(plan.ranks)
    first, last, scales = (ranks_of[:, :, row] for row in (FIRST, LAST, SCALE))
    tiles = np.asarray(batch.pages, np.float32).reshape(-1, 8, 64)
    for layer, m in np.ndindex(g.num_layers, len(MODULES)):
        group, place = next((i, ms.index(m)) for i, ms in enumerate(GROUPS.values()) if m in ms)
        owners = [(s, a) for s, a in enumerate(adapters) if a >= 0 and lengths[s]]
        owned = [(s, a, n) for s, a in owners for n in range(-(-ranks[a][m] // 8))]
        assert count[layer, m] == min(len(owned), GRANULES)
        scale = scales[layer, m]
        if len(owned) > GRANULES:
            assert np.isnan(scale).all()
            continue
        for n, (s, a, granule) in enumerate(owned):
            left, right = batch.factors[a][layer, m]
            rows = slice(8 * granule, min(8 * granule + 8, ranks[a][m]))
            at = tiles[a_tiles[group][layer, place, n]]
            found = at.transpose(1, 0, 2).reshape(8, -1)[: rows.stop - rows.start]
            np.testing.assert_array_equal(found[:, : g.in_sizes[m]], left[rows])
            width = g.out_tiles(m)
            at = tiles[b_tiles[group][layer, place, n, :width]]
            found = at.transpose(1, 0, 2).reshape(8, -1)[: rows.stop - rows.start]
            np.testing.assert_array_equal(found[:, : g.out_sizes[m]], right[:, rows].T)
            its = slice(8 * n, 8 * n + 8)
            assert set(first[layer, m, its]) == {batch.seg_start[s]}
            assert set(last[layer, m, its]) == {batch.seg_start[s + 1]}
            np.testing.assert_array_equal(scale[its], batch.scaling[a, layer, m])
        rest = slice(8 * len(owned), None)
        assert (first[layer, m, rest] >= last[layer, m, rest]).all()


@given(hidden=st.integers(1, 130), kv=st.integers(1, 40), mlp=st.integers(1, 450), group=st.sampled_from(list(GROUPS)))
def test_pairs_share_every_stripe(hidden, kv, mlp, group):
    g = geometry(64 * hidden, 64 * kv, 64 * mlp, kv_heads=kv)
    stripes, found = Stripes.of(g, group), []
    assert stripes.width <= MOST_WIDE
    module, first, passes, _ = _of_pairs(stripes)
    for begin, count in passes:
        found += [(m, f + b + i) for m, f, b, n in zip(module, first, begin, count, strict=True) for i in range(n)]
    modules, first = GROUPS[group], 0
    wanted = []
    for m in modules:
        wanted += [(m, first + i) for i in range(g.out_tiles(m))]
        first += g.out_tiles(m)
    assert sorted(found) == sorted(wanted)


def _of_pairs(stripes):
    """Of all pairs: module, its first stripe, first stripe and number of each pass, and stripes in all."""

    def of_pair(pair):
        mine = stripes.of_pair(pair)
        passes = [mine.pass_of(number) for number in range(stripes.passes)]
        return mine.module, mine.first, passes, mine.end - mine.begin

    return jax.tree.map(lambda found: found.tolist(), jax.vmap(of_pair)(jnp.arange(CLUSTERS)))


@pytest.mark.parametrize(
    "name, widest", [("7b", dict(qkv=3, o=1, gu=6, down=1)), ("8b", dict(qkv=2, o=1, gu=7, down=1))]
)
def test_pairs_have_about_the_same(name, widest):
    """As few stripes as the longest of the modules' even shares."""
    for group, most in widest.items():
        stripes = Stripes.of(_GEOMETRY[name], group)
        assert max(_of_pairs(stripes)[-1]) == most


def _lower(g, group, tokens, few_adapters=True):
    spec = next(s for s in SPECS.values() if s.geometry == g)
    modules = GROUPS[group]

    def run(x, weights, pages, table, *segments):
        options = dict(layer=3, group=group, max_rank=64, implementation="mosaic", few_adapters=few_adapters)
        geometries = dict(shrink_geometry=g, expand_geometry=g)
        return lora_matmul(x, weights, lambda: x @ weights[3], pages, table, table, *segments, **geometries, **options)

    widths = g.in_sizes[modules[0]], sum(g.out_sizes[m] for m in modules)
    pages = abstract((g.num_layers, 1000, g.page_elements), jnp.bfloat16)
    x, weights = abstract((tokens, widths[0]), jnp.bfloat16), abstract((g.num_layers, *widths), jnp.bfloat16)
    segments = abstract((tokens + 1,)), abstract((tokens,))
    traced = jax.jit(run).trace(x, weights, pages, abstract_table(spec), *segments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", ["7b", "8b"])
def test_lowers_to_cuda(name, group):
    lowered = _lower(_GEOMETRY[name], group, 64)
    assert lowered.count("@mosaic_gpu_v2") == 1
    assert "dot_general" not in lowered


def test_small_steps_share_their_kernels():
    hashes = [set(re.findall(r'kernel_hash = "([^"]*)"', _lower(_GEOMETRY["8b"], "o", n))) for n in (8, 40, 64)]
    assert len(hashes[0]) == 1 and hashes[0] == hashes[1] == hashes[2]


def test_other_steps_keep_the_product_to_themselves():
    g = _GEOMETRY["8b"]
    assert "dot_general" in _lower(g, "o", FEW_TOKENS + 8)
    assert "dot_general" in _lower(g, "o", 64, few_adapters=False)


def test_unsupported_names_the_reason():
    x, weights = jnp.zeros((64, 512), jnp.bfloat16), jnp.zeros((2, 512, 1024), jnp.bfloat16)
    assert unsupported(x, weights, WIDE, WIDE) is None
    assert "4 tokens" in unsupported(x[:4], weights, WIDE, WIDE)
    assert "float32" in unsupported(x, weights.astype(jnp.float32), WIDE, WIDE)
    assert "cut differently" in unsupported(x, weights, WIDE, TINY)
    assert "too narrow" in unsupported(x[:, :192], weights[:, :192], WIDE, WIDE)


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "lengths, adapters",
    [((64,), (0,)), ((8,) * 8, (1, 2, 3, 4, 5, 6, 7, 8)), ((1,) * 40, (1, -1) * 4 + (-1,) * 32), ((3, 5), (9, 1))],
    ids=["one", "eight", "between", "few tokens"],
)
@pytest.mark.parametrize("g", [TINY, NARROW, MEDIUM, LARGE], ids=["tiny", "narrow", "medium", "large"])
def test_on_gpu(g, lengths, adapters, group):
    """As the reference has it, with the same bits again and again."""
    few = Few(
        g, [[64] * 7] + [[16, 8, 4, 16, 12, 16, 16]] * 8 + [[100, 0, 112, 88, 1, 104, 96]], lengths, adapters, group
    )
    result = few.run()
    few.check(result)
    for _ in range(10):
        np.testing.assert_array_equal(few.run().view(np.uint16), result.view(np.uint16))


@pytest.mark.gpu
def test_others_do_not_matter_on_gpu():
    """Neither which tokens stand beside one, nor where its adapter lies."""
    ranks = [[16] * 7, [40] * 7]
    alone = Few(MEDIUM, ranks, (8,), (0,), "o")
    expected = alone.run()
    beside = Few(MEDIUM, ranks, (8, 30, 26), (0, 1, -1), "o")
    x = beside.batch.x.at[:8].set(alone.batch.x)
    np.testing.assert_array_equal(beside.run(x=x)[:8].view(np.uint16), expected.view(np.uint16))


@pytest.mark.gpu
def test_a_broken_promise_shows_on_gpu():
    few = Few(MEDIUM, [[72] * 7], (8, 8, 8), (0, -1, 0), "o")
    result = few.run()
    assert np.isnan(result[:8]).all() and np.isfinite(result[8:16]).all()
