"""What the twin says of the parts of ``python -m benchmarks.serving.paper``: of those that were measured, each from the
others; and of any, from all that were.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.paper_parts import PARTS, Part
from benchmarks.serving.paper_report import first_tokens, ideal, rate, simulated
from benchmarks.serving.window import pages_in_use
from slora_jax import EngineConfig
from slora_jax.buckets import Buckets
from slora_jax.twin import fit_cost
from slora_jax.twin.steps import StepLog, join

_LOADS = ("adapter_chunk_bytes", "adapter_step_bytes")  # that results name since policies differ; before, the defaults


def predict(points: Mapping[str, Any], name: str, part: Part) -> dict[str, Any] | None:
    """What the twin says of a part after a look at the steps of all others of its family, with adapters if it has
    some, without if not. None if there are no others.
    """
    alike = _alike({n: p for n, p in points.items() if n != name}, part)
    return _from(alike, points[name], part) if alike else None


def _alike(points: Mapping[str, Any], part: Part) -> list[Mapping[str, Any]]:
    """Points whose steps say what a part's cost."""
    kind = (part.family, bool(part.adapters), 0)
    parts = {n: PARTS[n] for n in points if "steps" in points[n]}
    return [points[n] for n, p in parts.items() if (p.family, bool(p.adapters), p.slots) == kind]


def _from(alike: Iterable[Mapping[str, Any]], point: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """A part at the costs of other points' steps. point: on whose engine."""
    cost, deviation = fit_cost(join([StepLog.from_json(other["steps"]) for other in alike]))
    engine = point["engine"]
    buckets = Buckets(seqs=tuple(engine["seq_buckets"]), tokens=tuple(engine["token_buckets"]))
    loads = {field: engine.get(field, getattr(EngineConfig, field)) for field in _LOADS}
    return simulated(point, part, cost, buckets, overlap=True, **loads) | dict(step_error=deviation)


def _off(predicted: float, measured: float) -> float:
    return predicted / measured - 1 if measured else float("nan")


def compare(path: Path) -> None:
    """Shows measured and predicted figures side by side."""
    result = json.loads(path.read_text())
    points, lengths = result["parts"], result["lengths"] and tuple(result["lengths"])
    heads = (f"{'TTFT p50':>8} {'twin':>7}", f"{'p99':>7} {'twin':>7}", f"{'SLO':>6} {'twin':>6}")
    heads += (f"{'pages':>6} {'twin':>6} {'off':>6}",)
    print(f"\n{'':34} {'req/s':>6} {'twin':>6} {'off':>6}  steps off   {'  '.join(heads)}")
    for name, point in points.items():
        part = PARTS[name].smaller(result["requests"], lengths, result["speed"])
        if "error" in point or part.kind == "profile" or part.slots:
            continue
        twin = predict(points, name, part)
        if twin is None:
            continue
        measured, predicted = rate(point), rate(twin)
        line = f"{name:34} {measured:6.2f} {predicted:6.2f} {_off(predicted, measured):+6.1%}  "
        line += f"{twin['step_error']:9.1%}   "
        mine, its = point["figures"], twin["figures"]
        ttft, twins = first_tokens(mine), first_tokens(its)
        line += f"{ttft['p50']:8.3f} {twins['p50']:7.3f}  {ttft['p99']:7.2f} {twins['p99']:7.2f}  "
        line += f"{mine['slo_attainment']:6.3f} {its['slo_attainment']:6.3f}  "
        if "pages" in point:  # the first results had none
            # until one of the two has nothing more to do, or is cut off
            span = part.window or (0.0, min(p["pages"][-1]["seconds"] for p in (point, twin)))
            held, twins_held = (pages_in_use(p["pages"], *span) for p in (point, twin))
            line += f"{held:6.0f} {twins_held:6.0f} {_off(twins_held, held):+6.1%}"
        print(line)


def forecast(path: Path, names: Iterable[str], slots: Iterable[int] = (), *, on_ideal: bool = False) -> None:
    """Shows what parts would give, measured or not, at the costs of all the steps in a file, or of the ideal device.

    slots: each part again with so many slots for adapters, padded, in memory of their own, instead of its own memory.
    TTFT: of the requests whose first token came before the end of the window. Waiting: of all that came before it,
    until then if need be.
    """
    result = json.loads(path.read_text())
    points, lengths = result["parts"], result["lengths"] and tuple(result["lengths"])
    head = f"{'req/s':>6} {'running':>7} {'adapters GB':>11}  {'TTFT p50':>8} {'p99':>6}"
    print(f"\n{'':38} {head}  {'waiting p50':>11} {'p99':>6}")
    parts = {name: PARTS[name].smaller(result["requests"], lengths, result["speed"]) for name in names}
    own = {name: part for name, part in parts.items() if not part.slots}
    parts |= {f"{name}, {n} slots": dataclasses.replace(part, slots=n) for name, part in own.items() for n in slots}
    for name, part in parts.items():
        alike = _alike(points, part)
        if part.kind == "profile" or not alike:
            continue
        limits = alike[0]["limits"] | dict(max_seqs=min(part.max_seqs, alike[0]["engine"]["seq_buckets"][-1]))
        setting = dataclasses.asdict(part.setting) | dict(shape=alike[0]["setting"]["shape"])
        point = dict(alike[0], limits=limits, setting=setting)
        twin = simulated(point, part, ideal(point)) if on_ideal else _from(alike, point, part)
        start, end = part.window or (0.0, float("inf"))
        work = [w for at, w in zip(twin["steps"].ends, twin["steps"].work, strict=True) if start <= at < end]
        steps = max(len(work), 1)
        came = [r for r in twin["records"] if r.request.arrival < end and r.first_token is not None]
        ttft = np.percentile([r.ttft for r in came if r.first_token < end], (50, 99))
        waiting = np.percentile([min(r.first_token, end) - r.request.arrival for r in came], (50, 99))
        print(
            f"{name:38} {rate(twin):6.2f} {sum(w.sequences for w in work) / steps:7.0f} "
            f"{sum(w.adapter_bytes for w in work) / steps / 1e9:11.1f}  {ttft[0]:8.2f} {ttft[1]:6.1f}  "
            f"{waiting[0]:11.2f} {waiting[1]:6.1f}",
            flush=True,
        )
