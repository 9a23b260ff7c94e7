"""One step over 2, 4 and 8 devices gives the logits of one device, whatever divides."""

import dataclasses
import functools

import jax
from jax.sharding import AxisType
import numpy as np
import pytest
from steps import prompt_logits

from slora_jax.adapters import random_adapter
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.loading import random_params
from slora_jax.parallel import make_parallel, shard_params
from slora_jax.placement import new_state
from slora_jax.sampling_batch import build_sampling
from slora_jax.shapes import named_shape
from slora_jax.step import make_batch_step

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


def test_inside_a_mesh_of_ones_own():
    """A mesh with another axis, and batch_step as a part of a larger program."""
    need(4)
    mesh = jax.make_mesh((2, 2), ("data", "tp"), (AxisType.Auto,) * 2)
    config, params, wanted = one_device("divides")
    parallel = make_parallel(config, mesh, "s-lora")
    sharded = shard_params(config, params, parallel)
    found = prompt_logits(config, sharded, prompts_for(config), loop="scan", parallel=parallel)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-4, rtol=0)

    prompt = np.array(prompts_for(config)[0][0], np.int32)
    n = len(prompt)
    builder = BatchBuilder(config.geometry, Buckets(seqs=(1,), tokens=(n,)), 4, 16, parallel.layout)
    batch = dataclasses.replace(
        builder.padding(1, n, decode_only=False, use_adapters=False),
        tokens=prompt,
        positions=np.arange(n, dtype=np.int32),
        page_ids=np.zeros(n, np.int32),
        slots=np.arange(n, dtype=np.int32),
        q_start=np.array([0, n], np.int32),
        kv_lens=np.array([n], np.int32),
        logit_rows=np.array([n - 1], np.int32),
        sampling=build_sampling([], 1),
    )
    step = make_batch_step(config, dtype=np.float32, loop="scan", parallel=parallel)

    @jax.jit
    def mine(params, state, batch):
        state, output = step(params, state, batch)
        return state, jax.nn.one_hot(output.tokens, config.vocab_size)

    _, chosen = mine(sharded, new_state(config, 4, np.float32, parallel), batch)
    assert int(chosen.argmax()) == int(wanted[0][-1].argmax())
