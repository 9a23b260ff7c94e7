"""How well the twin predicts the results of ``python -m benchmarks.serving.paper``: each part from the others."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from benchmarks.serving.paper_parts import PARTS, Part
from benchmarks.serving.paper_report import rate, simulated
from slora_jax.buckets import Buckets
from slora_jax.twin import fit_cost
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
    engine = points[name]["engine"]
    buckets = Buckets(seqs=tuple(engine["seq_buckets"]), tokens=tuple(engine["token_buckets"]))
    return simulated(points[name], part, cost, buckets) | dict(step_error=deviation)


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
