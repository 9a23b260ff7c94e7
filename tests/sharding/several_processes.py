"""What tests/sharding/test_processes.py runs in every process: an engine of two devices, asked by process 0 only."""

import json
from pathlib import Path
import sys
import time

import jax
import numpy as np

from slora_jax import Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.loading import load_config

SHAPE = "random:tiny-gqa"


def settings(devices: int) -> EngineConfig:
    return EngineConfig(
        dtype="float32",
        max_seqs=4,
        max_step_tokens=16,
        seq_buckets=(4,),
        token_buckets=(16,),
        max_lora_rank=16,
        lora_layout="s-lora",
        tensor_parallel=devices,
        page_pool_bytes=1 << 20,
    )


def answers(engine: Engine) -> list[list[int]]:
    """Base model and two adapters, one of which is registered only now; greedy and drawn; then a second round."""
    config = load_config(SHAPE)
    engine.add_adapter("late", random_adapter(config, 16, seed=2, scale=0.5))
    params = [
        SamplingParams(max_tokens=6, ignore_eos=True),
        SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.9, top_k=9, seed=3, logprobs=2),
    ]
    prompts = [np.random.default_rng(i).integers(0, 256, 3 + 7 * i).tolist() for i in range(4)]
    names = (None, "a", "late", "a")
    asked = [Request(None, name, params[i % 2], p) for i, (name, p) in enumerate(zip(names, prompts, strict=True))]
    return [output.token_ids for _ in range(2) for output in engine.generate(asked)]


def make_engine(model: str, devices: int) -> Engine:
    adapters = {"a": random_adapter(load_config(SHAPE), 12, seed=1, scale=0.5)}
    return Engine.from_pretrained(model, settings(devices), adapters)


def main(out: str, model: str, mode: str) -> None:
    with make_engine(model, jax.device_count()) as engine:
        assert jax.process_index() == 0, "the others never come here"
        tokens = answers(engine)
        Path(out).write_text(json.dumps(tokens))
        while mode == "wait":  # until this process or the other one is killed
            answers(engine)
            time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
