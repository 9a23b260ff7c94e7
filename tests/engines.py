"""Engines of tiny random models for tests."""

import numpy as np

from slora_jax import EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.loading import load_model
from slora_jax.memory import page_bytes

PROMPT = [5, 9, 200, 31, 7, 7, 90]


def config(name="tiny-gqa", pages=200, **kw):
    model = load_model(f"random:{name}", dtype="float32")
    options = dict(dtype="float32", max_seqs=8, max_step_tokens=64, compile_cache_dir="", max_lora_rank=32)
    options |= dict(seq_buckets=(8,), token_buckets=(64,))  # two programs to compile
    options |= dict(page_pool_bytes=pages * page_bytes(model.config, "float32")) | kw
    return model, EngineConfig(**options)


def adapters_for(model, n=4):
    rng = np.random.default_rng(0)
    tables = [rng.choice([0, 1, 8, 12, 32], (model.config.num_layers, 7)) for _ in range(n)]
    return {f"a{i}": random_adapter(model.config, t, seed=i, scale=0.5) for i, t in enumerate(tables)}


def greedy(n=8, **kw):
    return SamplingParams(max_tokens=n, ignore_eos=True, **kw)
