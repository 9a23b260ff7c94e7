"""The Hopper kernel of a base projection with its deltas: interpreted, lowered to CUDA, and (marked gpu) on the
machine.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

from hypothesis import example, given, settings
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from lora_batches import RANKS, TINY, WIDE, Batch, abstract, abstract_table, geometry
import numpy as np
from oracles import relative_error
import pytest

from pallas_kernels import lora_matmul
from pallas_kernels.dispatch import log_fallback
from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.arg_specs import SPECS
from pallas_kernels.lora.config import PRODUCT_STEP, SHORT_SEGMENT
from pallas_kernels.lora.kernel_matmul_sm90 import unsupported
from pallas_kernels.lora.kernel_sm90 import Matrices, matmul_sm90
from pallas_kernels.lora.plan import NUM_TOKENS, OFFSET, TOKEN, make_plan, max_token_blocks
from pallas_kernels.lora.product_tiles import CHUNK, HALVES, ProductTiles
from pallas_kernels.lora.table import section_starts
from pallas_kernels.lora.windows import (
    PART,
    STAGE_UNITS,
    TILE,
    UNIT_GRANULES,
    UNITS_OF_BLOCK,
    WINDOW,
    make_tiles,
    most_stages,
)

UNEVEN = geometry(768, 256, 512, kv_heads=4)
MOST = 512
HIGH = [[8] * 7, [16, 4, 0, 8, 40, 80, 8], [80, 8, 16, 8, 8, 8, 8]]


class Product:
    """A batch of tokens, and base weights whose product with them is the batch's base output."""

    def __init__(self, g, ranks, lengths, adapters, group):
        self.batch = batch = Batch(g, ranks, lengths, adapters, group, padding=0)
        width = batch.x.shape[1], batch.out.shape[1]
        weights = np.random.default_rng(5).standard_normal((g.num_layers, *width)) / 16
        self.weights = jnp.asarray(weights, jnp.bfloat16)
        self.max_rank = int(batch.table.granules.max()) * 8

    def run(self, adapters=None, interpret=None):
        batch = self.batch
        adapters = jnp.asarray(batch.adapters if adapters is None else adapters, jnp.int32)
        options = dict(layer=batch.layer, group=batch.group, max_rank=self.max_rank, interpret=interpret)

        @jax.jit
        def run(x, weights, pages, table, *segments):
            half = Matrices(table=table, geometry=batch.geometry)
            return matmul_sm90(x, weights, pages, half, half, *segments, **options)

        return run(batch.x, self.weights, batch.pages, batch.table, jnp.asarray(batch.seg_start), adapters)

    def check(self, result):
        batch = self.batch
        base = np.asarray(batch.x, np.float64) @ np.asarray(self.weights[batch.layer], np.float64)
        batch.out = jnp.asarray(base, jnp.bfloat16)
        assert relative_error(np.asarray(result), batch.expected()) < 5e-3


@pytest.mark.parametrize(
    "g, lengths, group",
    [
        (WIDE, (100, 17, 50, 89), "qkv"),
        (WIDE, (128, 80, 30, 18), "gu"),
        (WIDE, (40, 80, 30, 106), "gu"),  # an adapter begins within a stage and ends in the next one
        (UNEVEN, (50, 28, 20, 30), "qkv"),  # five tiles for two programs: the last one in halves
    ],
    ids=["qkv", "gu", "across", "halves"],
)
def test_interpreted(g, lengths, group):
    product = Product(g, HIGH, lengths, (0, 1, -1, 2), group)
    product.check(product.run(interpret=plgpu.InterpretGPUParams()))


@functools.partial(jax.jit, static_argnums=3)
def _plan_and_tiles(table, start, adapters, tokens):
    options = dict(num_tokens=tokens, geometry=TINY, block_tokens=WINDOW, windows=True)
    plan = make_plan(table, start, adapters, **options)
    return plan, make_tiles(plan, tokens, MOST)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(SHORT_SEGMENT + 1, 200), min_size=1, max_size=12),
    adapters=st.lists(st.integers(-1, 2), min_size=12, max_size=12),
)
@example(lengths=[SHORT_SEGMENT + 1] * 12, adapters=[2] * 12)  # more stages than a window has bits
def test_tiles_list_every_pair_of_a_segment_and_a_tile(lengths, adapters):
    lengths += [0] * (len(adapters) - len(lengths))
    tokens = -(-200 * len(lengths) // TILE) * TILE
    start = np.cumsum([0, *lengths]).astype(np.int32)
    table = Batch(TINY, [*HIGH[:2], [MOST, 8, 16, 24, 8, 8, 8]], (1,), (0,), "qkv").table
    plan, tiles = _plan_and_tiles(table, jnp.asarray(start), jnp.asarray(adapters, jnp.int32), tokens)
    tiles = SimpleNamespace(**{name: np.asarray(value) for name, value in vars(tiles).items()})
    blocks = [
        (w * WINDOW, max(a - w * WINDOW, 0), min(b, (w + 1) * WINDOW) - max(a, w * WINDOW))
        for a, b, which in zip(start, start[1:], adapters, strict=False)
        if which >= 0 and a < b
        for w in range(a // WINDOW, -(-b // WINDOW))
    ]
    assert plan.counts[0] == len(blocks) <= max_token_blocks(tokens, len(lengths), WINDOW, windows=True)
    found = plan.records[: len(blocks), 0, jnp.array([TOKEN, OFFSET, NUM_TOKENS])]
    assert found.tolist() == [list(block) for block in blocks]
    per_tile = [sum(token // TILE == t for token, *_ in blocks) for t in range(tokens // TILE)]
    assert tiles.first_block.tolist() == np.cumsum([0, *per_tile]).tolist()
    adapter_units = -(-np.asarray(table.granules) // UNIT_GRANULES)  # [adapters, layers, 7]
    first_block = tiles.first_block.tolist()
    for t in range(tokens // TILE):
        # runs of the same adapter: a pair may go from one segment to the next where a window ends between them
        pairs, reached, last = [], [], None
        for w in (2 * t, 2 * t + 1):
            inside = [
                a
                for a, b, e in zip(adapters, start, start[1:], strict=False)
                if a >= 0 and max(b, w * WINDOW) < min(e, (w + 1) * WINDOW)
            ]
            same = w % 2 == 1 and inside and last is not None and inside[0] == last
            if same:
                reached[-1].add(w % 2)
            pairs += inside[1:] if same else inside
            reached += [{w % 2} for _ in (inside[1:] if same else inside)]
            last = inside[-1] if inside else None
        # where each pair is listed, which its second block follows
        listed = [first_block[t] + len(pairs[:i]) + sum(len(r) - 1 for r in reached[:i]) for i in range(len(pairs))]
        for layer, module in np.ndindex(table.granules.shape[1:]):
            units = [
                (i, n, windows)
                for i, a, windows in zip(listed, pairs, reached, strict=True)
                for n in range(adapter_units[a, layer, module])
            ]
            stages = -(-len(units) // STAGE_UNITS)
            assert tiles.stages[t, layer, module] == stages <= most_stages(MOST)
            bits = [{i // STAGE_UNITS for i, (*_, windows) in enumerate(units) if w in windows} for w in (0, 1)]
            expected = [sum(1 << i for i in b) for b in bits] if stages <= 30 else [-1, -1]
            assert tiles.reach[t, layer, module].tolist() == expected
            numbers = [i * UNITS_OF_BLOCK + n for i, n, _ in units]
            padded = (numbers + numbers[-1:] * STAGE_UNITS)[: stages * STAGE_UNITS]
            assert tiles.units[t, layer, module, : stages * STAGE_UNITS].tolist() == padded
            for i, windows in zip(listed, reached, strict=True):
                first = next((k for k, unit in enumerate(units) if unit[0] == i), None)
                if first is not None:
                    assert tiles.first_unit[i : i + len(windows), layer, module].tolist() == [first] * len(windows)
    parts = [
        [i for i, (token, offset, n) in enumerate(blocks) if token + offset < p + PART and token + offset + n > p]
        for p in range(0, tokens, PART)
    ]
    parts += [[]] * (len(tiles.parts) - len(parts))
    assert tiles.parts.tolist() == [(inside + [-1, -1])[:2] for inside in parts] and max(map(len, parts)) <= 2


@pytest.mark.parametrize("tiles", [1, 7, 16, 37])
def test_programs_share_every_tile_of_a_product(tiles):
    g, ctas = SPECS["8b_prefill_2048_8_segments_r16"].geometry, 132
    found, most = [], 0
    for cta in range(ctas):
        order = ProductTiles(geometry=g, group="qkv", cta=jnp.int32(cta), ctas=ctas, tiles=jnp.int32(tiles))
        own = [tuple(map(int, order.place(jnp.int32(n)))) for n in range(int(order.count))]
        found += [(t, c, h) for t, c, half in own for h in ((0, 1) if half == HALVES else (half,))]
        most = max(most, sum(1 if half == HALVES else 0.5 for *_, half in own))
    columns = 6144 // 256
    assert sorted(found) == [(t, c, h) for t in range(tiles) for c in range(columns) for h in (0, 1)]
    rest = tiles * columns % ctas
    assert most == tiles * columns // ctas + (0 if not rest else 0.5 if 2 * rest <= ctas else 1)
    places = [list(map(int, order.module_of(jnp.int32(c)))) for c in (0, 15, 16, 19, 20, 23)]
    assert places == [[0, 0, 64, 0]] * 2 + [[1, 1, 16, 64]] * 2 + [[2, 2, 16, 80]] * 2


def _lower(spec, group, tokens):
    g, modules = spec.geometry, GROUPS[group]

    def run(x, weights, pages, table, *segments):
        options = dict(layer=3, group=group, max_rank=spec.max_rank, implementation="mosaic")
        geometries = dict(shrink_geometry=g, expand_geometry=g)
        return lora_matmul(x, weights, lambda: x @ weights[3], pages, table, table, *segments, **geometries, **options)

    widths = g.in_sizes[modules[0]], sum(g.out_sizes[m] for m in modules)
    pages = abstract((g.num_layers, 1000, g.page_elements), jnp.bfloat16)
    segments = abstract((len(spec.segments) + 1,)), abstract((len(spec.segments),))
    x, weights = abstract((tokens, widths[0]), jnp.bfloat16), abstract((g.num_layers, *widths), jnp.bfloat16)
    traced = jax.jit(run).trace(x, weights, pages, abstract_table(spec), *segments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "name, group, ranks",
    [
        ("7b_prefill_2048_8_segments_r64", "gu", 64),
        ("8b_prefill_2048_64_segments_r16", "qkv", 16),
        ("7b_prefill_2048_8_segments_r64", "qkv", MOST),
    ],
)
def test_lowers_to_cuda(name, group, ranks):
    spec = SPECS[name]
    lowered = _lower(dataclasses.replace(spec, ranks=(ranks,) * len(spec.ranks)), group, 2048)
    assert lowered.count("@mosaic_gpu_v2") == 3  # shrink, product, and what adds short segments
    assert "dot_general" not in lowered


def test_small_and_uneven_steps_keep_the_product_to_themselves(caplog):
    """Too small is as it should be; that many tokens do not fit is said once."""
    log_fallback.cache_clear()
    for tokens in (PRODUCT_STEP - TILE, PRODUCT_STEP + 8, PRODUCT_STEP + 8):
        assert "dot_general" in _lower(SPECS["7b_prefill_2048_8_segments_r16"], "o", tokens)
    lines = [r.getMessage() for r in caplog.records if r.name == log_fallback.__module__]
    assert lines == [
        "lora_matmul: base projection and deltas are two kernels, because 1032 tokens are not a multiple of 128"
    ]


def test_large_steps_share_their_kernels():
    spec = SPECS["7b_prefill_2048_8_segments_r16"]
    hashes = [set(re.findall(r'kernel_hash = "([^"]*)"', _lower(spec, "o", n))) for n in (1152, 8192)]
    assert hashes[0] == hashes[1]


def test_unsupported_names_the_reason():
    x, weights = jnp.zeros((1152, 512), jnp.bfloat16), jnp.zeros((2, 512, 1024), jnp.bfloat16)
    assert unsupported(x, weights, WIDE) is None
    assert "1100" in unsupported(x[:1100], weights, WIDE)
    assert "float32" in unsupported(x, weights.astype(jnp.float32), WIDE)
    assert "256" in unsupported(x, weights, TINY)


@given(
    hidden=st.integers(2, 18),
    intermediate=st.integers(2, 24),
    kv_heads=st.integers(1, 4),
    granules=st.lists(st.integers(0, 32), min_size=7, max_size=7),
)
def test_sections_begin_with_a_chunk_where_it_is_supported(hidden, intermediate, kv_heads, granules):
    """Widths of the other groups count, too: those of SmolLM2's hidden state (9 tiles) moved the B's of gate and up."""
    g = geometry(64 * hidden, 64 * kv_heads, 64 * intermediate, kv_heads=kv_heads)
    x, weights = jnp.zeros((1152, 512), jnp.bfloat16), jnp.zeros((2, 512, 1024), jnp.bfloat16)
    if unsupported(x, weights, g) is None:
        _, b_start = section_starts(jnp.array(granules), g)
        assert not any(start % CHUNK for start in b_start)
        assert g.page_tiles % CHUNK == 0


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_on_gpu(group):
    """The bits of adding the deltas to the base outputs afterwards, whatever is in the tile; again and again."""
    lengths, adapters = (100, 28, 64, 1, 17, 46, 256, 3, 200, 40, 16, 381), (0, 1, -1, 2, 3, 4, 5, 6, 7, 7, 9, 8)
    ranks = [[RANKS[(a + m) % len(RANKS)] for m in range(7)] for a in range(len(RANKS))]
    product = Product(WIDE, ranks, lengths, adapters, group)
    batch = product.batch
    assert len(batch.x) == 1152 > PRODUCT_STEP
    result = product.run()
    product.check(result)
    base = product.run([-1] * len(adapters))
    batch.out = base

    apart = batch.add()
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(product.run()).view(np.uint16), apart.view(np.uint16))
