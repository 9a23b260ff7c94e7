"""What "auto" stands for in an engine's settings."""

import jax
import numpy as np
import pytest

from sharding import CostModel, make_mesh
from slora_jax import EngineConfig, layout_choice
from slora_jax.adapters import AdapterShape
from slora_jax.layout_choice import auto_layout, choose_parallel
from slora_jax.memory import weight_bytes
from slora_jax.parallel import make_parallel
from slora_jax.shapes import named_shape

CONFIG = named_shape("llama-70b-m")
MEASURED = CostModel(latency=19e-6, gather_latency=23e-6)
POOL = 2592 * 20971520  # as measured: benchmarks/results/tensor_parallel_served_h200x2.json
COMM_FREE, S_LORA = ("comm-free",) * 4, ("s-lora", "s-lora", "comm-free", "comm-free")


@pytest.fixture(autouse=True)
def no_memory_told(monkeypatch):
    """As on a CPU."""
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    monkeypatch.setattr(layout_choice, "device_memory", lambda: None)


def choose(adapters=100, pool_bytes=None, dtype="bfloat16"):
    return auto_layout(
        CONFIG,
        make_mesh(2),
        dtype=dtype,
        max_seqs=256,
        max_model_len=512,
        adapters=adapters,
        rank=64,
        groups=("qkv", "o"),
        pool_bytes=pool_bytes,
        model=MEASURED,
    )


def test_room_counts():
    assert choose(pool_bytes=POOL) == S_LORA
    assert choose(adapters=10, pool_bytes=POOL) == COMM_FREE
    assert choose(pool_bytes=10 * POOL) == COMM_FREE
    assert choose(pool_bytes=2 * POOL, dtype="float32") == S_LORA
    assert choose() == COMM_FREE


def test_room_is_what_the_weights_leave(monkeypatch):
    weights = weight_bytes(CONFIG, "bfloat16", make_parallel(CONFIG, 2))
    for pool, chosen in ((POOL, S_LORA), (10 * POOL, COMM_FREE)):
        memory = weights + pool + layout_choice._SPARE_BYTES
        monkeypatch.setattr(layout_choice, "device_memory", lambda memory=memory: (memory, 0))
        assert choose() == chosen


@pytest.mark.parametrize("others, chosen", [(64, S_LORA), (8, COMM_FREE)])
def test_ranks_count_by_their_mean_and_groups_where_adapters_are(monkeypatch, others, chosen):
    monkeypatch.setattr(CostModel, "measure", lambda mesh: MEASURED)
    limits = dict(page_pool_bytes=POOL, max_seqs=256, max_model_len=512)
    settings = EngineConfig(tensor_parallel=2, lora_layout="auto", dtype="bfloat16", **limits).resolved()
    shapes = []
    for rank in (64, *[others] * 9):
        ranks = np.zeros((CONFIG.num_layers, 7), np.int32)
        ranks[:, :4] = rank
        sizes = dict(in_sizes=CONFIG.geometry.in_sizes, out_sizes=CONFIG.geometry.out_sizes)
        shapes.append(AdapterShape(ranks=ranks, scaling=np.float32(ranks > 0), **sizes))
    assert choose_parallel(CONFIG, settings, 100, shapes).layout.lora == chosen
