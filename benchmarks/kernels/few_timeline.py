"""When what happens in a launch."""
import functools, sys, json
import numpy as np
import jax
from jax import numpy as jnp
from benchmarks.kernels.bench_lora import Inputs
from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora import any_rows, few_ring, few_items, few_load, kernel_few_sm90 as k
from pallas_kernels.lora import kernel_sm90 as sm
from pallas_kernels.lora.arg_specs import GEOMETRIES, LoraSpec
from slora_jax.step import compiler_options
L = 8
C = functools.partial(jax.jit, compiler_options=compiler_options())
KINDS = {"none": ((64,), (16,), 128), "r16": ((64,), (16,), 128), "8xr16": ((8,) * 8, (16,) * 8, 128)}
NAMES = {0: "start", 1: "A warp", 18: "W asked", 3: "A asked", 4: "A there", 16: "y computed", 5: "y stored", 6: "signalled", 7: "all parts", 17: "summed", 8: "sum signalled", 9: "W all asked", 10: "y known", 11: "W done", 12: "delta done", 13: "exchanged", 14: "written", 15: "second written"}
SHARES = k.shares_of
for run in sys.argv[1:]:
    name, group, kind, *more = run.split(":")
    g = GEOMETRIES[name]
    k.shares_of = SHARES
    for option in more:
        if option[0] == "s": k.shares_of = lambda *a, n=int(option[1:]): n
    jax.clear_caches(); any_rows._attributes.cache_clear()
    m = GROUPS[group]
    K, N = g.in_sizes[m[0]], sum(g.out_sizes[i] for i in m)
    w = jax.random.normal(jax.random.key(3), (L, K, N), jnp.bfloat16) / 64
    segs, ranks, most = KINDS[kind]
    inputs = Inputs(LoraSpec(geometry=g, segments=segs, ranks=ranks))
    x, _ = inputs.activations(group)
    xs = [x * (1 + i / 8) for i in range(L)]
    pages, table, *segments = inputs.where()
    if kind == "none": segments[1] = segments[1] * 0 - 1
    def few(xs, w, pages, table, *s):
        plan = sm._make_few_plan(table, *s, blocks=k.few_blocks(most), geometry=g)
        return [sm._few(xs[i], w, pages, plan, jnp.full(1, i, jnp.int32), group=group, geometry=g) for i in range(L)], plan.signals
    fn = C(few).lower(xs, w, pages, table, *segments).compile()
    found = []
    for _ in range(8):
        s = np.asarray(jax.block_until_ready(fn(xs, w, pages, table, *segments))[1])[-132 * 48:].reshape(132, 24, 2)
        found.append(s)
    print(run)
    for which, unit in ((0, 1e-3), (1, 1 / 1755)):
        for e, label in NAMES.items():
            rows = []
            for s in found[2:]:
                t = s[:, e, which].astype(np.int64)
                ok = t != 0
                zero = s[:, 0, which].astype(np.int64)
                if which == 0: zero = np.full_like(zero, zero.min())
                if ok.any(): rows.append((t - zero)[ok] * unit)
            if rows:
                r = np.concatenate(rows)
                print(f"  {'global' if which == 0 else 'clock '} {label:14} n {len(r) // len(rows):4} min {r.min():6.2f} p50 {np.median(r):6.2f} p90 {np.quantile(r, .9):6.2f} max {r.max():6.2f}")
    sys.stdout.flush()
