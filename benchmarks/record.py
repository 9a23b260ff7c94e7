"""Writes a benchmark's result as JSON with what made it: command, commit, versions, hardware."""

from collections.abc import Mapping
import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def _commit() -> str | None:
    """The commit that is measured; SLORA_COMMIT where the code was copied without its history."""
    if "SLORA_COMMIT" in os.environ:
        return os.environ["SLORA_COMMIT"]
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or None


def environment() -> dict[str, Any]:
    devices = jax.devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return dict(
        command=" ".join(["python", *sys.orig_argv[1:]]),
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        python=sys.version.split()[0],
        versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        devices=[d.device_kind for d in devices],
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        device_memory_bytes=memory,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes `result` beside the environment that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(environment=environment(), **result), indent=1) + "\n")
