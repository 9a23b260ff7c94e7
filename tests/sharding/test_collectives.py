"""The collectives of a layer, read from the compiled program: their number and their bytes."""

import dataclasses
import math
import re

import jax
from jax import numpy as jnp
import pytest

from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.loading import random_params
from slora_jax.parallel import make_parallel, param_shards
from slora_jax.placement import new_state
from slora_jax.shapes import named_shape
from slora_jax.step import make_forward

TOKENS, RANK = 8, 32  # a multiple of eight: the model pads others
_COLLECTIVE = re.compile(
    r"= \(?f32\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("
)


def collectives(config, devices, lora, use_adapters=True):
    """(kind, number of elements of the result) of every collective in a decode step's compiled program."""
    parallel = make_parallel(config, devices, lora)
    builder = BatchBuilder(config.geometry, Buckets(seqs=(TOKENS,), tokens=(TOKENS,)), 8, 64, parallel.layout)
    batch = builder.padding(TOKENS, TOKENS, decode_only=True, use_adapters=use_adapters)
    shards = param_shards(config, parallel)
    params = jax.eval_shape(lambda: random_params(config, dtype="float32", shardings=shards))
    state = jax.eval_shape(lambda: new_state(config, 8, jnp.float32, parallel))
    forward = make_forward(config, dtype=jnp.float32, max_rank=RANK, parallel=parallel)
    text = jax.jit(forward).lower(params, state, batch).compile().as_text()
    found = [(kind, math.prod(int(n) for n in shape.split(","))) for shape, kind in _COLLECTIVE.findall(text)]
    assert len(found) == len(re.findall(r" (?:all-|collective-|reduce-scatter)[\w-]*\(", text)), (
        "some were not understood"
    )
    return sorted(found)


def per_layer(lora, devices, **kw):
    """What one more layer adds."""
    one = dataclasses.replace(named_shape("tiny-llama"), num_heads=8, num_kv_heads=8, num_layers=1)
    two = dataclasses.replace(one, num_layers=2)
    more = collectives(two, devices, lora, **kw)
    for entry in collectives(one, devices, lora, **kw):
        more.remove(entry)
    return more


def sent(entries, devices):
    """Elements that a device sends: a ring's all-gather passes on (N-1)/N of the result, its all-reduce twice that."""
    return sum(size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1) for kind, size in entries)


@pytest.mark.parametrize("devices", [4])
def test_the_communication_free_layout_adds_nothing(devices):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    base = [("all-reduce", TOKENS * 64)] * 2  # Megatron's two
    assert per_layer("comm-free", devices, use_adapters=False) == base
    assert per_layer("comm-free", devices) == base


@pytest.mark.parametrize("devices", [2, 4])
def test_s_lora_sends_what_the_paper_says(devices):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    extra = per_layer("s-lora", devices)
    for entry in [("all-reduce", TOKENS * 64)] * 2:
        extra.remove(entry)
    assert extra == [
        ("all-gather", TOKENS * 2 * RANK),  # gate, up
        ("all-gather", TOKENS * 3 * RANK),  # q, k, v
        ("all-reduce", TOKENS * RANK),  # o
        ("all-reduce", TOKENS * RANK),  # down
    ]
    attention = [extra[1], extra[2]]
    assert sent(attention, devices) == 5 * (devices - 1) * TOKENS * RANK / devices
