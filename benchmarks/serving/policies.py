"""S-LoRA's figures 10 to 12, and a noisy tenant, in the twin: policies against first come, first served.

    python -m benchmarks.serving.policies --json benchmarks/results/twin_policies.json

Needs no GPU. What is S-LoRA's: the points of cv and alpha, the number of adapters under clustering, 13B with ranks 64,
32 and 16 and a pool of 14,000 tokens there, two minutes. What is ours: the devices, which are cost models, and the
rates: 3 requests/s, which is above what they can serve, and two points of less load.
"""

import argparse
from collections.abc import Iterator
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, write_result
from slora_jax.shapes import named_shape
from slora_jax.traces import SETTINGS, TraceRequest, merge, synthetic_trace
from slora_jax.twin import Ceilings, CostModel, Simulation, SimulationResult, ideal_cost, simulate, summarise

POINTS = [(cv, 1.0) for cv in (1, 2, 4, 6, 8)] + [(1, alpha) for alpha in (0.1, 0.3, 0.6)]
MODERATE = [(1, 2.0), (8, 1.0)]  # cv, requests/s
_SLOW = CostModel(  # eight seats and a step of a tenth of a second: small enough to be crowded by a few requests
    name="slow", step=0.02, weights=0.08, token=2e-4, decode_context=1e-6, adapter_byte=4e-12, load_byte=1e-10
)
_A100 = Ceilings(bytes_per_second=1.3e12, operations_per_second=220e12, host_bytes_per_second=12e9)


def slow(**options) -> Simulation:
    """A device on which a few requests a second are a crowd."""
    options = dict(max_seqs=8, page_pool_bytes=4 << 30) | options
    return Simulation(config=named_shape("llama-7b"), setting=SETTINGS["S2"], cost=_SLOW, **options)


def a100_40(**options) -> Simulation:
    """S-LoRA's 13B on 40 GB, of which it gave 14,000 tokens to the pool."""
    config = named_shape("llama-2-13b")
    cost = dataclasses.replace(ideal_cost(config, _A100), name="A100-40", step=0.01)
    pool = 14_000 // 16 * config.num_layers * config.geometry.page_elements * 2
    return Simulation(config=config, setting=SETTINGS["S4"], cost=cost, page_pool_bytes=pool, **options)


def _attained(result: SimulationResult) -> dict[str, float]:
    figures = summarise(result.records)
    kept = {name: figures[name] for name in ("slo_attainment", "satisfaction", "requests_per_second", "aborted")}
    return kept | dict(loads=result.counters["loads"])


def early_abort() -> Iterator[dict[str, Any]]:
    policies: dict[str, dict[str, Any]] = {
        "fcfs": {},
        "early-abort, S-LoRA's rule": dict(policy="early-abort", policy_options={"slack": 0.5}),
        "early-abort": dict(policy="early-abort"),
    }
    for cv, alpha, rate in [(*point, 3.0) for point in POINTS] + [(cv, 1.0, rate) for cv, rate in MODERATE]:
        trace = synthetic_trace(adapters=50, rate=rate, seconds=120, cv=cv, alpha=alpha, lengths=(8, 64))
        point = dict(cv=cv, alpha=alpha, rate=rate)
        yield point | {name: _attained(simulate(slow(**options), trace)) for name, options in policies.items()}


def clustering() -> Iterator[dict[str, Any]]:
    for cv, alpha in POINTS:
        trace = synthetic_trace(adapters=32, rate=3, seconds=120, cv=cv, alpha=alpha)
        yield dict(cv=cv, alpha=alpha, rate=3.0) | {
            p: _attained(simulate(a100_40(policy=p), trace)) for p in ("fcfs", "cluster")
        }


def noisy(
    tenants: int, rate: float, seconds: float = 120, lengths: tuple[int, int] = (8, 64)
) -> tuple[list[TraceRequest], list[TraceRequest]]:
    """Quiet tenants of `rate` requests a second each; and they beside one of ten times that."""
    quiet = synthetic_trace(adapters=8, rate=tenants * rate, seconds=seconds, lengths=lengths, seed=1)
    quiet = [dataclasses.replace(r, tenant=f"quiet-{i % tenants}") for i, r in enumerate(quiet)]
    loud = synthetic_trace(adapters=1, rate=10 * rate, seconds=seconds, lengths=lengths, seed=2)
    return quiet, merge(quiet, [dataclasses.replace(r, tenant="noisy", adapter=9) for r in loud])


def others_p99(result: SimulationResult) -> float:
    """p99 of the first token of all tenants but the noisy one, in seconds."""
    waits = [r.ttft for r in result.records if r.request.tenant != "noisy" and r.ttft is not None]
    return float(np.percentile(waits, 99))


def noisy_tenant() -> Iterator[dict[str, Any]]:
    for tenants, rate in ((1, 0.3), (5, 0.1)):
        quiet, mixed = noisy(tenants, rate)
        alone = others_p99(simulate(slow(), quiet))
        policies: dict[str, dict[str, Any]] = {
            "fcfs": {},
            "fair, order only": dict(policy="fair", policy_options={"preempt": False, "burst": 0.0}),
            "fair": dict(policy="fair"),
        }
        p99 = {name: others_p99(simulate(slow(**options), mixed)) for name, options in policies.items()}
        ratios = {name: value / alone for name, value in p99.items()}
        yield dict(quiet_tenants=tenants, rate_of_each=rate, alone_p99=alone, p99=p99, ratio=ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "twin_policies.json")
    args = parser.parse_args()
    result = dict(early_abort=list(early_abort()), clustering=list(clustering()), noisy_tenant=list(noisy_tenant()))
    write_result(args.json, result)
    for name in ("early_abort", "clustering"):
        print(f"{name}: SLO attainment / satisfaction")
        for point in result[name]:
            figures = {k: v for k, v in point.items() if isinstance(v, dict)}
            shares = [f"{k} {v['slo_attainment']:.3f} / {v['satisfaction']:.3f}" for k, v in figures.items()]
            print(f"  cv {point['cv']}, alpha {point['alpha']}, {point['rate']:g}/s: {', '.join(shares)}")
    print("noisy_tenant: p99 of the others' first tokens, of what it is without the noisy one")
    for point in result["noisy_tenant"]:
        shares = ", ".join(f"{name} {ratio:.2f}" for name, ratio in point["ratio"].items())
        print(f"  {point['quiet_tenants']} quiet: {shares}")


if __name__ == "__main__":
    main()
