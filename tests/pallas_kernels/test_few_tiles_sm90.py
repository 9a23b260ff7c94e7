"""The Hopper kernel of a base projection of 256 tokens with the deltas of few adapters: interpreted, lowered to CUDA,
and (marked gpu) on the machine.
"""

from few_batches import LARGE, LEAST, NARROW, OWN, RANKS, TWICE, WIDER, Few, lower
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from lora_batches import MEDIUM, WIDE, geometry
import numpy as np
import pytest

from pallas_kernels import FEW_TILE_TOKENS
from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora import kernel_few_tiles_sm90
from pallas_kernels.lora.arg_specs import SPECS
from pallas_kernels.lora.config import CLUSTERS
from pallas_kernels.lora.few_items import WindowItems
from pallas_kernels.lora.few_stripes import Stripes
from pallas_kernels.lora.kernel_few_tiles_sm90 import is_wide, unsupported

_GEOMETRY = {name.split("_")[0]: spec.geometry for name, spec in SPECS.items()}
_SHAPES = dict(least=LEAST, narrow=NARROW, medium=MEDIUM, large=LARGE, own=OWN, twice=TWICE)
_ON_GPU = {f"{name}-{group}": (g, group) for name, g in _SHAPES.items() for group in ("qkv", "gu")}
_ON_GPU |= {"wider-qkv": (WIDER, "qkv")}


@pytest.mark.parametrize(
    "g, ranks, lengths, adapters, group, padding",
    [
        (WIDE, [[16] * 7], (256,), (0,), "qkv", 0),
        (
            LEAST,
            [[8] * 7, [4, 0, 24, 8, 8, 1, 30], [64, 12, 16, 50, 8, 8, 40]],
            (30, 101, 7, 100),
            (0, -1, 1, 2),
            "qkv",
            18,
        ),
        (NARROW, [[64] * 7, [56, 64, 8, 32, 64, 60, 8]], (140, 116), (1, 0), "gu", 0),
        (geometry(384, 128, 1024, kv_heads=4), [[16] * 7], (256,), (-1,), "gu", 0),
    ],
    ids=["one", "mixed", "odd", "none"],
)
def test_interpreted(g, ranks, lengths, adapters, group, padding):
    few = Few(g, ranks, lengths, adapters, group, padding)
    assert len(few.batch.x) == FEW_TILE_TOKENS
    few.check(few.run(interpret=plgpu.InterpretGPUParams()))


def test_windows_do_not_share_sums_nor_tiles_signals():
    stripes = Stripes.of(LEAST, "qkv", CLUSTERS, 1)
    signals, rows = [], []
    for window in range(4):
        options = dict(blocks=[2, 2, 2], shares=4, part=0, parts=1, own=False)
        options |= dict(window=window, windows=4, tile=window // 2, tiles=2)
        items = WindowItems(stripes=stripes.of_pair(0, 0), **options)
        for place, block in np.ndindex(3, 2):
            found = int(items.signal(1, 2, place, block))
            signals += [found, found + 1]
            first = [int(items.y_row(place, block, summand)) for summand in range(items.summands + 1)]
            rows += [row + i for row in first for i in range(64)]
    assert max(signals) < 2 * 2 * 7 * 2 * 2
    assert all(signals.count(signal) == 2 for signal in signals)  # of two windows
    assert len(set(signals)) == 2 * 3 * 2 * 2
    assert sorted(rows) == list(range(4 * 3 * 2 * 5 * 64))


@pytest.mark.parametrize("group", ["qkv", "gu"])
def test_lowers_to_cuda(group):
    lowered = lower(_GEOMETRY["7b"], group, FEW_TILE_TOKENS).as_text()
    assert lowered.count("@mosaic_gpu_v2") == 1
    assert "dot_general" not in lowered


def test_others_keep_the_product_to_themselves():
    g = _GEOMETRY["7b"]
    for group, tokens, few in [("o", 256, True), ("down", 256, True), ("qkv", 128, True), ("qkv", 256, False)]:
        assert "dot_general" in lower(g, group, tokens, few_adapters=few).as_text()


def test_unsupported_names_the_reason(monkeypatch):
    x, weights = jnp.zeros((256, 512), jnp.bfloat16), jnp.zeros((2, 512, 1024), jnp.bfloat16)
    assert unsupported(x, weights, WIDE, WIDE) is None
    assert "float32" in unsupported(x, weights.astype(jnp.float32), WIDE, WIDE)
    assert "cut differently" in unsupported(x, weights, WIDE, MEDIUM)
    assert "an input of 64" in unsupported(x[:, :64], weights[:, :64], WIDE, WIDE)
    monkeypatch.setattr(kernel_few_tiles_sm90, "sm_count", lambda: 114)
    assert "114 multiprocessors" in unsupported(x, weights, WIDE, WIDE)


@pytest.mark.parametrize("name, wide", [("7b", {"qkv", "gu"}), ("8b", set())])
def test_wide_groups(name, wide):
    assert {group for group in GROUPS if is_wide(_GEOMETRY[name], group)} == wide


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths, adapters",
    [
        ((256,), (0,)),
        ((32,) * 8, (1, 2, 3, 4, 5, 6, 7, 8)),
        ((1,) * 40 + (216,), (1, -1) * 4 + (-1,) * 32 + (0,)),
        ((100, 156), (9, 1)),
        ((1, 62, 22, 100, 1, 70), (3, 10, 0, -1, 4, 5)),
        ((256,), (-1,)),
    ],
    ids=["one", "eight", "between", "large", "mixed", "none"],
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
    "g, group, rank",
    [
        *((MEDIUM, "qkv", rank) for rank in (4, 8, 16, 24, 40, 72)),
        (OWN, "gu", 16),
        (TWICE, "gu", 40),
        (WIDER, "qkv", 16),
    ],
)
def test_others_do_not_matter_on_gpu(g, group, rank):
    """Neither which tokens stand beside one, nor where its adapter and its ranks lie."""
    ranks = [[rank] * 7, [40] * 7, [8] * 7]
    alone = Few(g, ranks, (8,), (0,), group, padding=248)
    expected = alone.run(most_ranks=384)
    cases = [((8, 130, 118), (0, 1, -1)), ((6, 8, 20, 222), (1, 0, 2, 0)), ((101, 99, 8, 48), (2, -1, 0, 2))]
    for lengths, adapters in cases:
        beside = Few(g, ranks, lengths, adapters, group, seed=3)
        at = sum(lengths[: adapters.index(0)])
        beside.batch.factors, beside.batch.scaling = alone.batch.factors, alone.batch.scaling
        beside.batch.x = beside.batch.x.at[at : at + 8].set(alone.batch.x[:8])
        beside.batch.pages, beside.batch.table = alone.batch.pages, alone.batch.table
        result = beside.run(most_ranks=384)[at : at + 8]
        np.testing.assert_array_equal(result.view(np.uint16), expected[:8].view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("g, group", [(WIDER, "qkv"), (LARGE, "gu"), (OWN, "gu")])
def test_calls_of_one_program_share_a_plan_on_gpu(g, group):
    assert is_wide(g, group)
    few = Few(g, RANKS, (32,) * 8, (1, 2, 3, 4, 5, 6, 7, 8), group)
    assert few.calls_share_a_plan()


@pytest.mark.gpu
def test_a_broken_promise_shows_on_gpu():
    few = Few(MEDIUM, [[72] * 7], (100, 56, 100), (0, -1, 0), "qkv")
    result = few.run(most_ranks=128)
    assert np.isnan(result[:100]).all() and np.isfinite(result[100:156]).all()
