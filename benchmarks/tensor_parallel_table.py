"""Results of benchmarks/tensor_parallel.py put together, and a short table of them. No jax."""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

Parts = dict[str, Any]


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """One result of several files, each of a model on a number of GPUs."""
    return dict(runs=[json.loads(path.read_text()) for path in paths])


def part(run: dict[str, Any], name: str) -> Parts | None:
    """A part that was measured, also where it is that of another layout; None if it was not, or failed."""
    found = run["parts"].get(name)
    if found and "same_as" in found:
        kind, *rest = name.split("/")
        head = [kind, rest[0]] if kind == "decode" else [kind]
        return part(run, "/".join([*head, found["same_as"], rest[-1]]))
    return None if found is None or "error" in found else found


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A line for each layout: decode step in ms (times its floor; of base only's throughput), requests/s (of base)."""
    lines = []
    for run in sorted(runs, key=lambda r: (r["model"], -r["tp"])):
        ceilings = run["parts"].get("ceilings", {})
        reduces = {k: f"{v * 1e6:.0f}" for k, v in ceilings.get("all_reduce_seconds", {}).items()}
        lines.append(
            f"\n{run['model']} on {run['tp']} {run['device_kind']}: copy "
            f"{ceilings.get('copy_bytes_per_second', 0) / 1e12:.2f} TB/s, all-reduce us {reduces}, "
            f"{ceilings.get('num_pages', 0)} pages"
        )
        for layout in layouts(run):
            lines.append(f"  {layout:16}" + " | ".join(_cells(run, layout)))
        errors = {name: p["error"][:90] for name, p in run["parts"].items() if "error" in p}
        lines += [f"  {name}: {error}" for name, error in errors.items()]
    return "\n".join(lines)


def layouts(run: dict[str, Any]) -> list[str]:
    """ "base", then layout/n of every one that was tried, in the order of the run."""
    tried = [n.split("/", 2)[-1] if n.startswith("decode") else n.split("/", 1)[-1] for n in run["parts"]]
    return list(dict.fromkeys(x for x in tried if x != "ceilings"))


def _cells(run: dict[str, Any], layout: str) -> list[str]:
    cells = []
    sizes = sorted({int(n.split("/")[1]) for n in run["parts"] if n.startswith("decode/")})
    for seqs in sizes:
        if found := part(run, f"decode/{seqs}/{layout}"):
            kept = f" {found['seconds_of_base']:.3f}" if "seconds_of_base" in found else ""
            cells.append(f"{seqs}: {found['seconds'] * 1e3:.2f} ms x{found['times_floor']:.2f}{kept}")
        else:
            cells.append(f"{seqs}: -")
    if found := part(run, f"served/{layout}"):
        kept = f" {found['seconds_of_base']:.3f}" if "seconds_of_base" in found else ""
        kept += "" if found["finished"] else " (unfinished)"
        cells.append(f"{found['requests_per_second']:.2f} req/s{kept}")
    return cells
