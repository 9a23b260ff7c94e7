"""Four adapters of tiny-gqa, and engines with room for some of them, for tests of adapters in tiers."""

import time

from slora_jax import EngineConfig, Request, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.loading import load_model
from slora_jax.memory import page_bytes

PROMPT = [5, 9, 200, 31, 7, 7, 90]
GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)
MODEL = load_model("random:tiny-gqa", dtype="float32")
RANKS = (4, 8, 12, 32)
ADAPTERS = [random_adapter(MODEL.config, rank, seed=i, scale=0.5) for i, rank in enumerate(RANKS)]
PAGES = [a.num_pages(MODEL.config.geometry) for a in ADAPTERS]
PAGE = page_bytes(MODEL.config, "float32")


def config(pages=200, **options):
    options = dict(max_seqs=8, seq_buckets=(8,), token_buckets=(64,), max_step_tokens=64, max_lora_rank=32) | options
    return EngineConfig(dtype="float32", compile_cache_dir="", page_pool_bytes=pages * PAGE, **options)


def ask(name, prompt=PROMPT, params=GREEDY):
    return Request(None, name, params, prompt)


def settle(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
