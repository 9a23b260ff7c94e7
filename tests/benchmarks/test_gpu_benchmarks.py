"""Benchmarks of kernels and steps say at once that they need a GPU, instead of filling a CPU's memory."""

import importlib
import sys

import jax
import pytest

NAMES = [
    "decode_step",
    "kernels.bench_attention",
    "kernels.bench_fused",
    "kernels.bench_lora",
    "kernels.bench_write_adapter",
]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is one")
@pytest.mark.parametrize(("name", "more"), [*((name, []) for name in NAMES), ("kernels.bench_attention", ["--tune"])])
def test_without_a_gpu_they_say_so(monkeypatch, name, more):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *more])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU; JAX finds only cpu"):
        benchmark.main()
