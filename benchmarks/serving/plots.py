"""Plots of a result: throughput against n, latency against rate, the page pool over time. matplotlib is the extra
``bench``.
"""

from collections.abc import Iterator, Mapping, Sequence
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from slora_jax import SloraError

_COLORS = dict(kv="#1f77b4", idle_kv="#aec7e8", adapter="#d62728", idle_adapter="#ff9896", free="#eeeeee")


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SloraError('matplotlib is not installed; plots need: pip install "slora-jax[bench]"')


def draw_all(result: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Draws what the result's points allow, and yields the files."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    points = [p for p in result["points"] if "figures" in p]
    hardware = ", ".join(sorted(set(result.get("environment", {}).get("devices", []))))
    title = f"{result['setting']['shape']}, ranks {', '.join(map(str, result['setting']['ranks']))}; {hardware}"
    for key, label in (("n", "adapters n"), ("rate", "requests/s offered")):
        if len({p.get(key) for p in points}) > 1:
            yield _throughput(points, key, label, title, folder / f"throughput-{key}.png")
            yield _latency(points, key, label, title, folder / f"latency-{key}.png")
    for i, point in enumerate(points):
        if point.get("pages"):
            yield _pages(point, title, folder / f"pages-{i}.png")


def _new(title: str, rows: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.2 + 2.2 * rows), layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]


def _sorted(points: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return sorted(points, key=lambda p: p[key])


def _throughput(points, key: str, label: str, title: str, path: Path) -> Path:
    figure, (axes,) = _new(title)
    points = _sorted(points, key)
    x = [p[key] for p in points]
    for name, get in (
        ("measured", lambda p: p["figures"]["requests_per_second"]),
        ("measured, steady state", lambda p: p["figures"]["steady_requests_per_second"]),
        ("floor", lambda p: p.get("floor", {}).get("requests_per_second", np.nan)),
    ):
        axes.plot(x, [get(p) for p in points], marker="o", linestyle="--" if name == "floor" else "-", label=name)
    axes.set(xlabel=label, ylabel="requests/s", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _latency(points, key: str, label: str, title: str, path: Path) -> Path:
    figure, axes = _new(title, 2)
    points = [p for p in _sorted(points, key) if p["figures"]["latency"]]
    x = [p[key] for p in points]
    for axis, name in zip(axes, ("ttft", "latency"), strict=True):
        for percentile in ("p50", "p90", "p99"):
            axis.plot(x, [p["figures"][name][percentile] for p in points], marker="o", label=percentile)
        axis.set(xlabel=label, ylabel=f"{'first token' if name == 'ttft' else 'whole answer'} s", ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=120)
    return path


def _pages(point: Mapping[str, Any], title: str, path: Path) -> Path:
    figure, (shares, axes) = _new(title, 2)
    rows = point["pages"]
    x = [row["seconds"] for row in rows]
    shares.stackplot(x, *([r[k] for r in rows] for k in _COLORS), labels=_COLORS, colors=_COLORS.values(), step="post")
    shares.set(ylabel="pages", xlim=(0, max(x)))
    shares.legend(fontsize=7, loc="upper right")
    maps = [row.split(" ") for row in point["page_map"]]
    image = np.array([[".ka".index(c) for c in text] for _, text in maps]).T
    from matplotlib.colors import ListedColormap

    colors = ListedColormap([_COLORS["free"], _COLORS["kv"], _COLORS["adapter"]])
    axes.imshow(image, aspect="auto", interpolation="nearest", cmap=colors, vmin=0, vmax=2, extent=(0, max(x), 1, 0))
    axes.set(xlabel="seconds", ylabel="page id, share of the pool")
    figure.savefig(path, dpi=120)
    return path
