"""The elementwise ops around the projections on one GPU: the Hopper kernels, XLA's fusions, and the floor.

    python -m benchmarks.kernels.bench_fused --json out.json

Floor: bytes read and written / measured copy bandwidth. Every timing runs the op on several buffers in one compiled
step, one after the other; together they exceed the L2 cache from 256 tokens on. With few tokens the launch is what
counts. XLA's figure is that of the same public function with implementation="xla"; rope_write_kv's also that of
XLA's rotation with the write_kv kernel.
"""

import argparse
from collections.abc import Callable
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from benchmarks.kernels.bench_attention import ceilings, seconds
from benchmarks.record import environment
from pallas_kernels import PAGE_TOKENS, Implementation, add_rms_norm, rope_write_kv, silu_mul, write_kv
from pallas_kernels.geometry import Geometry, ceil_div
from pallas_kernels.paged_attention.arg_specs import HEADS, geometry
from pallas_kernels.rope_write_kv import rotate
from pallas_kernels.rope_write_kv.kernel_sm90 import rope_write_kv_sm90
from pallas_kernels.silu_mul.kernel_sm90 import silu_mul_sm90

HIDDEN = 4096
MLP = {"7b": 11008, "8b": 14336}
BUFFERS_BYTES = 1 << 30
EPS = 1e-5

Op = Callable[..., Any]


def random(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape, jnp.bfloat16)


def buffers(nbytes: int) -> int:
    """How many buffers of a case to go through in one step."""
    return max(min(BUFFERS_BYTES // nbytes, 32), 4)


def in_turn(op: Op, parts: list[Any]) -> list[Any]:
    """op(part, index) for each part, one after the other: XLA must not make one kernel of several."""
    outputs = []
    for i, part in enumerate(parts):
        if outputs:
            outputs[-1], part = lax.optimization_barrier((outputs[-1], part))
        outputs.append(op(part, i))
    return outputs


def bench_add_rms_norm(tokens: int) -> tuple[int, dict[str, float]]:
    moved = 4 * tokens * HIDDEN * 2
    x = random(buffers(moved), 2, tokens, HIDDEN)
    weight, parts = random(x.shape[0], HIDDEN), [tuple(part) for part in x]

    def time(implementation: Implementation) -> float:
        @jax.jit
        def run(parts, weight):
            def op(pair, i):
                return add_rms_norm(*pair, weight, layer=i, eps=EPS, implementation=implementation)

            return in_turn(op, parts)

        return seconds(run, parts, weight) / len(parts)

    return moved, {"mosaic": time("mosaic"), "xla": time("xla")}


def bench_silu_mul(tokens: int, size: int) -> tuple[int, dict[str, float]]:
    moved = 3 * tokens * size * 2
    parts = list(random(buffers(moved), tokens, 2 * size))

    def time(op: Op) -> float:
        return seconds(jax.jit(lambda parts: in_turn(lambda x, i: op(x), parts)), parts) / len(parts)

    times = {name: time(functools.partial(silu_mul, implementation=name)) for name in ("mosaic", "xla")}
    for n in (1, 2, 4):
        times[f"mosaic_{n}_chunks"] = time(functools.partial(silu_mul_sm90, per_block=n))
    return moved, times


def bench_rope_write_kv(tokens: int, g: Geometry) -> tuple[int, dict[str, float]]:
    columns = (g.num_heads + 2 * g.num_kv_heads) * g.head_dim
    moved = 2 * tokens * columns * 2
    parts = list(random(buffers(moved), tokens, columns))
    num_pages = ceil_div(tokens, PAGE_TOKENS) + 1
    where = jax.random.permutation(jax.random.key(0), num_pages * PAGE_TOKENS)[:tokens].astype(jnp.int32)
    places = (where // PAGE_TOKENS, where % PAGE_TOKENS)
    angles = jax.random.uniform(jax.random.key(1), (tokens, g.head_dim // 2))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pages = random(len(parts), num_pages, g.page_elements)

    def separate(qkv, cos, sin, pages, *places, **options):
        sizes = [g.num_heads * g.head_dim, (g.num_heads + g.num_kv_heads) * g.head_dim]
        q, k, v = (x.reshape(tokens, -1, g.head_dim) for x in jnp.split(qkv, sizes, axis=-1))
        return rotate(q, cos, sin), write_kv(pages, rotate(k, cos, sin), v, *places, **options)

    def time(op: Op) -> float:
        @functools.partial(jax.jit, donate_argnums=0)
        def run(pages, parts, cos, sin, places):
            def one(part, i):
                nonlocal pages
                q, pages = op(part, cos, sin, pages, *places, layer=i, geometry=g)
                return q

            queries = in_turn(one, parts)
            return pages, queries

        def step():
            nonlocal pages
            pages, queries = run(pages, parts, cos, sin, places)
            return queries

        return seconds(step) / len(parts)

    return moved, {
        "mosaic": time(functools.partial(rope_write_kv, implementation="mosaic")),
        "mosaic_tile_per_block": time(functools.partial(rope_write_kv_sm90, split=True)),
        "mosaic_token_per_block": time(functools.partial(rope_write_kv_sm90, split=False)),
        "xla_and_write_kv": time(functools.partial(separate, implementation="mosaic")),
        "xla": time(functools.partial(rope_write_kv, implementation="xla")),
    }


def cases(tokens: int) -> dict[str, Callable[[], tuple[int, dict[str, float]]]]:
    found = {f"add_rms_norm {HIDDEN}": functools.partial(bench_add_rms_norm, tokens)}
    for name, size in MLP.items():
        found[f"silu_mul {name}"] = functools.partial(bench_silu_mul, tokens, size)
    for name, heads in HEADS.items():
        found[f"rope_write_kv {name}"] = functools.partial(bench_rope_write_kv, tokens, geometry(*heads, 32))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 64, 256, 2048])
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    ceiling = ceilings()
    print(f"copy {ceiling['copy'] / 1e12:.2f} TB/s on {jax.devices()[0].device_kind}", flush=True)
    rows = []
    for tokens in args.tokens:
        for name, run in cases(tokens).items():
            if args.op not in name:
                continue
            moved, times = run()
            floor = moved / ceiling["copy"]
            us = {kind: value * 1e6 for kind, value in times.items()}
            rows.append(dict(op=name, tokens=tokens, bytes=moved, floor_us=floor * 1e6, us=us))
            listed = "  ".join(f"{kind} {value:.2f}" for kind, value in us.items())
            ratio = floor / times["mosaic"]
            print(f"{tokens:5d} {name:20s} floor {floor * 1e6:6.2f} us  of copy {ratio:.2f}  us: {listed}", flush=True)
            if args.json:  # after every case: a run cut short leaves what it has
                found = dict(environment=environment(), ceilings=ceiling, results=rows)
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
