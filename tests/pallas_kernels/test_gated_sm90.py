"""The Hopper kernel of gate and up with deltas and SiLU·mul: interpreted, lowered to CUDA, and (marked gpu) on the
machine.
"""

from hypothesis import given
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from lora_batches import RANKS, WIDE, Batch, abstract, abstract_table, geometry
import numpy as np
from oracles import relative_error
import pytest

from pallas_kernels import lora_matmul, lora_matmul_silu_mul, silu_mul
from pallas_kernels.lora.arg_specs import SPECS
from pallas_kernels.lora.config import PRODUCT_STEP, SHORT_SEGMENT
from pallas_kernels.lora.kernel_gated_sm90 import unsupported
from pallas_kernels.lora.kernel_sm90 import Matrices, gated_sm90, matmul_sm90
from pallas_kernels.lora.windows import WINDOW, touched_windows
from pallas_kernels.silu_mul.kernel_sm90 import silu_mul_again_sm90

FIVE = geometry(256, 256, 640, kv_heads=4)  # five tiles for two programs: the last one in halves
HIGH = [[8] * 7, [16, 4, 0, 8, 40, 80, 8], [80, 8, 16, 8, 80, 8, 8]]


def _bits(array):
    return np.asarray(array).view(np.uint16)


class GateUp:
    """A batch of tokens, and base weights of gate and up."""

    def __init__(self, g, ranks, lengths, adapters):
        self.batch = batch = Batch(g, ranks, lengths, adapters, "gu", padding=0)
        width = batch.x.shape[1], batch.out.shape[1]
        weights = np.random.default_rng(5).standard_normal((g.num_layers, *width)) / 16
        self.weights = jnp.asarray(weights, jnp.bfloat16)
        segments = jnp.asarray(batch.seg_start), jnp.asarray(batch.adapters, jnp.int32)
        self.where = batch.pages, batch.table, batch.table, *segments
        self.options = dict(layer=batch.layer, max_rank=int(batch.table.granules.max()) * 8)
        self.geometries = dict(shrink_geometry=g, expand_geometry=g)

    def interpreted(self, kernel, **options):
        pages, table, _, *segments = self.where
        half = Matrices(table=table, geometry=self.batch.geometry)
        options |= dict(self.options, interpret=plgpu.InterpretGPUParams())
        return kernel(self.batch.x, self.weights, pages, half, half, *segments, **options)

    def base(self, x):
        return x @ self.weights[self.batch.layer]

    def fused(self):
        """A compiled function of no arguments: the bits of the one operation."""

        @jax.jit
        def run(x, *where):
            base = lambda: self.base(x)  # noqa: E731
            return lora_matmul_silu_mul(x, self.weights, base, *where, **self.options, **self.geometries)

        return lambda: _bits(run(self.batch.x, *self.where))

    def apart(self):
        """Likewise, of the two operations."""

        @jax.jit
        def run(x, *where):
            options = dict(self.options, **self.geometries, group="gu")
            return silu_mul(lora_matmul(x, self.weights, lambda: self.base(x), *where, **options))

        return lambda: _bits(run(self.batch.x, *self.where))


def test_interpreted():
    """SiLU·mul of what the kernel without it gives."""
    gate_up = GateUp(WIDE, HIGH, (100, 17, 50, 89), (0, 1, -1, 2))
    gate, up = jnp.split(gate_up.interpreted(matmul_sm90, group="gu").astype(jnp.float32), 2, axis=1)
    wanted = (gate / (1 + jnp.exp(-gate)) * up).astype(jnp.bfloat16)
    np.testing.assert_array_equal(_bits(gate_up.interpreted(gated_sm90)), _bits(wanted))


def test_the_last_tile_in_halves():
    gate_up = GateUp(FIVE, HIGH, (50, 28, 20, 30), (0, 1, -1, 2))
    wanted = gate_up.apart()().view(jnp.bfloat16)
    assert relative_error(np.asarray(gate_up.interpreted(gated_sm90)), wanted.astype(np.float64)) < 1e-2


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=12),
    chosen=st.lists(st.integers(-1, 2), min_size=12, max_size=12),
)
def test_windows_that_a_segment_with_an_adapter_touches(lengths, chosen):
    start, adapters = np.cumsum([0, *lengths]), np.array(chosen[: len(lengths)])
    of_token = np.repeat(adapters, lengths)
    windows = -(-max(len(of_token), 1) // WINDOW)
    of_token = np.pad(of_token, (0, windows * WINDOW - len(of_token)), constant_values=-1)
    found = touched_windows(jnp.asarray(start), jnp.asarray(adapters), windows * WINDOW)
    assert found.tolist() == (of_token.reshape(windows, WINDOW) >= 0).any(axis=1).astype(int).tolist()


def test_again_where_wanted_and_nowhere_else():
    rng = np.random.default_rng(0)
    gate_up, h = (jnp.asarray(rng.standard_normal((8, n)), jnp.bfloat16) for n in (2048, 1024))
    gate_up = gate_up.at[2:4].set(jnp.nan)  # what was never written
    found = silu_mul_again_sm90(gate_up, h, jnp.array([1, 0, 0, 1], jnp.int32), interpret=True)
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    again = (gate / (1 + jnp.exp(-gate)) * up).astype(jnp.bfloat16)
    wanted = jnp.concatenate([again[:2], h[2:6], again[6:]])
    np.testing.assert_array_equal(_bits(found), _bits(wanted))


def test_without_the_kernel_it_is_the_two_operations():
    gate_up = GateUp(WIDE, HIGH, (100, 17, 50, 89), (0, 1, -1, 2))
    np.testing.assert_array_equal(gate_up.fused()(), gate_up.apart()())


def test_widths_that_the_kernel_does_not_take():
    assert unsupported(WIDE) is None
    assert "multiple of 128" in unsupported(geometry(256, 256, 576, kv_heads=4))
    assert "512" in unsupported(geometry(256, 256, 256, kv_heads=4))


@pytest.mark.parametrize("name", ["7b_prefill_2048_8_segments_r64", "8b_prefill_2048_64_segments_r16"])
def test_lowers_to_cuda(name):
    spec = SPECS[name]
    g = spec.geometry

    def run(x, weights, pages, table, *segments):
        options = dict(layer=3, max_rank=spec.max_rank, implementation="mosaic", shrink_geometry=g, expand_geometry=g)
        base = lambda: x @ weights[3]  # noqa: E731
        return lora_matmul_silu_mul(x, weights, base, pages, table, table, *segments, **options)

    pages = abstract((g.num_layers, 1000, g.page_elements), jnp.bfloat16)
    segments = abstract((len(spec.segments) + 1,)), abstract((len(spec.segments),))
    x = abstract((2048, g.in_sizes[4]), jnp.bfloat16)
    weights = abstract((g.num_layers, g.in_sizes[4], g.out_sizes[4] + g.out_sizes[5]), jnp.bfloat16)
    traced = jax.jit(run).trace(x, weights, pages, abstract_table(spec), *segments)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu_v2") == 4  # shrink, the product, what adds short segments, and SiLU·mul for them
    assert "dot_general" not in lowered and "exponential" not in lowered


@pytest.mark.gpu
def test_on_gpu():
    """The bits of the two operations, with short segments and base tokens in between; again and again."""
    lengths, adapters = (100, 28, 64, 1, 17, 46, 256, 3, 200, 40, 16, 381), (0, 1, -1, 2, 3, 4, 5, 6, 7, 7, 9, 8)
    assert min(lengths) <= SHORT_SEGMENT
    ranks = [[RANKS[(a + m) % len(RANKS)] for m in range(7)] for a in range(len(RANKS))]
    for g in (WIDE, geometry(512, 256, 11008, kv_heads=4)):
        gate_up = GateUp(g, ranks, lengths, adapters)
        assert len(gate_up.batch.x) == 1152 > PRODUCT_STEP
        wanted, fused = gate_up.apart()(), gate_up.fused()
        for _ in range(20):
            np.testing.assert_array_equal(fused(), wanted)
