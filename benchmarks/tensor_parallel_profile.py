"""What XLA made of the collectives of a compiled step, and where a step's time goes on each kernel."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
import re
import tempfile
from typing import Any

import jax

_COLLECTIVE = re.compile(
    r"= (.*?) ((?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?)\("
)
_BACKEND = re.compile(r"backend_config=(\{.*\})")
_KINDS = {  # the first that a kernel's name matches
    "collectives": r"(?i)nccl|all[-_]?(reduce|gather)",
    "LoRA": r"lora_",
    "attention": r"anonymous_mosaic|attention",  # attention's kernels have no name of their own
    "matrix products": r"(?i)nvjet|gemm|gemv|cutlass|splitk|cublas",
    "norms, rotation, SiLU": r"add_rms_norm|rope_write_kv|silu_mul|write_kv",
    "copies": r"(?i)memcpy|copy",
}


def collectives(compiled: Any) -> list[dict[str, Any]]:
    """Every kind of collective in a compiled program: operation, result, how often, and XLA's configuration of it."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for line in compiled.as_text().splitlines():
        if found := _COLLECTIVE.search(line):
            result = re.sub(r"\{[^}]*\}", "", found[1]).strip()
            backend = _BACKEND.search(line)
            counts[found[2], result, backend[1] if backend else ""] += 1
    return [dict(operation=o, result=r, count=n, backend_config=b) for (o, r, b), n in counts.most_common()]


def profile(call: Callable[[], Any], calls: int = 3, top: int = 20) -> dict[str, Any]:
    """A step on the first GPU: milliseconds from its first kernel to its last, in which some kernel ran, and of each
    kind and kernel. {} where no GPU was traced. XLA launches no command buffers while it is traced, so there are more
    gaps than without; times of kernels are the same.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(calls):
                out = call()
            jax.block_until_ready(out)
        files = sorted(Path(directory).rglob("*.xplane.pb"))
        planes = [p for f in files for p in jax.profiler.ProfileData.from_file(str(f)).planes]
        events = [
            (event.start_ns, event.duration_ns, event.name)
            for plane in planes
            if plane.name == "/device:GPU:0"
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return summary(sorted(events), calls, top)


def summary(events: list[tuple[float, float, str]], calls: int, top: int) -> dict[str, Any]:
    """Of (start, duration, name) in ns, sorted by start."""
    if not events:
        return {}
    totals: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    busy, until = 0.0, events[0][0]
    for start, length, name in events:
        totals[name] += length  # type: ignore[assignment]
        launches[name] += 1
        kinds[next((k for k, pattern in _KINDS.items() if re.search(pattern, name)), "other")] += length  # type: ignore[assignment]
        busy += max(0.0, start + length - max(start, until))
        until = max(until, start + length)
    scale = calls * 1e6
    return dict(
        span_ms=(until - events[0][0]) / scale,
        busy_ms=busy / scale,
        kinds_ms={kind: ns / scale for kind, ns in kinds.most_common()},
        kernels=[
            dict(kernel=name[:120], milliseconds=ns / scale, launches=launches[name] / calls)
            for name, ns in totals.most_common(top)
        ],
    )
