"""One step over 2, 4 and 8 devices gives the logits of one device, whatever divides."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from steps import prompt_logits

from slora_jax.adapters import random_adapter
from slora_jax.loading import random_params
from slora_jax.parallel import make_parallel, shard_params
from slora_jax.shapes import named_shape

LAYOUTS = ["s-lora", "comm-free"]
MIXED = ("s-lora", "comm-free", "comm-free", "s-lora")

SHAPES = {
    "divides": dataclasses.replace(named_shape("tiny-llama"), num_heads=8, num_kv_heads=8),
    # fewer kv heads than devices, and more query heads
    "gqa": dataclasses.replace(named_shape("tiny-gqa"), num_heads=16, num_kv_heads=2, num_layers=2),
    # nothing divides: heads, kv heads, MLP, vocabulary and hidden state
    "odd": dataclasses.replace(
        named_shape("tiny-qwen2"),
        num_heads=9,
        num_kv_heads=3,
        mlp_size=100,
        vocab_size=251,
        hidden_size=60,
        tied_embeddings=True,
        qk_norm=True,
    ),
}


def adapters_for(config):
    """Ranks that divide; that do not, and differ by layer and module, with modules left out; rank 1; the largest."""
    mixed = np.random.default_rng(1).choice([0, 3, 8, 12, 24, 64], (config.num_layers, 7))
    return [
        random_adapter(config, 64, seed=0),
        random_adapter(config, mixed, seed=1),
        random_adapter(config, 1, seed=2),
        random_adapter(config, 16, ("q", "v"), seed=3),
    ]


def prompts_for(config):
    rng = np.random.default_rng(0)
    first, mixed, small, attention = adapters_for(config)
    adapters = [None, first, mixed, mixed, None, small, attention]
    return [
        (rng.integers(0, config.vocab_size, n).tolist(), a)
        for n, a in zip((5, 18, 9, 3, 4, 2, 7), adapters, strict=True)
    ]


def need(devices):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")


@functools.cache
def one_device(shape):
    config = SHAPES[shape]
    params = random_params(config, dtype="float32")
    return config, params, prompt_logits(config, params, prompts_for(config), loop="scan")


CASES = [(shape, devices, lora) for shape in ("gqa", "odd") for devices in (2, 4, 8) for lora in LAYOUTS]
CASES += [("divides", 4, "s-lora"), ("divides", 4, "comm-free"), ("odd", 4, MIXED)]


@pytest.mark.parametrize(("shape", "devices", "lora"), CASES)
def test_logits_are_those_of_one_device(shape, devices, lora):
    need(devices)
    config, params, wanted = one_device(shape)
    parallel = make_parallel(config, devices, lora)
    sharded = shard_params(config, params, parallel)
    found = prompt_logits(config, sharded, prompts_for(config), loop="scan", parallel=parallel)
    for (_, adapter), one, many in zip(prompts_for(config), wanted, found, strict=True):
        np.testing.assert_allclose(many, one, atol=1e-4, rtol=0, err_msg=repr(adapter))
