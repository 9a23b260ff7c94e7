"""The Hopper LoRA kernels, interpreted, over one device's part of an adapter: a run of A, then a run of B."""

import dataclasses

from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
import numpy as np
from oracles import relative_error

from pallas_kernels import GROUPS, AdapterTable
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.kernel_sm90 import expand_sm90, shrink_sm90, unsupported
from sharding import Layout
from slora_jax.adapters import random_adapter
from slora_jax.adapters.shards import shard_adapter, shard_image
from slora_jax.shapes import named_shape


def test_the_communication_free_layout_runs_on_the_kernels():
    group = "qkv"
    tuning = LoraConfig(num_splits=2, shrink_ctas=2, expand_ctas=2, shrink_stages=2, expand_stages=2)
    config = dataclasses.replace(
        named_shape("tiny-llama"), hidden_size=128, mlp_size=256, num_heads=4, num_kv_heads=4, head_dim=64
    )
    layout = Layout(devices=2, geometry=config.geometry, vocab_size=256, lora=("comm-free",) * 4)
    adapter = random_adapter(config, 24, dtype=np.float32)
    shards, device, layer, tokens = shard_adapter(adapter, layout), 1, 1, 5
    table = dict(
        pages=jnp.arange(shards.num_pages, dtype=jnp.int32),
        page_start=jnp.zeros(1, jnp.int32),
        scaling=jnp.asarray(adapter.scaling)[None],
        granules=jnp.asarray(adapter.granules)[None],
    )
    pages = jnp.asarray(shard_image(adapter, layout, device, np.dtype(jnp.bfloat16)).swapaxes(0, 1))
    segments = (jnp.array([0, tokens], jnp.int32), jnp.zeros(1, jnp.int32))
    modules = GROUPS[group]
    inputs, outputs = layout.inputs(modules[0])[device], [layout.outputs(m)[device] for m in modules]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, inputs.size)), jnp.bfloat16)
    out = jnp.zeros((tokens, sum(o.size for o in outputs)), jnp.bfloat16)
    assert unsupported(x, pages, group=group, geometry=layout.shrink, max_rank=24) is None
    options = dict(layer=layer, group=group, max_rank=24, config=tuning, interpret=plgpu.InterpretGPUParams())
    shrink = AdapterTable(**table, tile_start=jnp.asarray(shards.shrink_start[device])[None])
    expand = AdapterTable(**table, tile_start=jnp.asarray(shards.expand_start[device])[None])
    y = shrink_sm90(x, pages, shrink, *segments, geometry=layout.shrink, **options)
    result = expand_sm90(out, y, pages, expand, *segments, geometry=layout.expand, **options)
    wanted = [
        float(adapter.scaling[layer, m])
        * np.asarray(x, np.float64)
        @ np.float64(adapter.weights.factor(layer, m, 0)[:, inputs]).T
        @ np.float64(adapter.weights.factor(layer, m, 1)[index]).T
        for m, index in zip(modules, outputs, strict=True)
    ]
    assert relative_error(result, np.concatenate(wanted, axis=1)) < 1e-2
