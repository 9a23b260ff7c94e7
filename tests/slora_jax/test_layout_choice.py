"""What "auto" stands for in an engine's settings."""

import jax
import pytest

from sharding import CostModel, make_mesh
from slora_jax.layout_choice import auto_layout
from slora_jax.shapes import named_shape


@pytest.mark.parametrize(
    "adapters, pool_bytes, chosen",
    [
        (100, 2592 * 20971520, "s-lora"),  # as measured: benchmarks/results/tensor_parallel_served_h200x2.json
        (10, 2592 * 20971520, "comm-free"),
        (100, 500 << 30, "comm-free"),
        (100, None, "comm-free"),  # a CPU does not tell its memory
    ],
)
def test_room_counts(adapters, pool_bytes, chosen):
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    lora = auto_layout(
        named_shape("llama-70b-m"),
        make_mesh(2),
        dtype="bfloat16",
        max_seqs=256,
        max_model_len=512,
        adapters=adapters,
        rank=64,
        groups=("qkv", "o"),
        pool_bytes=pool_bytes,
        model=CostModel(latency=19e-6, gather_latency=23e-6),
    )
    assert lora == (chosen, chosen, "comm-free", "comm-free")
