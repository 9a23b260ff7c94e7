"""``slora-jax bench``: measures an engine on this machine. What it measures with is in the repository's benchmarks/."""

import argparse
import importlib.util

from slora_jax.errors import SloraError


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("benchmarks") is None or importlib.util.find_spec("benchmarks.serving") is None:
        raise SloraError(
            "the benchmarks are in the repository, not in the installed package; run it in a checkout, for instance "
            "python -m slora_jax bench in the repository's root"
        )
    from benchmarks.serving.main import run as run_benchmark

    return run_benchmark(args)
