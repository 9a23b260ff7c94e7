"""Paged attention on one GPU against its floor and against other implementations.

    python -m benchmarks.kernels.bench_attention --shape 64x1024-gqa --json out.json

Floor of decode: bytes of keys and values / measured copy bandwidth. Floor of prefill: FLOPs / measured GEMM rate.
Every timing runs the op once for each of several layers of one pool, so that no layer's pages are left in the L2 cache,
in one compiled step; the median of a few repeats is divided by the layers.
"""

import argparse
import dataclasses
import functools
import math
from pathlib import Path
import statistics
import time
import warnings

import jax
from jax import numpy as jnp

from benchmarks.record import write_result
from pallas_kernels.geometry import PAGE_TOKENS, ceil_div
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.arg_specs import DECODE, HEADS, PREFILL, AttentionShape, geometry
from pallas_kernels.paged_attention.config import DecodeConfig, PrefillConfig, shape_key
from pallas_kernels.paged_attention.decode_sm90 import decode_sm90
from pallas_kernels.paged_attention.prefill_sm90 import prefill_sm90
from pallas_kernels.paged_attention.prefill_sm90 import unsupported as prefill_unsupported
from pallas_kernels.tuning import keep

POOL_BYTES = 6 << 30


def seconds(fn, *args, warm: float = 0.15, spend: float = 0.3) -> float:
    """Median time of one call, from batches of calls dispatched back to back, after warming up."""
    jax.block_until_ready(fn(*args))
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < warm:
        jax.block_until_ready(fn(*args))
        calls += 1
    inner = max(calls // 6, 1)
    times = []
    while len(times) < 5 or sum(times) * inner < spend:
        start = time.perf_counter()
        for _ in range(inner):
            out = fn(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / inner)
    return statistics.median(times)


def require_gpu() -> None:
    """Ends the program where there is none: a CPU would run out of memory and patience."""
    if jax.default_backend() != "gpu":
        raise SystemExit(f"this benchmark needs an NVIDIA GPU; JAX finds only {jax.devices()[0].device_kind}")


def ceilings() -> dict[str, float]:
    """Copy bandwidth in bytes/s (read + written; XLA's and, where torch is at hand, torch's) and bf16 GEMM FLOP/s."""
    require_gpu()
    x = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.bfloat16)
    found = {"copy_xla": 4 * x.size / seconds(jax.jit(lambda x: -x), x)}
    del x
    a, b = jax.random.normal(jax.random.key(1), (2, 8192, 8192), jnp.bfloat16)
    found["gemm"] = 2 * 8192**3 / seconds(jax.jit(jnp.dot), a, b)
    del a, b
    try:
        import torch

        x = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
        y = torch.empty_like(x)
        for _ in range(3):
            y.copy_(x)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            y.copy_(x)
        torch.cuda.synchronize()
        found["copy_torch"] = 10 * 4 * x.numel() / (time.perf_counter() - start)
        del x, y
        torch.cuda.empty_cache()
    except ImportError:
        pass
    found["copy"] = max(found["copy_xla"], found.get("copy_torch", 0.0))
    return found


class Inputs:
    """A pool of several layers with the shape's pages scattered over it."""

    def __init__(self, shape: AttentionShape, pool_bytes: int = POOL_BYTES):
        g = shape.geometry
        per_seq = ceil_div(shape.context, PAGE_TOKENS)
        used = shape.seqs * per_seq
        num_pages = used + 1
        layers = max(min(pool_bytes // (num_pages * g.page_elements * 2), 32), 2)
        self.geometry = dataclasses.replace(g, num_layers=layers)
        one = jax.random.normal(jax.random.key(0), (num_pages, g.page_elements), jnp.bfloat16)
        self.pages = jnp.stack([jnp.roll(one, i, axis=0) for i in range(layers)])
        order = jax.random.permutation(jax.random.key(1), num_pages)[:used]
        tables, shared = order.reshape(shape.seqs, per_seq).astype(jnp.int32), shape.shared // PAGE_TOKENS
        self.tables = tables.at[:, :shared].set(tables[0, :shared])
        q_shape = (shape.seqs * shape.queries, shape.heads, shape.dim)
        self.q = jax.random.normal(jax.random.key(2), q_shape, jnp.bfloat16)
        self.q_start = jnp.arange(shape.seqs + 1, dtype=jnp.int32) * shape.queries
        self.lens = jnp.full((shape.seqs,), shape.context, jnp.int32)
        self.scale = shape.dim**-0.5

    def per_layer(self, op, layers: int | None = None) -> float:
        """Seconds of op(q, pages, tables, q_start, lens, layer), averaged over the layers, each fed the one before."""
        layers = layers or self.geometry.num_layers

        @jax.jit
        def run(q, *args):
            for layer in range(layers):
                q = op(q, *args, layer)
            return q

        return seconds(run, self.q, self.pages, self.tables, self.q_start, self.lens) / layers


def ours_decode(x: Inputs, config=None, **options):
    return lambda q, pages, tables, q_start, lens, layer: decode_sm90(
        q, pages, tables, q_start, lens, layer=layer, geometry=x.geometry, sm_scale=x.scale, config=config, **options
    )


def ours_prefill(x: Inputs, config=None, **options):
    return lambda q, pages, tables, q_start, lens, layer: prefill_sm90(
        q, pages, tables, q_start, lens, layer=layer, geometry=x.geometry, sm_scale=x.scale, config=config, **options
    )


def xla(x: Inputs, max_query: int):
    return lambda q, pages, tables, q_start, lens, layer: reference.paged_attention(
        q,
        pages,
        tables,
        q_start,
        lens,
        layer=layer,
        geometry=x.geometry,
        max_query=max_query,
        sm_scale=x.scale,
        sliding_window=None,
        soft_cap=None,
    )


def jax_triton_decode(shape: AttentionShape) -> float:
    """Seconds of JAX's own (deprecated) Triton paged attention on a pool of its own layout, [K, P, page, D]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas.ops.gpu import paged_attention as theirs
    per_seq = ceil_div(shape.context, PAGE_TOKENS)
    pages = shape.seqs * per_seq
    copies = max(min(POOL_BYTES // 2 // (shape.bytes + 1), 8), 2)
    kv = jax.random.normal(jax.random.key(0), (copies, 2, shape.kv_heads, pages, PAGE_TOKENS, shape.dim), jnp.bfloat16)
    tables = jax.random.permutation(jax.random.key(1), pages).reshape(shape.seqs, per_seq).astype(jnp.int32)
    q = jax.random.normal(jax.random.key(2), (shape.seqs, shape.heads, shape.dim), jnp.bfloat16)
    lens = jnp.full((shape.seqs,), shape.context, jnp.int32)

    slices = jax.jit(lambda kv: [kv[i, j] for i in range(copies) for j in range(2)])(kv)
    del kv

    @jax.jit
    def run_slices(q, slices, tables, lens):
        for i in range(copies):
            q = theirs.paged_attention(
                q, slices[2 * i], slices[2 * i + 1], tables, lens, k_splits=max(shape.context // 1024, 1)
            )
        return q

    return seconds(run_slices, q, slices, tables, lens) / copies


def cudnn_prefill(shape: AttentionShape) -> float:
    """Seconds of cuDNN on contiguous keys and values: the chunk against itself (causal) and what is before it."""
    key = jax.random.key(0)

    def rand(i, tokens, heads):
        return jax.random.normal(jax.random.fold_in(key, i), (shape.seqs, tokens, heads, shape.dim), jnp.bfloat16)

    q, k, v = (rand(i, shape.queries, n) for i, n in enumerate((shape.heads, shape.kv_heads, shape.kv_heads)))
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")

    @functools.partial(jax.jit, static_argnames="causal")
    def run(q, k, v, causal):
        for _ in range(4):
            q = attend(q, k, v, is_causal=causal)
        return q

    total = seconds(functools.partial(run, causal=True), q, k, v) / 4
    if before := shape.context - shape.queries:
        k, v = (rand(3 + i, before, shape.kv_heads) for i in range(2))
        total += seconds(functools.partial(run, causal=False), q, k, v) / 4
    return total


def report(op: str, name: str, shape: AttentionShape, measured: float, ceiling: dict, **extra) -> dict:
    decode = op == "decode"
    floor = shape.bytes / ceiling["copy"] if decode else shape.flops / ceiling["gemm"]
    row = {"op": op, "shape": name, "bytes": shape.bytes, "flops": shape.flops, "floor_us": floor * 1e6}
    row |= {"measured_us": measured * 1e6, "ratio": floor / measured, **extra}
    rate = f"{shape.bytes / measured / 1e12:.2f} TB/s" if decode else f"{shape.flops / measured / 1e12:.0f} TFLOP/s"
    others = "  ".join(f"{k}={v:.4g}" for k, v in extra.items() if isinstance(v, float))
    times = f"{measured * 1e6:9.1f} us  floor {floor * 1e6:9.1f}  ratio {floor / measured:.3f}"
    print(f"{op:8} {name:16} {times}  {rate}  {others}")
    return row


def bench_decode(name: str, ceiling: dict, others: bool) -> dict:
    shape = DECODE[name]
    x = Inputs(shape)
    measured = x.per_layer(ours_decode(x))
    extra = {}
    if others:
        extra["xla_us"] = x.per_layer(xla(x, 1), layers=2) * 1e6
        del x
    if others and not shape.shared:  # it has pages of its own here, and shares none
        extra["jax_triton_us"] = jax_triton_decode(shape) * 1e6
    return report("decode", name, shape, measured, ceiling, **extra)


def bench_prefill(name: str, ceiling: dict, others: bool) -> dict:
    shape = PREFILL[name]
    x = Inputs(shape)
    measured = x.per_layer(ours_prefill(x), layers=min(x.geometry.num_layers, 4))
    extra = {}
    if others:
        extra["cudnn_us"] = cudnn_prefill(shape) * 1e6
        extra["of_cudnn"] = extra["cudnn_us"] / (measured * 1e6)
    return report("prefill", name, shape, measured, ceiling, **extra)


DECODE_CANDIDATES = [
    DecodeConfig(block_kv=block, stages=stages, blocks_per_sm=blocks, min_split=split)
    for block, stages, blocks in ((64, 3, 2), (64, 6, 2), (128, 3, 1), (64, 6, 1))
    for split in (512, 1024)
]
PREFILL_CANDIDATES = [PrefillConfig(block_kv=block, stages=stages) for block, stages in ((128, 2), (128, 3), (64, 4))]


def tune() -> None:
    """Writes the config with the least product of times over a head layout's named shapes into the kernels' table."""
    require_gpu()
    for kind, (heads, kv_heads, dim) in HEADS.items():
        g = geometry(heads, kv_heads, dim)
        cases = (
            ("decode", DECODE, [c for c in DECODE_CANDIDATES if c.fits(g)], ours_decode),
            (
                "prefill",
                PREFILL,
                [c for c in PREFILL_CANDIDATES if not prefill_unsupported(g, "bfloat16", c)],
                ours_prefill,
            ),
        )
        for op, shapes, candidates, ours in cases:
            score = dict.fromkeys(candidates, 0.0)
            for name in (n for n in shapes if n.endswith(kind)):
                x = Inputs(shapes[name])
                for config in candidates:
                    measured = x.per_layer(ours(x, config), layers=min(x.geometry.num_layers, 8))
                    score[config] += math.log(measured)
                    print(f"{name} {config}: {measured * 1e6:.1f} us")
                del x
            keep(f"attention_{op}", shape_key(g), min(score, key=score.get))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=[*DECODE, *PREFILL], choices=[*DECODE, *PREFILL])
    parser.add_argument("--only-ours", action="store_true", help="leave out the other implementations")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument(
        "--tune", action="store_true", help="fill the kernels' table of configs for this device, no more"
    )
    args = parser.parse_args()
    if args.tune:
        return tune()
    ceiling = ceilings()
    device = jax.devices()[0].device_kind
    print(device, {k: f"{v / 1e12:.2f}e12" for k, v in ceiling.items()})
    rows = []
    for name in args.shape:
        bench = bench_decode if name in DECODE else bench_prefill
        rows.append(bench(name, ceiling, not args.only_ours))
        if args.json:  # after every shape: a run cut short leaves what it has
            write_result(args.json, dict(ceilings=ceiling, results=rows))


if __name__ == "__main__":
    main()
