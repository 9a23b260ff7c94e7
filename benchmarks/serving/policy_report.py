"""S-LoRA's figures 10 to 12 and the noisy tenant from the results of ``python -m benchmarks.serving.paper``."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.serving.paper_parts import POLICIES, Part, policy_part
from benchmarks.serving.policies import POINTS


def show_policies(points: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Prints what was measured of them; nothing if nothing was. points: measured parts, by name."""
    points = {name: point for name, point in points.items() if "error" not in point}
    if any(name.startswith("policy") for name in points):
        print("\nSLO attainment / satisfaction\n")
        print("| cv, alpha | " + " | ".join(f"{cv}, {alpha:g}" for cv, alpha in POINTS) + " |")
        print("|---|" + "---|" * len(POINTS))
        for policy in POLICIES:
            names = [policy_part(policy, cv, alpha) for cv, alpha in POINTS]
            print(f"| {policy} | " + " | ".join(_attained(points[n]) if n in points else "" for n in names) + " |")
    for name, point in points.items():
        if not name.startswith("tenants"):
            continue
        others = quiet_waits(point, parts[name])
        p50, p99 = np.percentile(others, (50, 99))
        print(f"{name}: first tokens of the quiet tenants' {len(others)} requests: p50 {p50:.4f} s, p99 {p99:.4f} s")


def _attained(point: Mapping[str, Any]) -> str:
    return f"{point['figures']['slo_attainment']:.3f} / {point['figures']['satisfaction']:.2f}"


def quiet_waits(point: Mapping[str, Any], part: Part) -> list[float]:
    """Seconds to the first tokens of all tenants but the noisy one. Who had none when the part ended waited until then,
    at least.
    """
    columns, rows = point["requests"]["columns"], [row.split() for row in point["requests"]["rows"]]
    arrival, first = columns.index("arrival"), columns.index("first_token")
    end = part.until or 0.0
    return [
        (end if row[first] == "-" else float(row[first])) - float(row[arrival])
        for row, request in zip(rows, part.trace(), strict=True)
        if request.tenant != "noisy"
    ]
