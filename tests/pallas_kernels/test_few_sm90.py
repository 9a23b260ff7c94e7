"""The Hopper kernel of a base projection with the deltas of few adapters: its plan, interpreted, lowered to CUDA, and
(marked gpu) on the machine.
"""

import dataclasses
import re

from few_batches import LARGE, LEAST, NARROW, OWN, RANKS, TWICE, Few, lower
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from lora_batches import MEDIUM, TINY, WIDE, Batch, geometry
import numpy as np
import pytest

from pallas_kernels import FEW_TOKENS
from pallas_kernels.geometry import GROUPS, MODULES
from pallas_kernels.lora import kernel_few_sm90
from pallas_kernels.lora.arg_specs import SPECS
from pallas_kernels.lora.config import CLUSTERS, few_ranks
from pallas_kernels.lora.few_items import FewItems, shares_of
from pallas_kernels.lora.few_plan import A_TILE, B_TILE, FIRST, IS_USED, LAST, PAGE_START, PAGES, SCALE
from pallas_kernels.lora.few_stripes import MOST_WIDE, Stripes
from pallas_kernels.lora.kernel_few_sm90 import unsupported
from pallas_kernels.lora.kernel_sm90 import _make_few_plan
from pallas_kernels.lora.mosaic_common import ChunkSource

_GEOMETRY = {name.split("_")[0]: spec.geometry for name, spec in SPECS.items()}
_HALVED = dict(least=LEAST, narrow=NARROW, medium=MEDIUM, large=LARGE)
_ON_GPU = {f"{name}-{group}": (g, group) for name, g in _HALVED.items() for group in GROUPS}
_ON_GPU |= {"own-gu": (OWN, "gu"), "twice-gu": (TWICE, "gu")}


@pytest.mark.parametrize(
    "g, ranks, lengths, adapters, group, padding",
    [
        (LEAST, [[16] * 7], (8,), (0,), "qkv", 0),
        (LEAST, [[8] * 7, [4, 0, 24, 8, 8, 1, 30], [64, 12, 16, 50, 8, 8, 40]], (3, 1, 7, 12), (0, -1, 1, 2), "qkv", 1),
        (WIDE, [[64] * 7, [56, 64, 8, 32, 64, 8, 8]], (40, 24), (1, 0), "gu", 0),
        (NARROW, [[12] * 7, [100, 8, 8, 100, 8, 8, 90]], (5, 11), (0, 1), "o", 0),
        (geometry(384, 128, 1024, kv_heads=4), [[16] * 7, [8] * 6 + [112]], (9, 1, 6), (0, -1, 1), "down", 0),
        (WIDE, [[16] * 7], (10, 6), (-1, -1), "o", 8),
    ],
    ids=["one", "mixed", "full", "odd", "down", "none"],
)
def test_interpreted(g, ranks, lengths, adapters, group, padding):
    few = Few(g, ranks, lengths, adapters, group, padding)
    few.check(few.run(interpret=plgpu.InterpretGPUParams()))


@settings(max_examples=10, deadline=None)
@given(
    ranks=st.lists(st.lists(st.integers(0, 60), min_size=7, max_size=7), min_size=4, max_size=4),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    chosen=st.lists(st.integers(-1, 3), min_size=8, max_size=8),
    blocks=st.sampled_from([2, 4]),
    lists=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_plan_finds_every_granule(ranks, lengths, chosen, blocks, lists, seed):
    """What lies where it says is what the adapters have, in order, and each rank knows its tokens."""
    adapters, lengths = chosen, lengths + [0] * (len(chosen) - len(lengths))
    batch = Batch(TINY, ranks, lengths, adapters, "qkv", seed=seed)
    g, pages = TINY, batch.table.pages
    table = dataclasses.replace(batch.table, pages=jnp.pad(pages, (0, 999 - len(pages))))  # few programs for all
    segments = jnp.asarray(batch.seg_start), jnp.asarray(adapters, jnp.int32)
    plan = _make_few_plan(table, *segments, blocks=blocks, geometry=g, lists=lists)
    records = np.asarray(plan.records).reshape(g.num_layers, 7, 8 * blocks, -1)
    count, ranks_of = np.asarray(plan.count), np.asarray(plan.ranks).transpose(0, 1, 3, 2, 4)
    first, last, scales = (ranks_of[:, :, row].reshape(g.num_layers, 7, -1) for row in (FIRST, LAST, SCALE))
    tiles, page_ids = np.asarray(batch.pages, np.float32).reshape(-1, 8, 64), np.asarray(plan.page_ids)
    source = ChunkSource(geometry=g, num_pages=batch.pages.shape[1], chunk=1, whole=False)
    assert not plan.signals.any()

    def granule(record, field, width):
        """[8, columns], by the page ids of the record where it has them."""
        first, start = int(record[field]), int(record[PAGE_START])
        known = [int(record[PAGES[field] + i]) for i in range(2)]
        number = first // g.tiles_per_page_id
        assert known[0] == page_ids[start + number]
        if (first + width - 1) // g.tiles_per_page_id == number + 1:
            assert known[1] == page_ids[start + number + 1]
        at = [int(source.locate(first + i, lambda n: page_ids[start + n])) for i in range(width)]
        return tiles[at].transpose(1, 0, 2).reshape(8, -1)

    for layer, m in np.ndindex(g.num_layers, len(MODULES)):
        users = [(s, a) for s, a in enumerate(adapters) if a >= 0 and lengths[s]]
        granules_of = [[] for _ in range(lists)]
        for s, a in sorted(users, key=lambda user: -few_ranks(ranks[user[1]][m])):
            taken, own = few_ranks(ranks[a][m]) // lists, -(-ranks[a][m] // 8)
            assert taken in (0, 16 // lists, 32 // lists) or taken % (64 // lists) == 0
            for i, owned in enumerate(granules_of):
                assert not taken or 8 * len(owned) % min(taken, 64 // lists) == 0
                numbers = range(i, own, lists)
                owned += [(s, a, n) for n in numbers] + [None] * (taken // 8 - len(numbers))
        most, scale = len(granules_of[0]), scales[layer, m]
        assert count[layer, m] == lists * min(-(-most // 8), blocks // lists)
        if lists * most > 8 * blocks:
            assert np.isnan(scale[scale != 0]).all() and np.isnan(scale).any()
            continue
        for n in range(8 * blocks):
            owned, at = granules_of[n // 8 % lists], n // (8 * lists) * 8 + n % 8
            one = owned[at] if at < most else None
            record, its = records[layer, m, n], slice(8 * n, 8 * n + 8)
            assert record[IS_USED] == (one is not None)
            if one is None:
                assert (first[layer, m, its] >= last[layer, m, its]).all()
                continue
            s, a, number = one
            left, right = batch.factors[a][layer, m]
            rows = slice(8 * number, min(8 * number + 8, ranks[a][m]))
            found = granule(record, A_TILE, g.in_tiles(m))[: rows.stop - rows.start]
            np.testing.assert_array_equal(found[:, : g.in_sizes[m]], left[rows])
            found = granule(record, B_TILE, g.out_tiles(m))[: rows.stop - rows.start]
            np.testing.assert_array_equal(found[:, : g.out_sizes[m]], right[:, rows].T)
            assert set(first[layer, m, its]) == {batch.seg_start[s]}
            assert set(last[layer, m, its]) == {batch.seg_start[s + 1]}
            np.testing.assert_array_equal(scale[its], batch.scaling[a, layer, m])


@given(hidden=st.integers(1, 130), kv=st.integers(1, 40), mlp=st.integers(1, 450), group=st.sampled_from(list(GROUPS)))
def test_pairs_share_every_stripe(hidden, kv, mlp, group):
    g = geometry(64 * hidden, 64 * kv, 64 * mlp, kv_heads=kv)
    stripes, found = Stripes.of(g, group), []
    assert stripes.width <= MOST_WIDE
    module, first, passes, _ = _of_thread_blocks(stripes)
    for begin, count in passes:
        found += [(m, f + b + i) for m, f, b, n in zip(module, first, begin, count, strict=True) for i in range(n)]
    modules, first = GROUPS[group], 0
    wanted = []
    for m in modules:
        wanted += [(m, first + i) for i in range(g.out_tiles(m))]
        first += g.out_tiles(m)
    assert sorted(found) == sorted(wanted)
    counts = np.array([count for _, count in passes])
    assert counts.max() <= stripes.width and (np.diff(counts, axis=0) <= 0).all()


def _of_thread_blocks(stripes):
    """Of all that have stripes of their own: module, its first stripe, first stripe and number of each pass, and all
    their stripes.
    """

    def of_one(number):
        mine = stripes.of_pair(number // stripes.each, number % stripes.each)
        return mine.module, mine.first, mine.passes, sum(count for _, count in mine.passes)

    return jax.tree.map(lambda found: found.tolist(), jax.vmap(of_one)(jnp.arange(CLUSTERS * stripes.each)))


@pytest.mark.parametrize(
    "name, widest", [("7b", dict(qkv=3, o=1, gu=3, down=1)), ("8b", dict(qkv=2, o=1, gu=4, down=1))]
)
def test_thread_blocks_have_about_the_same(name, widest):
    """As few stripes as the longest of the modules' even shares, which only narrow outputs have two take together."""
    for group, most in widest.items():
        stripes = Stripes.of(_GEOMETRY[name], group)
        assert max(_of_thread_blocks(stripes)[-1]) == most
        assert stripes.each == (2 if group == "gu" else 1)


@settings(max_examples=30, deadline=None)
@given(
    widths=st.tuples(st.integers(1, 130), st.integers(1, 40), st.integers(1, 450)),
    group=st.sampled_from(list(GROUPS)),
    blocks=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    stages=st.integers(2, 99),
)
def test_pairs_take_every_item(widths, group, blocks, stages):
    """Once, those with less to do first."""
    hidden, kv, mlp = widths
    stripes = Stripes.of(geometry(64 * hidden, 64 * kv, 64 * mlp, kv_heads=kv), group)
    modules = GROUPS[group]
    blocks = blocks[: len(modules)]
    shares = shares_of(stripes, 3, stages)
    assert shares <= stages // 2 and FEW_TOKENS % (2 * shares) == 0
    counts, having, items = _items(stripes, blocks, shares)
    found = []
    for pair, count in enumerate(counts):
        found += [tuple(int(field[pair, j]) for field in items) for j in range(count)]
    wanted = [(m, i, b, s) for i, m in enumerate(modules) for b in range(blocks[i]) for s in range(shares)]
    assert sorted(found) == sorted(wanted)
    light = having < having.max()
    assert sum(light) == stripes.light
    assert counts[light].min(initial=99) >= counts[~light].max()


def _items(stripes, blocks, shares):
    """Of all pairs: how many items and stripes each has, and its items."""

    def of_pair(pair):
        mine = stripes.of_pair(pair, 0)
        other = stripes.of_pair(pair, 1) if stripes.each == 2 else None
        having = sum(count for of in (mine, other) if of for _, count in of.passes)
        blocks_of = [jnp.int32(n) for n in blocks]
        items = FewItems(stripes=mine, blocks=blocks_of, shares=shares, part=0, parts=1, own=False)
        most = -(-sum(blocks) * shares // CLUSTERS)
        return items.count, having, jax.vmap(items.item)(jnp.arange(max(most, 1)))

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(of_pair))(jnp.arange(CLUSTERS)))


@pytest.mark.parametrize(
    "name, wanted", [("7b", dict(qkv=8, o=8, gu=8, down=8)), ("8b", dict(qkv=4, o=8, gu=8, down=8))]
)
def test_no_pair_shrinks_twice(name, wanted):
    g = _GEOMETRY[name]
    for group, modules in GROUPS.items():
        stripes = Stripes.of(g, group)
        shares = shares_of(stripes, 2, g.in_tiles(modules[0]))
        counts, having, _ = _items(stripes, [2] * len(modules), shares)
        assert shares == wanted[group]
        assert counts.max() == 1
        assert stripes.light < CLUSTERS // 2 or not counts[having == having.max()].any()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", ["7b", "8b"])
def test_lowers_to_cuda(name, group):
    lowered = lower(_GEOMETRY[name], group, 64).as_text()
    assert lowered.count("@mosaic_gpu_v2") == 1
    assert "dot_general" not in lowered


def test_small_steps_share_their_kernels():
    hashes = [
        set(re.findall(r'kernel_hash = "([^"]*)"', lower(_GEOMETRY["8b"], "o", n).as_text())) for n in (8, 40, 64)
    ]
    assert len(hashes[0]) == 1 and hashes[0] == hashes[1] == hashes[2]


def test_other_steps_keep_the_product_to_themselves():
    g = _GEOMETRY["8b"]
    assert "dot_general" in lower(g, "o", FEW_TOKENS + 8).as_text()
    assert "dot_general" in lower(g, "o", 64, few_adapters=False).as_text()


def test_unsupported_names_the_reason(monkeypatch):
    x, weights = jnp.zeros((64, 512), jnp.bfloat16), jnp.zeros((2, 512, 1024), jnp.bfloat16)
    assert unsupported(x, weights, WIDE, WIDE) is None
    assert "4 tokens" in unsupported(x[:4], weights, WIDE, WIDE)
    assert "float32" in unsupported(x, weights.astype(jnp.float32), WIDE, WIDE)
    assert "cut differently" in unsupported(x, weights, WIDE, TINY)
    assert "too narrow" in unsupported(x[:, :192], weights[:, :192], WIDE, WIDE)
    monkeypatch.setattr(kernel_few_sm90, "sm_count", lambda: 114)
    assert "114 multiprocessors" in unsupported(x, weights, WIDE, WIDE)


def test_what_runs_on_gpu_halves_inputs_or_not():
    shapes = {name: Stripes.of(g, group) for name, (g, group) in _ON_GPU.items()}
    assert {name for name, stripes in shapes.items() if stripes.each == 2} == {"own-gu", "twice-gu"}
    assert shapes["own-gu"].passes == 1 and shapes["twice-gu"].passes == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths, adapters",
    [
        ((64,), (0,)),
        ((8,) * 8, (1, 2, 3, 4, 5, 6, 7, 8)),
        ((1,) * 40, (1, -1) * 4 + (-1,) * 32),
        ((3, 5), (9, 1)),
        ((1, 2, 22, 1, 30), (3, 10, 0, -1, 4)),
    ],
    ids=["one", "eight", "between", "few tokens", "mixed"],
)
@pytest.mark.parametrize("g, group", _ON_GPU.values(), ids=_ON_GPU)
def test_on_gpu(g, lengths, adapters, group):
    """As the reference has it, with the same bits again and again, other activations in between."""
    few = Few(g, RANKS, lengths, adapters, group)
    run, others = few.program(), few.batch.x[::-1] + 1
    result, other = run(few.batch.x), run(others)
    few.check(result)
    for _ in range(10):
        np.testing.assert_array_equal(run(few.batch.x).view(np.uint16), result.view(np.uint16))
        np.testing.assert_array_equal(run(others).view(np.uint16), other.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "g, group, rank", [*((MEDIUM, "o", rank) for rank in (4, 8, 16, 24, 40, 72)), (OWN, "gu", 16), (TWICE, "gu", 40)]
)
def test_others_do_not_matter_on_gpu(g, group, rank):
    """Neither which tokens stand beside one, nor where its adapter and its ranks lie."""
    ranks = [[rank] * 7, [40] * 7, [8] * 7]
    alone = Few(g, ranks, (8,), (0,), group)
    expected = alone.run(most_ranks=384)
    for lengths, adapters in [((8, 30, 26), (0, 1, -1)), ((6, 8, 20, 30), (1, 0, 2, 0)), ((1, 1, 8), (2, 2, 0))]:
        beside = Few(g, ranks, lengths, adapters, group, padding=-sum(lengths) % 8, seed=3)
        at = sum(lengths[: adapters.index(0)])
        beside.batch.factors, beside.batch.scaling = alone.batch.factors, alone.batch.scaling
        beside.batch.x = beside.batch.x.at[at : at + 8].set(alone.batch.x[:8])
        beside.batch.pages, beside.batch.table = alone.batch.pages, alone.batch.table
        result = beside.run(most_ranks=384)[at : at + 8]
        np.testing.assert_array_equal(result.view(np.uint16), expected[:8].view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("g, group", [*((MEDIUM, group) for group in GROUPS), (OWN, "gu")])
def test_calls_of_one_program_share_a_plan_on_gpu(g, group):
    few = Few(g, RANKS, (8,) * 8, (1, 2, 3, 4, 5, 6, 7, 8), group)
    assert few.calls_share_a_plan()


@pytest.mark.gpu
def test_a_broken_promise_shows_on_gpu():
    few = Few(MEDIUM, [[72] * 7], (8, 8, 8), (0, -1, 0), "o")
    result = few.run(most_ranks=128)
    assert np.isnan(result[:8]).all() and np.isfinite(result[8:16]).all()
