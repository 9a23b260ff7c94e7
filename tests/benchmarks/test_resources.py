"""What ptxas says of kernels, as benchmarks.kernels.resources reads it."""

import importlib.util

import pytest

from benchmarks.kernels import resources

LOG = """
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the function 'lora_matmul_mosaic_gpu_kernel'
ptxas warning : Registers are spilled to local memory in function 'lora_matmul_mosaic_gpu_kernel', 568 bytes spill \
stores, 620 bytes spill loads
ptxas info    : Compiling entry function 'lora_matmul_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for lora_matmul_mosaic_gpu_kernel
    296 bytes stack frame, 568 bytes spill stores, 620 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 296 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compile time = 441.822 ms
ptxas info    : Compiling entry function 'silu_mul_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers
ptxas info    : Compile time = 9.1 ms
"""


def test_messages_of_ptxas():
    assert resources.parse(LOG) == [
        dict(kernel="lora_matmul", registers=168, spilled=568, serialized=1),
        dict(kernel="silu_mul", registers=30, spilled=0, serialized=0),
    ]


def test_without_the_plugin_it_says_where_it_is(monkeypatch):
    monkeypatch.setattr("sys.argv", ["resources"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="jax-cuda13-pjrt"):
        resources.main()
