"""Batches of tokens with adapters for the tests of the LoRA kernels, and their results in float64."""

import jax
from jax import numpy as jnp
import numpy as np
from oracles import image_pages, place_adapter, relative_error

from pallas_kernels.geometry import GROUPS, Geometry
from pallas_kernels.lora.kernel_sm90 import Matrices, add_sm90, expand_sm90, shrink_sm90
from pallas_kernels.lora.table import AdapterTable

RANKS = (1, 4, 8, 12, 16, 24, 32, 64, 128, 256)


def geometry(hidden, kv, mlp, heads=4, kv_heads=2, dim=64):
    return Geometry(
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        in_sizes=(hidden,) * 6 + (mlp,),
        out_sizes=(hidden, kv, kv, hidden, mlp, mlp, hidden),
    )


TINY = geometry(256, 128, 512, kv_heads=4)
WIDE = geometry(512, 256, 512, kv_heads=4)  # chunks of four tiles: two multiplying warpgroups
ODD = geometry(192, 64, 320, heads=3, kv_heads=1)  # widths of an odd number of tiles: chunks of one tile
MEDIUM = geometry(1024, 512, 2816, heads=8, kv_heads=4, dim=128)


class Batch:
    """Adapters of the given ranks (one list of seven each) in random pages of a pool full of NaN, and random tokens."""

    def __init__(self, g, ranks, lengths, adapters, group, layer=1, padding=2, seed=0):
        rng = np.random.default_rng(seed)
        self.geometry, self.group, self.layer = g, group, layer
        self.lengths, self.adapters = lengths, adapters
        factors = []
        for row in ranks:
            make = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16), np.float64)  # noqa: E731
            factors.append(
                {
                    (i, m): (make(r, g.in_sizes[m]) / 16, make(g.out_sizes[m], r))
                    for i in range(g.num_layers)
                    for m, r in enumerate(row)
                    if r
                }
            )
        need = [image_pages(f, g) for f in factors]
        num_pages = sum(need) + 3
        ids = rng.permutation(num_pages).astype(np.int32)
        pages = np.full((g.num_layers, num_pages, g.page_elements), np.nan, np.float32)
        start = np.cumsum([0, *need])
        rows = [place_adapter(pages, ids[start[i] :], f, g) for i, f in enumerate(factors)]
        self.scaling = rng.uniform(0.5, 2, (len(ranks), g.num_layers, 7)).astype(np.float32)
        self.table = AdapterTable(
            pages=jnp.asarray(ids),
            page_start=jnp.asarray(start[:-1], jnp.int32),
            tile_start=jnp.asarray(np.stack([r[0] for r in rows])),
            granules=jnp.asarray(np.stack([r[1] for r in rows])),
            scaling=jnp.asarray(self.scaling),
        )
        self.factors, self.pages = factors, jnp.asarray(pages, jnp.bfloat16)
        self.seg_start = np.cumsum([0, *lengths]).astype(np.int32)
        tokens = int(self.seg_start[-1]) + padding
        width = sum(g.out_sizes[m] for m in GROUPS[group])
        self.x = jnp.asarray(rng.standard_normal((tokens, g.in_sizes[GROUPS[group][0]])), jnp.bfloat16)
        self.out = jnp.asarray(rng.standard_normal((tokens, width)), jnp.bfloat16)

    def run(self, config, interpret=None):
        options = dict(
            layer=self.layer,
            group=self.group,
            geometry=self.geometry,
            max_rank=int(self.table.granules.max()) * 8,
            config=config,
            interpret=interpret,
        )
        where = (self.pages, self.table, jnp.asarray(self.seg_start), jnp.asarray(self.adapters, dtype=jnp.int32))

        @jax.jit  # one program: what is dispatched beside interpreted kernels, which dispatch too, could wait forever
        def run(x, out, *where):
            return expand_sm90(out, shrink_sm90(x, *where, **options), *where, **options)

        return np.asarray(run(self.x, self.out, *where))

    def add(self):
        """In one launch."""
        options = dict(layer=self.layer, group=self.group, max_rank=int(self.table.granules.max()) * 8)
        where = (jnp.asarray(self.seg_start), jnp.asarray(self.adapters, dtype=jnp.int32))

        @jax.jit
        def run(x, out, pages, table):
            half = Matrices(table=table, geometry=self.geometry)
            return add_sm90(out, x, pages, half, half, *where, **options)

        return np.asarray(run(self.x, self.out, self.pages, self.table))

    def expected(self):
        out, x = np.asarray(self.out, np.float64), np.asarray(self.x, np.float64)
        for s, a in enumerate(self.adapters):
            rows, column = slice(self.seg_start[s], self.seg_start[s + 1]), 0
            for m in GROUPS[self.group]:
                width = self.geometry.out_sizes[m]
                if a >= 0 and (self.layer, m) in self.factors[a]:
                    fa, fb = self.factors[a][self.layer, m]
                    scale = np.float64(self.scaling[a, self.layer, m])
                    fa = np.asarray(jnp.asarray(fa, jnp.bfloat16), np.float64)
                    out[rows, column : column + width] += scale * (x[rows] @ fa.T @ fb.T)
                column += width
        return out

    def check(self, result):
        assert relative_error(result, self.expected()) < 5e-3
        base = np.ones(len(result), bool)
        for s, a in enumerate(self.adapters):
            if a >= 0:
                base[self.seg_start[s] : self.seg_start[s + 1]] = False
        np.testing.assert_array_equal(result[base], np.asarray(self.out)[base])


def abstract(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_table(spec):
    adapters, layers = len(spec.ranks), spec.geometry.num_layers
    return AdapterTable(
        pages=abstract((1000,)),
        page_start=abstract((adapters,)),
        tile_start=abstract((adapters, layers)),
        granules=abstract((adapters, layers, 7)),
        scaling=abstract((adapters, layers, 7), jnp.float32),
    )
