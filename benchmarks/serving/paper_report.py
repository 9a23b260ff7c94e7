"""Floors and a table for the results of ``python -m benchmarks.serving.paper``. Needs no GPU."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.serving.baselines.split_pool import pool_of_slots, seat_by_slot
from benchmarks.serving.paper_parts import PARTS, Part
from benchmarks.serving.policy_report import show_policies
from benchmarks.serving.window import cut_off, window_figures
from slora_jax.buckets import Buckets
from slora_jax.shapes import named_shape
from slora_jax.traces import Setting
from slora_jax.twin import Ceilings, CostModel, Simulation, ideal_cost, simulate, summarise

_OF = {
    "load S2 n=2000": ("load S2 n=5", "load base"),
    "load S1 n=2000": ("load S1 n=5", "load base"),
    **{
        f"load {setting} n={n}, {running} running, gather": tuple(
            f"load {other}, {running} running, gather" for other in (f"{setting} n=5", "base")
        )
        for setting, n, running in (
            ("S2", 2000, 256),
            ("S2", 1000, 256),
            ("S2", 100, 256),
            ("S2", 2000, 384),
            ("S1", 2000, 384),
        )
    },
    **{
        f"mixed {kind}, 24 GiB, unified": tuple(f"mixed {kind}, 24 GiB, {n} fixed slots" for n in (32, 64))
        for kind in ("ranks", "load")
    },
}
"""Parts and those whose throughput theirs is compared with."""


def rate(point: Mapping[str, Any]) -> float:
    """Requests/s: of the window where there is one, else of the whole."""
    return (point.get("window") or dict(by_tokens=point["figures"]["requests_per_second"]))["by_tokens"]


def first_tokens(figures: Mapping[str, Any]) -> dict[str, float]:
    """p50 and p99 of the seconds to the first token; nan where there was none."""
    return figures["ttft"] or dict(p50=float("nan"), p99=float("nan"))


def setting_of(point: Mapping[str, Any]) -> Setting:
    return Setting(**{k: tuple(v) if isinstance(v, list) else v for k, v in point["setting"].items()})


def ideal(point: Mapping[str, Any]) -> CostModel:
    """A device that does nothing but move the bytes and compute the operations, at the ceilings that were measured."""
    config = named_shape(setting_of(point).shape)
    return ideal_cost(config, Ceilings(**point["started"]["ceilings"]), point["limits"]["item_bytes"])


def simulated(
    point: Mapping[str, Any], part: Part, cost: CostModel, buckets: Buckets | None = None, **options: Any
) -> dict[str, Any]:
    """What a part would be on a device of such costs. buckets: to which steps are padded. options: of Simulation.

    figures are of what came before the part was cut off, as when it is measured; records, steps and pages go on to the
    end.
    """
    setting = setting_of(point)
    if part.slots:
        setting = dataclasses.replace(setting, ranks=(max(setting.ranks),))
    simulation = Simulation(
        config=named_shape(setting.shape),
        setting=setting,
        cost=cost,
        buckets=buckets,
        log_steps=True,
        policy=part.policy,
        policy_options=part.options,
        prompt_gap=part.prompt_gap,
        **options,
        **point["limits"],
    )
    result = simulate(simulation, part.trace(), **_memory(simulation, part))
    known = result.records if part.until is None else cut_off(result.records, part.until)
    found: dict[str, Any] = dict(figures=summarise(known, part.slo), records=result.records)
    found |= dict(steps=result.steps, pages=result.pages)
    if part.window:
        found["window"] = window_figures(result.records, result.steps, *part.window)
    return found


def _memory(simulation: Simulation, part: Part) -> dict[str, Any]:
    """Of a part with slots: simulate's options for a split pool."""
    if not part.slots:
        return {}
    make = pool_of_slots(part.slots, simulation.adapter(0).num_pages)
    return dict(make_pool=make, prepare=seat_by_slot)


def floor(point: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """The same trace on the ideal device."""
    found = simulated(point, part, ideal(point))
    figures = found["figures"]
    kept = dict(requests_per_second=figures["requests_per_second"], ttft=figures["ttft"])
    return kept | (dict(window=found["window"]) if part.window else {})


def report(path: Path) -> None:
    """Adds what is missing to a file of results, and shows it."""
    result = json.loads(path.read_text())
    points, lengths = result["parts"], result["lengths"] and tuple(result["lengths"])
    for name, point in points.items():
        if "error" not in point and "floor" not in point and not PARTS[name].slots and PARTS[name].kind != "profile":
            point["floor"] = floor(point, PARTS[name].smaller(result["requests"], lengths, result["speed"]))
    path.write_text(json.dumps(result, indent=1) + "\n")
    for family, started in {PARTS[n].family: p["started"] for n, p in points.items() if "started" in p}.items():
        print(f"{family}: {_start(started)}")
    print(f"\n{'':38} {'req/s':>6} {'floor':>6} {'of it':>5}  {'TTFT p50':>8} {'p99':>7}  {'SLO':>5}  {'running':>7}")
    for name, point in points.items():
        if "error" in point:
            print(f"{name:38} {point['error']}")
            continue
        figures, best = (
            point["figures"],
            rate(point["floor"] | dict(figures=point["floor"])) if "floor" in point else None,
        )
        share = f"{best:6.1f} {rate(point) / best:5.2f}" if best else " " * 12
        ttft = first_tokens(figures)
        print(
            f"{name:38} {rate(point):6.2f} {share}  {ttft['p50']:8.3f} {ttft['p99']:7.3f}  "
            f"{figures['slo_attainment']:5.3f}  {point['most_running']:7d}"
        )
        if profile := point.get("profile"):
            print(
                f"{'':38} GPU idle {profile['idle']:.2%} of {profile['seconds']:.2f} s; longest gaps in µs: "
                f"{profile['longest_gaps_us']}"
            )
    print()
    for name, others in _OF.items():
        for other in others:
            mine, theirs = ((rate(p) if "figures" in p else 0.0) for p in (points.get(name, {}), points.get(other, {})))
            if mine and theirs:
                print(f"{name} / {other}: {mine / theirs:.3f}")
    show_policies(points, {name: PARTS[name].smaller(result["requests"], lengths, result["speed"]) for name in points})


def _start(started: Mapping[str, Any]) -> str:
    top = started["ceilings"]
    return (
        f"{started['device']}, copy {top['bytes_per_second'] / 1e12:.2f} TB/s, matrix products "
        f"{top['operations_per_second'] / 1e12:.0f} TFLOP/s, from host {top['host_bytes_per_second'] / 1e9:.0f} GB/s; "
        f"model {started['model_seconds']:.0f} s, {started['programs']} programs {started['compile_seconds']:.0f} s, "
        f"first token {started['process_seconds_at_first_token']:.0f} s after the process began"
    )
