"""LoRA's ops on one GPU against the bytes they must read, the XLA implementation and lax.ragged_dot.

    python -m benchmarks.kernels.bench_lora --shape 7b_decode_64_distinct_r16_qkvo --json out.json

Shapes are those of pallas_kernels/lora/arg_specs.py. A timing runs the op once for each layer of one pool in one
compiled step, so that no layer's weights are left in the L2 cache, and divides by the layers. "shrink" and "expand"
are launches of their own; "pair" is lora_add, as a layer runs them where it does not take the base projection into
the same kernel: "matmul" is lora_matmul, that projection included, of steps that are large enough or small and with
few adapters, and "base" the projection alone.
Floor: distinct weights of the batch, activations read and base outputs read and written, over the measured copy
bandwidth; of "matmul" and "base" the projection's operations over the measured rate of a large product, or its weights
over the copy bandwidth.
--profile also gives the time on the device of each kernel that runs once a layer, without what lies between launches.
"""

import argparse
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from benchmarks.decode_step import kernel_times
from benchmarks.kernels.bench_attention import ceilings, seconds
from benchmarks.record import write_result
from pallas_kernels import MOST_FEW, few_ranks, lora_matmul, small_for_few
from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora import reference
from pallas_kernels.lora.arg_specs import GEOMETRIES, SPECS, LoraSpec
from pallas_kernels.lora.config import PRODUCT_STEP, LoraConfig, default_config, shape_key
from pallas_kernels.lora.kernel_sm90 import Matrices, add_sm90, expand_sm90, shrink_sm90
from pallas_kernels.lora.table import AdapterTable
from pallas_kernels.tuning import keep
from slora_jax.step import compiler_options

_OPS = ("shrink", "expand", "pair", "matmul", "base")


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


def product_flops(spec: LoraSpec, group: str) -> int:
    """Operations of the base projection of one layer."""
    g, modules = spec.geometry, GROUPS[group]
    return 2 * spec.num_tokens * g.in_sizes[modules[0]] * sum(g.out_sizes[m] for m in modules)


def product_bytes(spec: LoraSpec, group: str) -> int:
    """Bytes of the base projection's weights of one layer."""
    g, modules = spec.geometry, GROUPS[group]
    return 2 * g.in_sizes[modules[0]] * sum(g.out_sizes[m] for m in modules)


def steps(inputs: Inputs, group: str, num_layers: int, config: LoraConfig | None = None):
    """Name -> (compiled function over `num_layers` layers, its arguments) of the kernels and the XLA implementation.

    config: of the kernels, if not the default.
    """
    spec = inputs.spec
    x, out = inputs.activations(group)
    reference_options = dict(group=group, geometry=spec.geometry)
    options = dict(reference_options, max_rank=spec.max_rank, config=config)
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
    def pair(x, out, pages, table, *segments):
        both = Matrices(table=table, geometry=spec.geometry)
        chosen = dict(group=group, max_rank=spec.max_rank, config=config)
        for i in layers:
            out = add_sm90(out, x, pages, both, both, *segments, layer=i, **chosen)
        return out

    @jax.jit
    def xla_pair(x, out, *where):
        for i in layers:
            y = reference.shrink(x, *where, layer=i, max_rank=spec.max_rank, **reference_options)
            out = reference.expand(out, y, *where, layer=i, **reference_options)
        return out

    y = jax.tree.map(jnp.nan_to_num, shrink(x, *inputs.where())[0])
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


def products(inputs: Inputs, group: str, num_layers: int):
    """Name -> (compiled function over `num_layers` layers, its arguments) of the base projection with and without the
    deltas; none where the step is not one for that.
    """
    spec, g = inputs.spec, inputs.spec.geometry
    x, _ = inputs.activations(group)
    widths = g.in_sizes[GROUPS[group][0]], sum(g.out_sizes[m] for m in GROUPS[group])
    layers = range(num_layers)
    few = small_for_few(spec.num_tokens, g) and bool(few_ranks(np.array(spec.ranks)).sum() <= MOST_FEW)
    options: dict[str, Any] = dict(group=group, max_rank=spec.max_rank, few_adapters=few)
    options |= dict(shrink_geometry=g, expand_geometry=g)

    def lora(xs, weights, pages, table, *segments):
        where = (pages, table, table, *segments)
        of_layer = zip(layers, xs, strict=True)
        return [
            lora_matmul(x, weights, lambda i=i, x=x: x @ weights[i], *where, layer=i, **options) for i, x in of_layer
        ]

    def base(xs, weights):
        return [x @ weights[i] for i, x in zip(layers, xs, strict=True)]

    if spec.num_tokens < PRODUCT_STEP and not few:
        return {}
    weights = jax.random.normal(jax.random.key(3), (num_layers, *widths), jnp.bfloat16)
    xs = [x + i for i in layers]  # of products with the same activations XLA makes one
    compiled = functools.partial(jax.jit, compiler_options=compiler_options())
    return {"matmul": (compiled(lora), (xs, weights, *inputs.where())), "base": (compiled(base), (xs, weights))}


def launches_us(fn, args, layers: int) -> dict[str, float]:
    """Kernel name -> microseconds of a launch on the device, of those that run in every layer, longest first."""
    runs = 4
    jax.block_until_ready(fn(*args))
    found = kernel_times(lambda: jax.block_until_ready([fn(*args) for _ in range(runs)]))
    each = {name: total / count * 1e6 for name, (total, count) in found.items() if count >= runs * layers}
    return dict(sorted(each.items(), key=lambda item: -item[1]))


_TUNED = {  # op of the table -> shapes whose times are multiplied
    "lora_short": ("decode_64_distinct_r16_qkvo", "decode_256_distinct_r16_qkvo", "decode_64_mixed_qkvo"),
    "lora_long": ("prefill_2048_1_segments_r16", "prefill_2048_8_segments_r64"),
}


def _candidates(op: str) -> list[LoraConfig]:
    """Configs that move work around, and no sum."""
    if op == "lora_short":
        return [LoraConfig(expand_stages=stages, shrink_packed=packed) for stages in (2, 3) for packed in (2, 4)]
    long = default_config(SPECS["7b_prefill_2048_1_segments_r16"].geometry, 2048)
    return [
        dataclasses.replace(long, range_tiles=tiles, shrink_stages=stages) for tiles in (16, 32) for stages in (2, 3)
    ]


def tune(layers: int) -> None:
    """Writes the config with the least product of times over a geometry's named shapes into the kernels' table."""
    for name, geometry in GEOMETRIES.items():
        for op, shapes in _TUNED.items():
            score = dict.fromkeys(_candidates(op), 0.0)
            for shape in shapes:
                spec = SPECS[f"{name}_{shape}"]
                inputs = Inputs(spec)
                for config in score:
                    for group in spec.groups[:2]:
                        pair, args = steps(inputs, group, layers, config)["pair"]
                        micros = seconds(pair, *args) / layers * 1e6
                        score[config] += math.log(micros)
                        print(f"{name}_{shape} {group} {config}: {micros:.1f} us", flush=True)
                del inputs
            keep(op, shape_key(geometry), min(score, key=lambda config: score[config]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shape", action="append", choices=sorted(SPECS), help="may be repeated; all shapes if not given"
    )
    parser.add_argument("--op", action="append", choices=_OPS, help="all if not given; may be repeated")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--compare", action="store_true", help="time the XLA implementation and lax.ragged_dot too")
    parser.add_argument("--profile", action="store_true", help="also the device time of each launch")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--tune", action="store_true", help="fill the kernels' table of configs for this device, no more"
    )
    args = parser.parse_args()
    if args.tune:
        return tune(args.layers)
    found = ceilings()
    print(f"copy {found['copy'] / 1e12:.2f} TB/s on {jax.devices()[0].device_kind}")
    rows = []
    for name in args.shape or SPECS:
        spec = SPECS[name]
        inputs = Inputs(spec)
        for group in spec.groups:
            moved = bytes_moved(spec, group)
            timed = steps(inputs, group, args.layers)
            timed |= products(inputs, group, args.layers)
            timed = {op: timed[op] for op in args.op or _OPS if op in timed}
            layers = dict.fromkeys(timed, args.layers)
            if args.compare:
                layers["xla_pair"] = layers["ragged_dot_pair"] = 2
                timed["xla_pair"] = steps(inputs, group, 2)["xla_pair"]
                timed["ragged_dot_pair"] = ragged_dot_pair(spec, group, 2)
            for op, (fn, fn_args) in timed.items():
                micros = seconds(fn, *fn_args) / layers[op] * 1e6
                if op in ("matmul", "base"):
                    size = product_bytes(spec, group)
                    floor = max(product_flops(spec, group) / found["gemm"], size / found["copy"]) * 1e6
                else:
                    size = moved[op.split("_")[-1]]
                    floor = size / found["copy"] * 1e6
                rows.append(
                    dict(shape=name, group=group, op=op, bytes=size, floor_us=floor, us=micros, ratio=micros / floor)
                )
                print(
                    f"{name:34s} {group:5s} {op:16s} {micros:9.2f} us  floor {floor:8.2f}  x{micros / floor:.2f}",
                    flush=True,
                )
                if args.profile:
                    rows[-1]["launches_us"] = launches_us(fn, fn_args, layers[op])
                    for kernel, micros in rows[-1]["launches_us"].items():
                        print(f"{'':42s}{micros:9.2f} us  {kernel[:60]}", flush=True)
            if args.json:  # after every group: a run cut short leaves what it has
                write_result(args.json, dict(ceilings=found, results=rows))
        del inputs


if __name__ == "__main__":
    main()
