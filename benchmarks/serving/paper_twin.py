"""How well the twin predicts the results of ``python -m benchmarks.serving.paper``: each part from the others."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from benchmarks.serving.paper_parts import PARTS, Part
from benchmarks.serving.paper_report import rate
from benchmarks.serving.window import window_figures
from slora_jax.buckets import Buckets
from slora_jax.shapes import named_shape
from slora_jax.traces import Setting
from slora_jax.twin import Simulation, fit_cost, simulate, summarise
from slora_jax.twin.steps import StepLog, join


def predict(points: Mapping[str, Any], name: str, part: Part) -> dict[str, Any] | None:
    """What the twin says of a part after a look at the steps of all others of its family, with adapters if it has
    some, without if not. None if there are no others.
    """
    kind = (part.family, bool(part.adapters), 0)
    others = {n: PARTS[n] for n in points if n != name and "steps" in points[n]}
    alike = [n for n, p in others.items() if (p.family, bool(p.adapters), p.slots) == kind]
    if not alike:
        return None
    cost, deviation = fit_cost(join([StepLog.from_json(points[n]["steps"]) for n in alike]))
    point = points[name]
    setting = Setting(**{k: tuple(v) if isinstance(v, list) else v for k, v in point["setting"].items()})
    engine = point["engine"]
    simulation = Simulation(
        config=named_shape(setting.shape),
        setting=setting,
        cost=cost,
        buckets=Buckets(seqs=tuple(engine["seq_buckets"]), tokens=tuple(engine["token_buckets"])),
        log_steps=True,
        **point["limits"],
    )
    result = simulate(simulation, part.trace())
    found: dict[str, Any] = dict(figures=summarise(result.records), step_error=deviation)
    if part.window:
        found["window"] = window_figures(result.records, result.steps, *part.window)
    return found


def compare(path: Path) -> None:
    """Shows measured and predicted figures side by side."""
    result = json.loads(path.read_text())
    points, lengths = result["parts"], result["lengths"] and tuple(result["lengths"])
    print(
        f"\n{'':34} {'req/s':>6} {'twin':>6} {'off':>6}  steps off   {'TTFT p50':>8} {'twin':>7} {'p99':>7} {'twin':>7}"
    )
    for name, point in points.items():
        part = PARTS[name]
        if "error" in point or part.kind == "profile" or part.slots:
            continue
        twin = predict(points, name, part.smaller(result["requests"], lengths, result["speed"]))
        if twin is None:
            continue
        measured, predicted = rate(point), rate(twin)
        off = predicted / measured - 1 if measured else float("nan")
        line = f"{name:34} {measured:6.2f} {predicted:6.2f} {off:+6.1%}  "
        line += f"{twin['step_error']:9.1%}   "
        if part.until is None:  # where it is cut off, the last ones never had a first token
            mine, its = point["figures"]["ttft"], twin["figures"]["ttft"]
            line += f"{mine['p50']:8.3f} {its['p50']:7.3f} {mine['p99']:7.2f} {its['p99']:7.2f}"
        print(line)
