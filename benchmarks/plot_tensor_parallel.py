"""Throughput against the number of GPUs for each layout, from the results of benchmarks/tensor_parallel_all.py.

python -m benchmarks.plot_tensor_parallel                # draws docs/tensor_parallel.png
python -m benchmarks.plot_tensor_parallel --markdown     # prints the table of docs/performance.md instead
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.record import RESULTS
from benchmarks.tensor_parallel_table import layouts, part

_COLOURS = {
    "base": "black",
    "comm-free": "tab:blue",
    "s-lora": "tab:orange",
    "auto": "tab:green",
    "one-gpu": "tab:grey",
}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A panel for each model: requests/s of the burst; solid lines for the fewest adapters, dashed for the most."""
    models = list(dict.fromkeys(run["model"] for run in runs))
    figure, panels = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        own = sorted((run for run in runs if run["model"] == model), key=lambda run: run["tp"])
        names = list(dict.fromkeys(x for run in own for x in layouts(run)))
        counts = sorted({int(x.split("/n")[1]) for x in names if "/n" in x})
        for name in names:
            layout, _, count = name.partition("/n")
            points = [(run["tp"], part(run, f"served/{name}")) for run in own]
            if layout == "one-gpu":  # where the lines with adapters begin
                continue
            if count:
                points = [(run["tp"], part(run, f"served/one-gpu/n{count}")) for run in own if run["tp"] == 1] + points
            drawn = [(tp, found["requests_per_second"]) for tp, found in points if found]
            if not drawn:
                continue
            width = 3 if layout == "comm-free" else 1.2  # auto often lies on it
            style = "--" if count and int(count) == counts[-1] and len(counts) > 1 else "-"
            label = f"{layout}, {count} adapters" if count else "base only"
            panel.plot(
                *zip(*drawn, strict=True),
                style,
                color=_COLOURS[layout],
                marker="o",
                markersize=3,
                lw=width,
                label=label,
            )
        panel.set(title=model, xlabel="GPUs", ylabel="requests/s", ylim=(0, None))
        panel.set_xticks(sorted({run["tp"] for run in own}))
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def markdown(runs: list[dict[str, Any]]) -> str:
    """A row for each model, number of GPUs and layout."""
    sizes = sorted({int(n.split("/")[1]) for run in runs for n in run["parts"] if n.startswith("decode/")})
    lines = [
        "| model | GPUs | layout / adapters | "
        + " | ".join(f"step at {n}, ms (× floor)" for n in sizes)
        + " | requests/s | of base |",
        "|---" * (5 + len(sizes)) + "|",
    ]
    for run in sorted(runs, key=lambda r: (r["model"], r["tp"])):
        for name in layouts(run):
            cells = []
            for n in sizes:
                found = part(run, f"decode/{n}/{name}")
                cells.append(f"{found['seconds'] * 1e3:.2f} ({found['times_floor']:.2f})" if found else "–")
            served = part(run, f"served/{name}")
            cells.append(f"{served['requests_per_second']:.2f}" if served else "–")
            kept = served.get("seconds_of_base") if served else None
            cells.append(f"{kept:.3f}" if kept else "")
            lines.append(f"| {run['model']} | {run['tp']} | {name.replace('/n', ' / ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json",
        type=Path,
        nargs="+",
        default=[RESULTS / "tensor_parallel.json"],
        help="of later files only models on numbers of GPUs that the earlier ones do not have",
    )
    parser.add_argument("--out", type=Path, default=RESULTS.parent.parent / "docs" / "tensor_parallel.png")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for path in args.json:
        for run in json.loads(path.read_text())["runs"]:
            found.setdefault((run["model"], run["tp"]), run)
    runs = list(found.values())
    if args.markdown:
        print(markdown(runs))
    else:
        draw(runs, args.out)


if __name__ == "__main__":
    main()
