"""What ptxas says of kernels, as benchmarks.kernels.resources reads it."""

import importlib.util

import pytest

from benchmarks.kernels import resources

COMPILED = """
ptxas info    : Compiling entry function 'lora_matmul_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for lora_matmul_mosaic_gpu_kernel
    296 bytes stack frame, 568 bytes spill stores, 620 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 296 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compile time = 441.822 ms
"""
SERIALIZED = """
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the function 'lora_matmul_mosaic_gpu_kernel'
"""


@pytest.mark.parametrize("before, serialized", [("", False), (SERIALIZED, True)])
def test_messages_of_ptxas(before, serialized):
    wanted = resources.Resources(kernel="lora_matmul", registers=168, spilled=568, serialized=serialized)
    assert resources.parse(before + COMPILED) == wanted


def test_a_kernel_that_was_not_compiled_is_not_passed_over():
    with pytest.raises(ValueError, match="ptxas too old"):
        resources.parse("ptxas too old. Falling back to the driver to compile.")


def test_without_the_plugin_it_says_where_it_is(monkeypatch):
    monkeypatch.setattr("sys.argv", ["resources"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="jax-cuda13-pjrt"):
        resources.main()
