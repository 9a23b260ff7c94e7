"""lora_shrink and lora_expand on one GPU against the bytes they must read, the XLA implementation and lax.ragged_dot.

    python -m benchmarks.kernels.bench_lora --shape 7b_decode_64_distinct_r16_qkvo --json out.json

Shapes are those of pallas_kernels/lora/arg_specs.py. A timing runs the op once for each layer of one pool in one
compiled step, so that no layer's weights are left in the L2 cache, and divides by the layers; "pair" is shrink then
expand, as a layer runs them.
Floor: distinct weights of the batch, activations read and base outputs read and written, over the measured copy
bandwidth.
"""

import argparse
from pathlib import Path

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from benchmarks.kernels.bench_attention import ceilings, seconds
from benchmarks.record import write_result
from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora import reference
from pallas_kernels.lora.arg_specs import SPECS, LoraSpec
from pallas_kernels.lora.kernel_sm90 import expand_sm90, shrink_sm90
from pallas_kernels.lora.table import AdapterTable


def random_pool(num_layers: int, num_pages: int, elements: int) -> jax.Array:
    """A pool of small pseudo-random numbers, made layer by layer (any contents are valid weights)."""

    def layer(key):
        bits = jax.random.bits(key, (num_pages, elements), jnp.uint8)
        return (bits.astype(jnp.bfloat16) - 127.5) * jnp.bfloat16(2e-4)

    return jax.jit(lambda keys: lax.map(layer, keys))(jax.random.split(jax.random.key(0), num_layers))


class Inputs:
    """A spec's adapters in scattered pages, its segments, and random activations for every group."""

    def __init__(self, spec: LoraSpec):
        self.spec, g = spec, spec.geometry
        layout, rng = spec.layout(), np.random.default_rng(0)
        num_pages = int(layout["num_pages"].sum())
        self.pages = random_pool(g.num_layers, num_pages, g.page_elements)
        self.table = AdapterTable(
            pages=jnp.asarray(rng.permutation(num_pages), jnp.int32),
            page_start=jnp.asarray(layout["page_start"], jnp.int32),
            tile_start=jnp.asarray(layout["tile_start"]),
            granules=jnp.asarray(layout["granules"]),
            scaling=jnp.ones((len(spec.ranks), g.num_layers, 7), jnp.float32),
        )
        self.seg_start = jnp.asarray(np.cumsum([0, *spec.segments]), jnp.int32)
        self.seg_adapter = jnp.arange(len(spec.segments), dtype=jnp.int32) % len(spec.ranks)

    def where(self):
        return self.pages, self.table, self.seg_start, self.seg_adapter

    def activations(self, group: str) -> tuple[jax.Array, jax.Array]:
        g, modules = self.spec.geometry, GROUPS[group]
        shapes = g.in_sizes[modules[0]], sum(g.out_sizes[m] for m in modules)
        keys = jax.random.split(jax.random.key(1))
        return tuple(
            jax.random.normal(k, (self.spec.num_tokens, n), jnp.bfloat16) for k, n in zip(keys, shapes, strict=True)
        )


def bytes_moved(spec: LoraSpec, group: str) -> dict[str, int]:
    """Bytes that shrink and expand of one layer must move."""
    shrink, expand = spec.weight_bytes(group)
    g, modules = spec.geometry, GROUPS[group]
    shrink += 2 * spec.num_tokens * g.in_sizes[modules[0]]
    targeted = [m for m in modules if spec.granules()[:, 0, m].any()]
    expand += 4 * spec.num_tokens * sum(g.out_sizes[m] for m in targeted)
    return {"shrink": shrink, "expand": expand, "pair": shrink + expand}


def steps(inputs: Inputs, group: str, num_layers: int):
    """Name -> (compiled function over `num_layers` layers, its arguments) of the kernels and the XLA implementation."""
    spec = inputs.spec
    x, out = inputs.activations(group)
    options = dict(group=group, geometry=spec.geometry, max_rank=spec.max_rank)
    layers = range(num_layers)

    @jax.jit
    def shrink(x, *where):
        return [shrink_sm90(x, *where, layer=i, **options) for i in layers]

    @jax.jit
    def expand(out, y, *where):
        for i in layers:
            out = expand_sm90(out, y, *where, layer=i, **options)
        return out

    @jax.jit
    def pair(x, out, *where):
        for i in layers:
            out = expand_sm90(out, shrink_sm90(x, *where, layer=i, **options), *where, layer=i, **options)
        return out

    @jax.jit
    def xla_pair(x, out, *where):
        for i in layers:
            y = reference.shrink(x, *where, layer=i, **options)
            out = reference.expand(out, y, *where, layer=i, group=group, geometry=spec.geometry)
        return out

    y = jnp.nan_to_num(shrink(x, *inputs.where())[0])
    return {
        "shrink": (shrink, (x, *inputs.where())),
        "expand": (expand, (out, y, *inputs.where())),
        "pair": (pair, (x, out, *inputs.where())),
        "xla_pair": (xla_pair, (x, out, *inputs.where())),
    }


def ragged_dot_pair(spec: LoraSpec, group: str, num_layers: int):
    """The same work on dense weights padded to the largest rank, [segments, in, modules * rank], through
    lax.ragged_dot.
    """
    g, modules = spec.geometry, GROUPS[group]
    rank, segments = spec.max_rank, len(spec.segments)
    key = jax.random.key(2)
    x = jax.random.normal(key, (spec.num_tokens, g.in_sizes[modules[0]]), jnp.bfloat16)
    outs = [jax.random.normal(key, (spec.num_tokens, g.out_sizes[m]), jnp.bfloat16) for m in modules]
    a = jax.random.normal(key, (num_layers, segments, x.shape[1], rank * len(modules)), jnp.bfloat16)
    b = [jax.random.normal(key, (num_layers, segments, rank, g.out_sizes[m]), jnp.bfloat16) for m in modules]
    sizes = jnp.asarray(spec.segments, jnp.int32)

    @jax.jit
    def run(x, outs, a, b):
        for i in range(num_layers):
            y = lax.ragged_dot(x, a[i], sizes)
            parts = jnp.split(y, len(modules), axis=1)
            outs = [o + lax.ragged_dot(p, w[i], sizes) for o, p, w in zip(outs, parts, b, strict=True)]
        return outs

    return run, (x, outs, a, b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shape", action="append", choices=sorted(SPECS), help="may be repeated; all shapes if not given"
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--compare", action="store_true", help="time the XLA implementation and lax.ragged_dot too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = ceilings()
    print(f"copy {found['copy'] / 1e12:.2f} TB/s on {jax.devices()[0].device_kind}")
    rows = []
    for name in args.shape or SPECS:
        spec = SPECS[name]
        inputs = Inputs(spec)
        for group in spec.groups:
            moved = bytes_moved(spec, group)
            timed = steps(inputs, group, args.layers)
            layers = dict.fromkeys(timed, args.layers)
            if args.compare:
                layers["xla_pair"] = layers["ragged_dot_pair"] = 2
                timed["xla_pair"] = steps(inputs, group, 2)["xla_pair"]
                timed["ragged_dot_pair"] = ragged_dot_pair(spec, group, 2)
            else:
                del timed["xla_pair"]
            for op, (fn, fn_args) in timed.items():
                micros = seconds(fn, *fn_args) / layers[op] * 1e6
                size = moved[op.split("_")[-1]]
                floor = size / found["copy"] * 1e6
                rows.append(
                    dict(shape=name, group=group, op=op, bytes=size, floor_us=floor, us=micros, ratio=micros / floor)
                )
                print(
                    f"{name:34s} {group:5s} {op:16s} {micros:9.2f} us  floor {floor:8.2f}  x{micros / floor:.2f}",
                    flush=True,
                )
            if args.json:  # after every group: a run cut short leaves what it has
                write_result(args.json, dict(ceilings=found, results=rows))
        del inputs


if __name__ == "__main__":
    main()
