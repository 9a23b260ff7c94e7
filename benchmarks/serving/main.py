"""Runs ``slora-jax bench``: the points of a workload, the systems to compare with, tables, JSON and plots."""

import argparse
from collections.abc import Mapping
import json
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.record import environment
from benchmarks.serving.session import floor_figures
from benchmarks.serving.systems import measure_system
from benchmarks.serving.workloads.sweep import points
from slora_jax import SloraError
from slora_jax.cli.workload import check_limits, check_options, choose_setting, figures_table, line

_TWIN_POOL = 100 << 30


def run(args: argparse.Namespace) -> int:
    check_options(args)
    if args.slots < 1:
        raise SloraError(f"slots must be at least 1, not {args.slots}")
    _check_outputs(args)
    if args.twin:
        return _twin(args)
    if args.compare:
        result = _compare(args)
    else:
        result = dict(environment=environment()) | measure_system(args)
        if args.json != "-":
            for point in result["points"]:
                print("\n".join(_table(point)), flush=True)
    _save(args, result)
    if args.json == "-":
        print(_text(result))
    if args.plots:
        from benchmarks.serving.plots import draw_all

        for path in draw_all(result, Path(args.plots)):
            print(f"drawn: {path}")
    return 0


def _twin(args: argparse.Namespace) -> int:
    if args.workload != "trace":
        raise SloraError(f"--twin goes with the workload trace only, not {args.workload}")
    limits: dict[str, Any] = dict(
        max_seqs=args.max_seqs or 256,
        max_step_tokens=args.max_step_tokens or 2048,
        page_pool_bytes=args.page_pool or _TWIN_POOL,
    )
    check_limits(limits["max_seqs"], limits["max_step_tokens"])
    setting = choose_setting(args)
    result = dict(points=[dict(w, floor=floor_figures(args, setting, t, **limits)) for w, t in points(args)])
    if args.json == "-":
        print(_text(result))
        return 0
    _save(args, result)
    for point in result["points"]:
        floor = point["floor"]
        name = " ".join(f"{k}={point[k]}" for k in ("n", "alpha", "cv", "rate"))
        ttft = floor["ttft"]["p99"]
        print(line(name, f"floor {floor['requests_per_second']:.2f} requests/s, first token p99 {ttft:.3f} s"))
    return 0


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measures a system and the others, each in a process of its own: GPU memory that JAX holds is given back only at
    its end, so this process must not touch the GPU at all.
    """
    result = _other_process(args, args.system)
    if "error" in result:
        raise SloraError(f"{args.system} was not measured: {result['error']}")
    _save(args, result)  # before anything else can fail
    result["compared"] = {}
    for name in args.compare:
        other = result["compared"][name] = _other_process(args, name)
        for point in other.get("points", ()):
            for field in ("steps", "requests", "pages", "page_map"):
                point.pop(field, None)
        _save(args, result)
    if args.json != "-":
        print("\n".join(_comparison(args.system, result)))
    return result


def _other_process(args: argparse.Namespace, system: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        argv = _without(args.argv, ("--compare", "--json", "--plots", "--system"))
        command = [sys.executable, "-m", "slora_jax", *argv, "--system", system, "--json", str(out)]
        print(f"--- {system}", file=sys.stderr, flush=True)
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL if args.json == "-" else None)
        if done.returncode or not out.exists():
            return dict(error=f"exit status {done.returncode}")
        return json.loads(out.read_text())


def _without(argv: list[str], options: tuple[str, ...]) -> list[str]:
    """A command line without these options and their values."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept


def _check_outputs(args: argparse.Namespace) -> None:
    """A result that cannot be kept is told before minutes are spent on it."""
    for path in (args.json if args.json not in (None, "-") else None, args.plots):
        if path and not Path(path).resolve().parent.is_dir():
            raise SloraError(f"{path} cannot be written: its directory does not exist")
    if args.plots:
        from benchmarks.serving.plots import require_matplotlib

        require_matplotlib()


def _text(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=1)


def _save(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    if args.json and args.json != "-":
        Path(args.json).write_text(_text(result) + "\n")


def _name(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in point.items() if isinstance(value, int | float | str))


def _table(point: Mapping[str, Any]) -> list[str]:
    head = ["", f"== {_name(_named(point))}"]
    if "figures" not in point:
        return [*head, *(line(str(k), json.dumps(v)) for k, v in point.items() if k not in _named(point))]
    figures = point["figures"] | dict(counters=point["counters"])
    if "floor" in point:
        figures["floor_requests_per_second"] = point["floor"]["requests_per_second"]
    steps = point["step_times"]
    parts = [f"{steps[k]['steps']} {k} {steps[k]['seconds']:.2f} s" for k in ("decode", "prompt", "loading")]
    lines = [*head, *figures_table(figures, point["pages"])]
    lines.append(line("steps", f"{', '.join(parts)}; between steps {steps['idle_seconds']:.2f} s"))
    rates = point["counters"]
    lines.append(
        line(
            "hits",
            f"prefixes {rates['prefix_hit_rate']:.1%} of prompt tokens, adapters {rates['adapter_hit_rate']:.1%} of "
            f"requests; {point['most_running']} running at most",
        )
    )
    return lines + [line(k, json.dumps(v)) for k, v in point.get("more", {}).items()]


def _named(point: Mapping[str, Any]) -> dict[str, Any]:
    inner = ("compiles", "of_floor", "most_running")
    return {k: v for k, v in point.items() if isinstance(v, int | float | str) and k not in inner}


def _comparison(system: str, result: Mapping[str, Any]) -> list[str]:
    lines = ["", "== compared, same trace, same machine"]
    for name, other in {system: result, **result["compared"]}.items():
        if "error" in other:
            lines.append(line(name, f"failed: {other['error']}"))
            continue
        for mine, point in zip(result["points"], other["points"], strict=True):
            if "figures" not in point:
                continue
            here, there = mine["figures"]["requests_per_second"], point["figures"]["requests_per_second"]
            ttft = point["figures"]["ttft"]
            lines.append(
                line(
                    name,
                    f"{there:8.2f} requests/s ({there / here:.2f} of {system}), "
                    f"first token p50 {ttft['p50'] if ttft else float('nan'):.2f} s; {_name(_named(point))}",
                )
            )
    return lines
