"""Where the time of the results of ``python -m benchmarks.serving.paper`` went: steps by size, beside their floor."""

import json
from pathlib import Path

import numpy as np

from benchmarks.serving.paper_parts import PARTS
from benchmarks.serving.paper_report import ideal
from slora_jax.twin import StepLog

_SLOW = 3.0  # times the median of its size: a step in which something else happened


def show_steps(path: Path) -> None:
    """A line for each size of steps: how many, ms each and together, what they held on average, and the ideal device's
    ms for the same. Of a load only the window counts. Then the steps that took three times their size's median.
    """
    for name, point in json.loads(path.read_text())["parts"].items():
        if "steps" not in point:
            continue
        log, cost, window = StepLog.from_json(point["steps"]), ideal(point), PARTS[name].window
        inside = [i for i, end in enumerate(log.ends) if window is None or window[0] <= end <= window[1]]
        sizes: dict[tuple[str, int], list[int]] = {}
        for i in inside:
            work = log.work[i]
            sizes.setdefault(("prompt" if work.prompt_tokens else "decode", work.padded_tokens), []).append(i)
        print(f"\n{name}: {len(inside)} steps, {sum(log.seconds[i] for i in inside):.2f} s")
        print(
            f"  {'':6} {'size':>5} {'steps':>5} {'ms':>6} {'median':>6} {'ideal':>6} {'s':>6}   "
            f"{'decode':>6} {'prompt':>6} {'adapters GB':>11}"
        )
        slow = []
        for (kind, size), found in sorted(sizes.items()):
            ms = np.array([log.seconds[i] for i in found]) * 1e3
            held = [
                (w.decode_tokens, w.prompt_tokens, w.adapter_bytes / 1e9, cost.seconds(w) * 1e3)
                for w in (log.work[i] for i in found)
            ]
            decode, prompt, adapters, best = np.mean(held, axis=0)
            slow += [(log.ends[i], t) for i, t in zip(found, ms, strict=True) if t > _SLOW * np.median(ms)]
            print(
                f"  {kind:6} {size:5d} {len(found):5d} {ms.mean():6.2f} {np.median(ms):6.2f} {best:6.2f} "
                f"{ms.sum() / 1e3:6.2f}   {decode:6.0f} {prompt:6.0f} {adapters:11.2f}"
            )
        print("  slow: " + (", ".join(f"{ms:.0f} ms at {end:.1f} s" for end, ms in sorted(slow)) or "none"))
