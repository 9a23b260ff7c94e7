"""The compiled step: what it costs in memory, and that nothing but shapes compiles it anew."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from slora_jax.batch import State
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets, powers_of_two
from slora_jax.loading import random_params
from slora_jax.shapes import named_shape
from slora_jax.step import make_batch_step, make_forward


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_the_pool_is_donated_and_never_copied(loop):
    config = named_shape("tiny-gqa")
    num_pages = 20_000
    builder = BatchBuilder(config.geometry, Buckets.default(8, 64), num_pages, 512)
    batch = builder.padding(8, 64, decode_only=False, use_adapters=True)
    state = State(
        pages=jax.ShapeDtypeStruct((config.num_layers, num_pages, config.geometry.page_elements), jnp.float32)
    )
    params = jax.eval_shape(lambda: random_params(config, dtype="float32"))
    forward = make_forward(config, dtype=jnp.float32, loop=loop)
    memory = jax.jit(forward, donate_argnums=1).lower(params, state, batch).compile().memory_analysis()
    pool = num_pages * config.num_layers * config.geometry.page_elements * 4
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool / 50


def test_batch_step_wants_sampling():
    config = named_shape("tiny-llama")
    batch = BatchBuilder(config.geometry, Buckets.default(2, 64), 4, 64).padding(
        2, 2, decode_only=True, use_adapters=False
    )
    with pytest.raises(ValueError, match="batch.sampling is missing"):
        make_batch_step(config)({}, State(pages=jnp.zeros((2, 4, 2048))), batch)


def test_buckets():
    assert powers_of_two(1, 6) == (1, 2, 4, 6)
    buckets = Buckets.default(16, 200)
    assert buckets.seqs == (1, 2, 4, 8, 16) and buckets.tokens == (64, 128, 200)
    assert buckets.shape(3, 3, decode_only=True) == (4, 4)
    assert buckets.shape(3, 130, decode_only=False) == (16, 200)
    assert np.all(np.diff(buckets.tokens) > 0)
    gpu = Buckets.default(256, 2048, gpu=True)
    assert gpu.seqs == (1, 8, 32, 64, 128, 256)
    assert gpu.tokens == (256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
    assert Buckets.default(2, 64, gpu=True) == Buckets(seqs=(1, 2), tokens=(64,))
