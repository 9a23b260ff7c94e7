"""The Hopper LoRA kernels against float64: interpreted, lowered to CUDA, and (marked gpu) on the machine."""

import dataclasses
import functools
import re

import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from lora_batches import MEDIUM, ODD, RANKS, TINY, WIDE, Batch, abstract, abstract_table, geometry
import numpy as np
import pytest

from pallas_kernels import lora_add
from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.arg_specs import SPECS
from pallas_kernels.lora.config import SHORT_STEP, LoraConfig, chunk_tiles, default_config
from pallas_kernels.lora.kernel_sm90 import expand_sm90, shrink_sm90, unsupported
from pallas_kernels.lora.plan import (
    NUM_TOKENS,
    OFFSET,
    TOKEN,
    group_fields,
    group_loads,
    make_plan,
    max_token_blocks,
    module_field,
    module_pages,
)

LENGTHS = (1, 0, 3, 9, 2, 8, 1, 17, 1, 1, 5, 40, 1)
ADAPTERS = (0, 1, -1, 2, 3, 4, 5, 6, 7, 8, 9, 0, -1)


SMALL = LoraConfig(
    num_splits=2, range_tiles=4, shrink_stages=2, expand_stages=2, out_slots=2, shrink_ctas=2, expand_ctas=2
)


@pytest.mark.parametrize(
    "g, ranks, lengths, adapters, group, config",
    [
        (TINY, [[8] * 7, [16, 4, 0, 8, 40, 80, 8]], (1, 3, 2), (0, -1, 1), "gu", SMALL),
        (TINY, [[8] * 7, [16, 4, 0, 8, 40, 80, 8]], (1, 3, 2), (0, -1, 1), "qkv", SMALL),
        (WIDE, [[8] * 7, [16, 4, 0, 8, 40, 80, 8]], (1, 3, 2), (0, -1, 1), "qkv", SMALL),
        (
            WIDE,
            [[80, 8, 8, 8, 8, 8, 8], [16, 4, 0, 8, 40, 80, 8]],
            (1, 9, 2),
            (0, 1, 1),
            "qkv",
            dataclasses.replace(SMALL, num_splits=1),
        ),
        (
            ODD,
            [[8] * 7, [16, 4, 0, 24, 40, 80, 8]],
            (1, 3, 19, 0),
            (0, -1, 1, 0),
            "o",
            dataclasses.replace(SMALL, block_tokens=16, expand_packed=2),
        ),
        (
            TINY,
            [[8] * 7, [16, 4, 0, 8, 40, 80, 8]],
            (1, 18, 2, 17, 16),
            (0, 1, -1, 0, 1),
            "gu",
            (SMALL, dataclasses.replace(SMALL, block_tokens=16, expand_packed=2)),
        ),
    ],
    ids=["gu", "qkv", "wide", "wide-high-rank", "odd-widths-long-blocks", "short-and-long"],
)
def test_interpreted(g, ranks, lengths, adapters, group, config):
    batch = Batch(g, ranks, lengths, adapters, group)
    batch.check(batch.run(config, interpret=plgpu.InterpretGPUParams()))


def test_plan_lists_every_token_block_once():
    batch = Batch(TINY, [[8] * 7, [0] * 7, [200, 16, 0, 8, 8, 8, 8]], (9, 4, 1, 0, 17), (0, 1, -1, 0, 2), "qkv")
    plan = make_plan(
        batch.table,
        jnp.asarray(batch.seg_start),
        jnp.asarray(batch.adapters, dtype=jnp.int32),
        num_tokens=len(batch.x),
        geometry=TINY,
        block_tokens=8,
    )
    records = plan.records[:, 1]
    assert plan.counts.tolist() == [6, 4, 1, 1, 1]
    rows = [[0, 0, 8], [8, 0, 1], [9, 0, 4], [14, 0, 8], [22, 0, 8], [25, 5, 1]]  # the last may not pass row 33
    assert records[:6, [TOKEN, OFFSET, NUM_TOKENS]].tolist() == rows
    assert records[:6, group_fields("qkv")[1]].tolist() == [3, 3, 0, 27, 27, 27]
    section, _, page, following = group_fields("o")
    number = records[3, section] // TINY.tiles_per_page_id
    start = batch.table.page_start[2]
    assert records[3, [page, following]].tolist() == batch.table.pages[start + number : start + number + 2].tolist()
    v = module_field(2)
    number = records[3, v] // TINY.tiles_per_page_id
    assert records[3, module_pages(2)] == batch.table.pages[start + number]
    assert records[3, module_field(0) + 1 : v + 3].tolist()[:2] == [25, 0]
    assert records[3, v + 1 : v + 3].tolist() == [0, 216]


def test_both_plans_list_the_largest_first():
    """In one order, by the loads they are given, though a device may have a part of the adapters' A."""
    batch = Batch(TINY, [[8] * 7, [0] * 7, [200] * 7, [16] * 7], (9, 4, 1, 0, 17, 8, 3), (0, 2, -1, 2, 3, 0, 2), "qkv")
    loads = group_loads(batch.table)
    assert loads.tolist() == [[2 * r * n for n in (3, 1, 2, 1)] for r in (1, 0, 25, 2)]
    part = dataclasses.replace(batch.table, granules=batch.table.granules[::-1])
    plans = [
        make_plan(
            table,
            jnp.asarray(batch.seg_start),
            jnp.asarray(batch.adapters, dtype=jnp.int32),
            num_tokens=len(batch.x),
            geometry=TINY,
            block_tokens=8,
            loads=loads,
        )
        for table in (batch.table, part)
    ]
    rows = [[9, 0, 4], [36, 3, 3], [14, 0, 8], [22, 0, 8], [30, 0, 1], [0, 0, 8], [8, 0, 1], [31, 0, 8]]
    for plan in plans:
        assert plan.counts[0] == len(rows)
        assert plan.records[: len(rows), 1, [TOKEN, OFFSET, NUM_TOKENS]].tolist() == rows
    assert plans[0].records[: len(rows), 0, group_fields("qkv")[1]].tolist() == [75, 75, 6, 6, 6, 3, 3, 3]
    assert plans[0].scaling[: len(rows)].tolist() == batch.scaling[[2, 2, 3, 3, 3, 0, 0, 0]].tolist()
    assert plans[1].cut.tolist() == plans[0].cut.tolist()
    # Of one module, 25 and 2 granules, where the mean load of a cluster is 2.7 of q, k and v, and 0.9 of o.
    assert plans[0].cut[:2].tolist() == [[2, 2, 2], [5, 2, 2]]


def test_token_blocks_are_bounded():
    assert max_token_blocks(64, 64, 8) == 64
    assert max_token_blocks(2048, 1, 64) == 32
    assert max_token_blocks(0, 4, 8) == 1


NAMED = [
    ("7b_decode_64_distinct_r16_qkvo", "qkv"),
    ("7b_decode_64_mixed_qkvo", "o"),
    ("7b_prefill_2048_8_segments_r64", "gu"),
    ("8b_decode_256_distinct_r16_all", "down"),
    ("7b_decode_64_distinct_r16_all", "down"),  # splits of unequal length
    ("8b_prefill_2048_64_segments_r16", "qkv"),
]


def _lower(spec, group, num_tokens=None, segments=None, op="pair"):
    """StableHLO of one pair of ops, or of lora_add, for CUDA."""
    g, modules = spec.geometry, GROUPS[group]
    num_tokens, segments = num_tokens or spec.num_tokens, segments or len(spec.segments)

    def run(x, out, pages, table, *segments):
        options = dict(layer=3, group=group, max_rank=spec.max_rank)
        if op == "add":
            tables, geometries = (table, table), dict(shrink_geometry=g, expand_geometry=g)
            return lora_add(out, x, pages, *tables, *segments, **geometries, **options, implementation="mosaic")
        options["geometry"] = g
        where = (pages, table, *segments)
        return expand_sm90(out, shrink_sm90(x, *where, **options), *where, **options)

    return (
        jax.jit(run)
        .trace(
            abstract((num_tokens, g.in_sizes[modules[0]]), jnp.bfloat16),
            abstract((num_tokens, sum(g.out_sizes[m] for m in modules)), jnp.bfloat16),
            abstract((g.num_layers, 1000, g.page_elements), jnp.bfloat16),
            abstract_table(spec),
            abstract((segments + 1,)),
            abstract((segments,)),
        )
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )


@pytest.mark.parametrize("name, group", NAMED)
def test_named_shapes_lower_to_cuda(name, group):
    spec = SPECS[name]
    lowered = _lower(spec, group)
    pairs = 1 if spec.num_tokens <= SHORT_STEP else 2  # for short and for long segments
    assert lowered.count("@mosaic_gpu_v2") == 2 * pairs
    assert "output_operand_aliases" in lowered


@pytest.mark.parametrize("name, group", NAMED)
def test_add_is_one_launch_for_short_segments(name, group):
    spec = SPECS[name]
    lowered = _lower(spec, group, op="add")
    assert lowered.count("@mosaic_gpu_v2") == (1 if spec.num_tokens <= SHORT_STEP else 3)
    assert not re.search(r"stablehlo\.(sort|while)", lowered)  # which a GPU's command graph cannot hold


@pytest.mark.parametrize("g, max_rank", [(TINY, 16), (ODD, 512)], ids=["chunks-of-two", "chunks-of-one-high-rank"])
def test_narrow_models_lower_to_cuda(g, max_rank):
    spec = SPECS["7b_decode_64_distinct_r16_qkvo"]
    spec = dataclasses.replace(spec, geometry=g, ranks=(max_rank,) * len(spec.ranks))
    for op, launches in (("add", 1), ("pair", 2)):
        assert _lower(spec, "gu", op=op).count("@mosaic_gpu_v2") == launches


def test_steps_of_all_sizes_share_their_kernels():
    spec = SPECS["7b_decode_64_mixed_qkvo"]
    hashes = {
        n: set(re.findall(r'kernel_hash = "([^"]*)"', _lower(spec, "qkv", n, min(n, 100))))
        for n in (1, 8, 200, SHORT_STEP, SHORT_STEP + 8, 8192)
    }
    assert len(hashes[1]) == 2
    assert hashes[8] == hashes[200] == hashes[SHORT_STEP]
    assert len(hashes[8192]) == 4
    assert hashes[8] < hashes[SHORT_STEP + 8] == hashes[8192]


def test_unsupported_names_the_reason():
    g = MEDIUM
    x, pages = jnp.zeros((8, 1024), jnp.bfloat16), jnp.zeros((2, 1, g.page_elements), jnp.bfloat16)
    reason = functools.partial(unsupported, group="qkv", geometry=g, max_rank=16)
    assert reason(x, pages) is None
    assert "float32" in reason(x, pages.astype(jnp.float32))
    assert "float32" in reason(x.astype(jnp.float32), pages)
    assert "1000" in unsupported(x, pages, group="qkv", geometry=geometry(1000, 512, 2816), max_rank=16)
    assert "1024" in unsupported(x, pages, group="qkv", geometry=g, max_rank=1024)


def test_chunks_never_straddle_pages():
    for name in ("7b_decode_64_distinct_r16_qkvo", "8b_decode_64_distinct_r16_qkvo"):
        assert chunk_tiles(SPECS[name].geometry, 4) == 4
    assert chunk_tiles(TINY, 4) == 2
    assert chunk_tiles(ODD, 4) == 1


def _mixed(group, lengths=LENGTHS, adapters=ADAPTERS, **options):
    ranks = [[RANKS[(a + m) % len(RANKS)] for m in range(7)] for a in range(len(RANKS))]
    return Batch(MEDIUM, ranks, lengths, adapters, group, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_on_gpu(group):
    batch = _mixed(group)
    short, long = (batch.run(default_config(MEDIUM, n)) for n in (8, 4096))
    batch.check(short)
    # block sizes only move work around: they leave no trace in the bits
    np.testing.assert_array_equal(short.view(np.uint16), long.view(np.uint16))
    np.testing.assert_array_equal(short.view(np.uint16), batch.run(default_config(MEDIUM, 8)).view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("copies", [1, 12])
def test_one_launch_on_gpu(group, copies):
    """The same bits as shrink and expand, in steps of few tokens and of many; again and again."""
    batch = _mixed(group)
    if copies > 1:
        batch = _mixed(group, lengths=LENGTHS * copies, adapters=ADAPTERS * copies)
    apart = batch.run(default_config(MEDIUM, 8))
    batch.check(apart)
    for _ in range(20):
        np.testing.assert_array_equal(batch.add().view(np.uint16), apart.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_a_large_step_on_gpu(group):
    """Two pairs of launches: the same bits as all segments in one."""
    lengths, adapters = (1, 1000, 1, 0, 16, 17, 1, 40, 2), (0, 1, -1, 2, 3, 4, 5, 6, 7)
    ranks = [[RANKS[(a + m) % len(RANKS)] for m in range(7)] for a in range(len(RANKS))]
    batch = Batch(MEDIUM, ranks, lengths, adapters, group)
    assert len(batch.x) > SHORT_STEP
    both = batch.run(None)
    batch.check(both)
    np.testing.assert_array_equal(both.view(np.uint16), batch.run(default_config(MEDIUM, 8)).view(np.uint16))
    np.testing.assert_array_equal(both.view(np.uint16), batch.add().view(np.uint16))


@pytest.mark.gpu
def test_batch_invariance_on_gpu():
    """A token's result is the same bits alone and in a batch, wherever its adapter lies."""
    batch = _mixed("qkv")
    together = batch.run(default_config(MEDIUM, 8))
    for s, a in enumerate(ADAPTERS):
        if a < 0 or LENGTHS[s] == 0:
            continue
        rows = slice(batch.seg_start[s], batch.seg_start[s + 1])
        alone = _mixed("qkv")
        order = np.random.default_rng(s).permutation(alone.pages.shape[1])
        alone.pages = alone.pages[:, np.argsort(order)]
        alone.table = dataclasses.replace(alone.table, pages=jnp.asarray(order[alone.table.pages], jnp.int32))
        alone.x, alone.out = batch.x[rows], batch.out[rows]
        alone.seg_start, alone.adapters = np.array([0, LENGTHS[s]], np.int32), (a,)
        np.testing.assert_array_equal(
            alone.run(default_config(MEDIUM, 8)).view(np.uint16), together[rows].view(np.uint16)
        )
