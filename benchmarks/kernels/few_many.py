"""Launches of the one kernel with few and with many adapters beside cuBLAS and lora_add: not run yet.

`python -m benchmarks.kernels.few_many 7b qkv base add:d64 few:d64 few:d64:f3 few:d64:c1 few:d64:s2 few:r16 ...`; f: stages
of base weights before A; c: tiles of a copy of A; s: shares. Compiles all first, then measures all.
"""

import functools
import os
from pathlib import Path
import sys
from typing import Any

import jax
from jax import numpy as jnp

from benchmarks.decode_step import gpu_turn
from benchmarks.kernels.bench_lora import Inputs, launches_us
from pallas_kernels import lora_matmul
from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora import any_rows, few_load, kernel_few_sm90
from pallas_kernels.lora.arg_specs import GEOMETRIES, SPECS, LoraSpec
from pallas_kernels.lora.kernel_sm90 import Matrices, few_sm90
from slora_jax.step import compiler_options

LAYERS = 8
KINDS: dict[str, Any] = {
    "none": ((64,), (16,), 128),
    "r16": ((64,), (16,), 128),
    "8xr16": ((8,) * 8, (16,) * 8, 128),
    "d64": ((1,) * 64, (16,) * 64, 1024),
    "mixed": ((1,) * 64, SPECS["7b_decode_64_mixed_qkvo"].ranks, 2560),
}
DEFAULTS = few_load.FIRST_STAGES, kernel_few_sm90._CHUNK, kernel_few_sm90.shares_of


def choose(options) -> None:
    few_load.FIRST_STAGES, kernel_few_sm90._CHUNK, kernel_few_sm90.shares_of = DEFAULTS
    for option in options:
        value = int(option[1:])
        if option[0] == "f":
            few_load.FIRST_STAGES = value
        if option[0] == "c":
            kernel_few_sm90._CHUNK = value
        if option[0] == "s":
            kernel_few_sm90.shares_of = lambda *_, value=value: value
    jax.clear_caches()
    any_rows._attributes.cache_clear()


def main() -> None:
    name, group, *runs = sys.argv[1:]
    g, m, made = GEOMETRIES[name], GROUPS[group], []
    width = g.in_sizes[m[0]], sum(g.out_sizes[i] for i in m)
    weights = jax.random.normal(jax.random.key(3), (LAYERS, *width), jnp.bfloat16) / 64
    for run in runs:
        form, *more = run.split(":")
        segments, ranks, most = KINDS[more[0] if more else "r16"]
        choose(more[1:])
        inputs = Inputs(LoraSpec(geometry=g, segments=segments, ranks=ranks))
        x, _ = inputs.activations(group)
        xs = [x * (1 + i / 8) for i in range(LAYERS)]
        pages, table, *where = inputs.where()
        if more[:1] == ["none"]:
            where[1] = where[1] * 0 - 1

        def base(xs, w, *_):
            return [xs[i] @ w[i] for i in range(LAYERS)]

        def add(xs, w, pages, table, *where):
            options: dict[str, Any] = dict(group=group, max_rank=128, shrink_geometry=g, expand_geometry=g)
            product = lambda i: lambda: xs[i] @ w[i]  # noqa: E731
            return [
                lora_matmul(xs[i], w, product(i), pages, table, table, *where, layer=i, **options)
                for i in range(LAYERS)
            ]

        def few(xs, w, pages, table, *where, most=most):
            both = Matrices(table=table, geometry=g)
            return [
                few_sm90(xs[i], w, pages, both, *where, layer=i, group=group, most_ranks=most) for i in range(LAYERS)
            ]

        args = (xs, weights, pages, table, *where)
        program = functools.partial(jax.jit, compiler_options=compiler_options())(
            dict(base=base, add=add, few=few)[form]
        )
        made.append((run, form, more, program.lower(*args).compile(), args))
    with gpu_turn(Path(os.environ["TURN"]) if "TURN" in os.environ else None):
        show(name, group, made)


def show(name, group, made) -> None:
    results: dict[str, Any] = {}
    for run, form, more, fn, args in made:
        us = launches_us(fn, args, LAYERS)
        found = [r.astype(jnp.float32) for r in fn(*args)][::7]
        error = ""
        if form == "add":
            results[more[0]] = found
        elif more and more[0] in results:
            pairs = zip(found, results[more[0]], strict=True)
            error = f", {max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs):.1e} from lora_add's"
        print(f"{name} {group} {run}: {sum(us.values()):.2f} us{error}", flush=True)


if __name__ == "__main__":
    main()
