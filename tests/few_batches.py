"""Steps whose adapters are few, and their base projection."""

import jax
from jax import numpy as jnp
from lora_batches import Batch, abstract, abstract_table, geometry
import numpy as np
from oracles import relative_error

from pallas_kernels import lora_matmul
from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.arg_specs import SPECS
from pallas_kernels.lora.config import few_ranks
from pallas_kernels.lora.kernel_sm90 import Matrices, few_sm90

LEAST = geometry(384, 128, 512, kv_heads=4)
NARROW = geometry(448, 64, 576, heads=7, kv_heads=1)  # widths of an odd number of tiles
LARGE = geometry(2048, 1024, 5632, heads=16, kv_heads=8, dim=128)
WIDER = geometry(3072, 3072, 1024, heads=24, kv_heads=24, dim=128)
OWN = geometry(384, 128, 64 * 141, kv_heads=4)  # each thread block has stripes of gate and up of its own
TWICE = geometry(384, 128, 64 * 331, kv_heads=4)  # and goes through the input twice
RANKS = [[64] * 7] + [[16, 8, 4, 16, 12, 16, 16]] * 8 + [[100, 0, 112, 88, 1, 104, 96], [24, 9, 30, 8, 0, 32, 1]]
"""Of some adapters."""


class Few:
    """A batch of tokens, and base weights whose product with them is the batch's base output."""

    def __init__(self, g, ranks, lengths, adapters, group, padding=0, seed=0):
        self.batch = batch = Batch(g, ranks, lengths, adapters, group, padding=padding, seed=seed)
        width = batch.x.shape[1], batch.out.shape[1]
        weights = np.random.default_rng(5).standard_normal((g.num_layers, *width)) / 16
        self.weights = jnp.asarray(weights, jnp.bfloat16)

    def program(self, interpret=None, most_ranks=None):
        """Of activations."""
        batch = self.batch
        most_ranks = most_ranks or self.ranks()
        options = dict(layer=batch.layer, group=batch.group, most_ranks=most_ranks, interpret=interpret)

        @jax.jit
        def run(x, weights, pages, table, *segments):
            adapters = Matrices(table=table, geometry=batch.geometry)
            return few_sm90(x, weights, pages, adapters, *segments, **options)

        segments = jnp.asarray(batch.seg_start), jnp.asarray(batch.adapters, jnp.int32)
        return lambda x: np.asarray(run(x, self.weights, batch.pages, batch.table, *segments))

    def run(self, x=None, **options):
        return self.program(**options)(self.batch.x if x is None else x)

    def ranks(self):
        """That the segments' adapters take, on the module on which they take most."""
        adapters = np.asarray(self.batch.adapters)
        taken = few_ranks(np.asarray(self.batch.table.granules)[np.maximum(adapters, 0)] * 8)
        return max(64, int(taken[adapters >= 0].sum(axis=0).max()))

    def check(self, result):
        batch = self.batch
        base = np.asarray(batch.x, np.float64) @ np.asarray(self.weights[batch.layer], np.float64)
        batch.out = jnp.asarray(base, jnp.bfloat16)
        assert relative_error(result, batch.expected()) < 5e-3

    def calls_share_a_plan(self):
        """Whether four calls of one program find what each finds alone: signals are zero again after each."""
        batch = self.batch
        xs = [batch.x, batch.x[::-1] + 1, batch.x * 2, batch.x]
        options = _options(batch.geometry, batch.group) | dict(layer=batch.layer)

        @jax.jit
        def run(xs, weights, pages, table, *segments):
            where = (pages, table, table, *segments)
            return [lora_matmul(x, weights, lambda x=x: x @ weights[batch.layer], *where, **options) for x in xs]

        segments = jnp.asarray(batch.seg_start), jnp.asarray(batch.adapters, jnp.int32)
        found = run(xs, self.weights, batch.pages, batch.table, *segments)
        return all(np.array_equal(_bits(a), _bits(self.run(x))) for a, x in zip(found, xs, strict=True))


def _bits(result):
    return np.asarray(result).view(np.uint16)


def _options(g, group):
    geometries = dict(shrink_geometry=g, expand_geometry=g)
    return dict(group=group, max_rank=64, implementation="mosaic", few_adapters=True) | geometries


def lower(g, group, tokens, few_adapters=True) -> jax.stages.Lowered:
    """`lora_matmul` of such a step, for CUDA. g: of a named shape."""
    spec = next(s for s in SPECS.values() if s.geometry == g)
    modules = GROUPS[group]

    def run(x, weights, pages, table, *segments):
        options = _options(g, group) | dict(layer=3, few_adapters=few_adapters)
        return lora_matmul(x, weights, lambda: x @ weights[3], pages, table, table, *segments, **options)

    widths = g.in_sizes[modules[0]], sum(g.out_sizes[m] for m in modules)
    pages = abstract((g.num_layers, 1000, g.page_elements), jnp.bfloat16)
    x, weights = abstract((tokens, widths[0]), jnp.bfloat16), abstract((g.num_layers, *widths), jnp.bfloat16)
    segments = abstract((tokens + 1,)), abstract((tokens,))
    return jax.jit(run).trace(x, weights, pages, abstract_table(spec), *segments).lower(lowering_platforms=("cuda",))
