"""Draws measured kernels under the roofline of the machine that ran them.

    pip install matplotlib && python -m benchmarks.plot_roofline

Reads what bench_attention and bench_lora wrote to benchmarks/results/ and writes docs/roofline.png. A point's height is
the rate it reached, its place on the x axis the operations it does for a byte it must move.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from pallas_kernels.geometry import GROUPS
from pallas_kernels.lora.arg_specs import SPECS
from pallas_kernels.paged_attention.arg_specs import DECODE, PREFILL


def attention_points(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(label, operations per byte, operations/s) of every shape."""
    points = []
    for row in result["results"]:
        shape = (DECODE if row["op"] == "decode" else PREFILL)[row["shape"]]
        points.append((f"{row['op']} {row['shape']}", shape.flops / shape.bytes, shape.flops / (row["us"] * 1e-6)))
    return points


def lora_points(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """The same of shrink and expand together, of every group of projections."""
    points = []
    for row in result["results"]:
        if row["op"] != "pair":
            continue
        spec, g = SPECS[row["shape"]], SPECS[row["shape"]].geometry
        flops = 0
        for segment, tokens in enumerate(spec.segments):
            ranks = 8 * spec.granules()[segment % len(spec.ranks), 0]
            for m in GROUPS[row["group"]]:
                flops += 2 * tokens * int(ranks[m]) * (g.in_sizes[m] + g.out_sizes[m])
        points.append((f"LoRA {row['shape']} {row['group']}", flops / row["bytes"], flops / (row["us"] * 1e-6)))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with attention.json and lora.json")
    parser.add_argument("--out", type=Path, default=RESULTS.parents[1] / "docs" / "roofline.png")
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    attention = json.loads((args.results / "attention.json").read_text())
    lora = json.loads((args.results / "lora.json").read_text())
    copy, gemm = attention["ceilings"]["copy"], attention["ceilings"]["gemm"]
    points = attention_points(attention)
    kinds = {
        "decode attention": ("o", [p for p in points if p[0].startswith("decode")]),
        "prefill attention": ("s", [p for p in points if p[0].startswith("prefill")]),
        "LoRA, shrink and expand": ("^", lora_points(lora)),
    }
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensity = [10**e for e in (-1, *(x / 10 for x in range(-9, 41)))]
    axes.plot(intensity, [min(copy * x, gemm) / 1e12 for x in intensity], color="black", label="measured ceilings")
    for label, (marker, places) in kinds.items():
        axes.scatter([p[1] for p in places], [p[2] / 1e12 for p in places], marker=marker, s=24, label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s")
    device = attention["environment"]["devices"][0]
    axes.set_title(f"{device}: copy {copy / 1e12:.2f} TB/s, bf16 GEMM {gemm / 1e12:.0f} TFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
