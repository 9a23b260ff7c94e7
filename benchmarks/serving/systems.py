"""The systems that can be measured, by name: ours, ours with parts switched off or replaced, and others."""

import argparse
import functools
import importlib
from typing import Any

from benchmarks.serving.session import Session
from slora_jax import SloraError
from slora_jax.cli.workload import choose_setting

_BASELINES = {
    "no-adapters": "no_adapters",
    "merged": "merged",
    "fixed-slots": "fixed_slots",
    "ragged-dot": "ragged_dot",
    "one-hot": "one_hot",
    "peft": "peft",
}
_WORKLOADS = dict(
    trace="sweep", overhead="overhead", churn="churn", noisy="noisy", prefixes="prefixes", replace="replace"
)


def measure_system(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the options say: the system, what its points have in common, and the points."""
    setting = choose_setting(args)
    workload = importlib.import_module(f"benchmarks.serving.workloads.{_WORKLOADS[args.workload]}")
    open_session = functools.partial(Session, args, setting)
    note = ""
    if args.system != "slora-jax":
        if args.workload != "trace":
            raise SloraError(f"system {args.system} is measured under the workload trace only, not {args.workload}")
        baseline = importlib.import_module(f"benchmarks.serving.baselines.{_BASELINES[args.system]}")
        note = " ".join((baseline.__doc__ or "").split())
        if hasattr(baseline, "measure"):
            return dict(system=args.system, note=note, points=list(baseline.measure(args, setting)))
        open_session = baseline.open_session(args, setting)
    measured = list(workload.measure(args, open_session))
    common = ("setting", "weights", "adapters", "engine")
    return dict(
        system=args.system,
        note=note,
        **{name: measured[0][name] for name in common},
        points=[{k: v for k, v in point.items() if k not in common} for point in measured],
    )
