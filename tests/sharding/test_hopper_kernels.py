"""The Hopper kernels over one device's part of the model: interpreted with the collectives played by numpy, lowered to
CUDA as whole steps, and (marked gpu) on the machine.
"""

import dataclasses
import functools
import re

import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P
import numpy as np
from oracles import relative_error
import pytest
from steps import prompt_logits

from pallas_kernels import GROUPS, AdapterTable
from pallas_kernels.lora import from_token_rows, pair_implementation, to_token_rows
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.kernel_sm90 import expand_sm90, shrink_sm90, unsupported
from sharding import ROW_GROUPS, Layout, make_mesh
from sharding.lora import _own_slice, _put_own_slice, close_gaps
from slora_jax.adapters import random_adapter
from slora_jax.adapters.shards import shard_adapter, shard_image
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.loading import random_params
from slora_jax.parallel import make_parallel, param_shards, shard_params
from slora_jax.placement import new_state
from slora_jax.shapes import named_shape
from slora_jax.step import make_forward

CONFIG = dataclasses.replace(
    named_shape("tiny-llama"), hidden_size=128, mlp_size=256, num_heads=4, num_kv_heads=4, head_dim=64
)
TUNING = LoraConfig(num_splits=2, shrink_ctas=2, expand_ctas=2, shrink_stages=2, expand_stages=2)
LAYER = 1


class Devices:
    """Two adapters of odd ranks on two devices, and a batch in which one has two token blocks and some tokens none."""

    seg_start = np.array([0, 3, 5, 16, 16], np.int32)
    seg_adapter = np.array([0, -1, 1, -1], np.int32)

    def __init__(self, lora, group, count=2):
        self.layout = Layout(devices=count, geometry=CONFIG.geometry, vocab_size=256, lora=(lora,) * 4)
        self.group, self.modules = group, GROUPS[group]
        self.adapters = [random_adapter(CONFIG, r, seed=r, dtype=np.float32) for r in (24, 40)]
        self.segments = jnp.asarray(self.seg_start), jnp.asarray(self.seg_adapter)
        self.options = dict(layer=LAYER, group=group, max_rank=40, config=TUNING, interpret=plgpu.InterpretGPUParams())
        rng = np.random.default_rng(0)
        width = CONFIG.geometry.in_sizes[self.modules[0]]
        self.x = np.asarray(jnp.asarray(rng.standard_normal((17, width)), jnp.bfloat16))
        shards = [shard_adapter(a, self.layout) for a in self.adapters]
        start = np.cumsum([0, *[s.num_pages for s in shards]]).astype(np.int32)
        common = dict(
            pages=jnp.arange(start[-1], dtype=jnp.int32),
            page_start=jnp.asarray(start[:-1]),
            scaling=jnp.asarray(np.stack([a.scaling for a in self.adapters])),
        )
        self.granules = jnp.asarray(np.stack([a.granules for a in self.adapters]))

        def table(device, granules, field):
            starts = jnp.asarray(np.stack([getattr(s, field)[device] for s in shards]))
            return AdapterTable(**common, granules=granules, tile_start=starts)

        every = range(count)
        own = [jnp.asarray(np.stack([s.shrink_granules[d] for s in shards])) for d in every]
        self.shrink = [table(d, own[d], "shrink_start") for d in every]
        self.expand = [table(d, self.granules, "expand_start") for d in every]
        images = [[shard_image(a, self.layout, d, np.dtype(jnp.bfloat16)) for a in self.adapters] for d in every]
        self.pages = [jnp.asarray(np.concatenate(images[d]).swapaxes(0, 1)) for d in every]

    def shrink_on(self, device):
        x = jnp.asarray(self.x[:, self.layout.inputs(self.modules[0])[device]])
        assert unsupported(x, self.pages[device], group=self.group, geometry=self.layout.shrink, max_rank=40) is None
        where = (self.pages[device], self.shrink[device], *self.segments)
        return _interpret(shrink_sm90, x, *where, geometry=self.layout.shrink, **self.options)

    def rows_on(self, device, y):
        options = dict(num_tokens=len(self.x), group=self.group, max_rank=40)
        return np.asarray(to_token_rows(y, *self.segments, **options))

    def check(self, device, y):
        """Runs expand and compares the device's outputs with float64."""
        outputs = [self.layout.outputs(m)[device] for m in self.modules]
        out = jnp.zeros((len(self.x), sum(o.size for o in outputs)), jnp.bfloat16)
        where = (self.pages[device], self.expand[device], *self.segments)
        result = np.asarray(_interpret(expand_sm90, out, y, *where, geometry=self.layout.expand, **self.options))
        inputs = self.layout.inputs(self.modules[0])[device]
        whole = self.group not in ROW_GROUPS or self.layout.lora_layout(self.group) == "s-lora"
        wanted = np.zeros(result.shape)
        for s, a in enumerate(self.seg_adapter):
            rows = slice(self.seg_start[s], self.seg_start[s + 1])
            if a < 0:
                assert not result[rows].any()
                continue
            adapter = self.adapters[a]
            x = np.float64(self.x[rows] if whole else self.x[rows][:, inputs])
            deltas = []
            for m, columns in zip(self.modules, outputs, strict=True):
                factor = np.float64(adapter.weights.factor(LAYER, m, 0))
                factor = factor if whole else factor[:, inputs]
                b = np.float64(adapter.weights.factor(LAYER, m, 1)[columns])
                deltas.append(float(adapter.scaling[LAYER, m]) * x @ factor.T @ b.T)
            wanted[rows] = np.concatenate(deltas, axis=1)
        assert relative_error(result, wanted) < 1e-2


def _interpret(op, *args, **options):
    """One program, and its end waited for: what this thread dispatched meanwhile could wait for it forever, because the
    interpreter's callbacks dispatch too.
    """
    return jax.block_until_ready(jax.jit(functools.partial(op, **options))(*args))


@pytest.mark.parametrize("group", ["qkv", "down"])
def test_the_communication_free_layout_interpreted(group):
    devices = Devices("comm-free", group)
    devices.check(1, devices.shrink_on(1))


@pytest.mark.parametrize("group", ["qkv", "down"])
def test_s_loras_layout_interpreted(group):
    devices = Devices("s-lora", group)
    y = [devices.shrink_on(d) for d in range(2)]
    rows = [devices.rows_on(d, part) for d, part in enumerate(y)]
    if group in ROW_GROUPS:
        ranks = jnp.asarray(rows[0] + rows[1])
    else:
        most = -(-rows[0].shape[1] // 8 // 2) * 8
        joined = jnp.asarray(np.concatenate([r[:, :most] for r in rows], axis=1))
        granules = devices.granules[:, LAYER, jnp.array(devices.modules)].sum(axis=1)
        ranks = close_gaps(joined, granules, *devices.segments, columns=rows[0].shape[1], devices=2)
    devices.check(1, from_token_rows(ranks, y[1], *devices.segments))


@pytest.mark.parametrize(
    "lora, tokens, lora_launches",
    [
        ("s-lora", 64, 4 + 4),
        ("s-lora", 128, 4 + 4),
        ("comm-free", 64, 4),
        ("comm-free", 1024, 3 * 4),  # long segments with the base projections, short ones after them
    ],
)
def test_the_whole_step_lowers_to_cuda(lora, tokens, lora_launches):
    """Every LoRA group, the attention and the writing of keys and values run on Hopper kernels; nothing loops."""
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    config = dataclasses.replace(
        named_shape("llama-3.1-8b"), hidden_size=1024, mlp_size=2048, num_heads=8, num_kv_heads=4, num_layers=1
    )
    parallel = make_parallel(config, 2, lora)
    shards = param_shards(config, parallel)
    params = jax.eval_shape(lambda: random_params(config, dtype="bfloat16", shardings=shards))
    state = jax.eval_shape(lambda: new_state(config, 100, jnp.bfloat16, parallel))
    builder = BatchBuilder(config.geometry, Buckets(seqs=(64,), tokens=(1024,)), 100, 4096, parallel.layout)
    decode_only = tokens == 64
    batch = builder.padding(64, tokens, decode_only=decode_only, use_adapters=True)
    forward = make_forward(config, implementation="mosaic", parallel=parallel)
    traced = jax.jit(forward, donate_argnums=1).trace(params, state, batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    attention = 2 if decode_only else 3  # decode and the joining of its splits; prompt chunks
    between = 3 + 1 + 1  # norms, rotation and the writing of keys and values, SiLU·mul
    assert text.count("@mosaic_gpu_v2") == lora_launches + between + attention
    assert "stablehlo.while" not in text
    collectives = re.findall(r'"stablehlo\.(all_reduce|all_gather)"', text)
    extra = 2 if lora == "s-lora" else 0
    assert collectives.count("all_reduce") == 3 + extra  # the embedding, attention and MLP
    assert collectives.count("all_gather") == extra


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_devices_columns_of_a_sum(tokens):
    """S-LoRA's slice of o and down, and its way back; of one token without a slice that XLA could fuse."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    base = np.arange(tokens * 10, dtype=np.float32).reshape(tokens, 10)

    def both(x):
        part = _own_slice(x, 3, 4)
        return part, _put_own_slice(x, part + 100, 4)

    specs = (P(None, "tp"), P("tp"))
    run = jax.jit(jax.shard_map(both, mesh=make_mesh(4), in_specs=P(), out_specs=specs, check_vma=False))
    parts, whole = map(np.asarray, run(base))
    assert (parts == np.pad(base, ((0, 0), (0, 2)))).all()
    for device in range(4):
        wanted = base.copy()
        wanted[:, 3 * device : 3 * device + 3] += 100
        assert (whole[device * tokens : (device + 1) * tokens] == wanted).all()
    assert ("dynamic_slice" in run.lower(base).as_text()) == (tokens > 1)


def test_both_kernels_or_neither():
    """What only one of them cannot take is left to XLA as a whole, because y has each implementation's own layout."""
    devices = Devices("comm-free", "qkv")
    x, pages = jnp.zeros((1, 128), jnp.bfloat16), devices.pages[0]
    odd = dataclasses.replace(devices.layout.expand, out_sizes=(128, 32, 32, 128, 128, 128, 128))
    options = dict(group="qkv", shrink=devices.layout.shrink, max_rank=8)
    assert pair_implementation(x, x, pages, expand=odd, **options) == "xla"
    with pytest.raises(ValueError, match="LoRA has no Hopper kernel for this input: a width of 32"):
        pair_implementation(x, x, pages, expand=odd, implementation="mosaic", **options)
    assert (
        pair_implementation(x, x, pages, expand=devices.layout.expand, implementation="mosaic", **options) == "mosaic"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("lora", ["s-lora", "comm-free"])
def test_logits_are_those_of_one_gpu(lora, devices):
    """bfloat16, Hopper kernels on both sides: the sums are cut differently, so equal to rounding."""
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    config = dataclasses.replace(
        named_shape("llama-3.1-8b"), hidden_size=1024, mlp_size=2048, num_heads=32, num_kv_heads=4, num_layers=2
    )
    params = random_params(config, dtype="bfloat16")
    rng = np.random.default_rng(0)
    ranks = [16, rng.choice([0, 8, 24, 64], (config.num_layers, 7)), 1]
    adapters = [None, *[random_adapter(config, r, seed=i, dtype=jnp.bfloat16) for i, r in enumerate(ranks)]]

    def prompts(*lengths):
        return [(rng.integers(0, config.vocab_size, n).tolist(), a) for n, a in zip(lengths, adapters, strict=True)]

    options = dict(dtype=jnp.bfloat16, last_only=True)
    parallel = make_parallel(config, devices, lora)
    sharded = shard_params(config, params, parallel)
    # One token, whose rows XLA treats otherwise; and as many as have base projections and deltas in one kernel.
    for some in (prompts(1, 9, 70, 33), [([7], adapters[1])], prompts(101, 300, 113, 510)):
        wanted = prompt_logits(config, params, some, **options)
        found = prompt_logits(config, sharded, some, parallel=parallel, **options)
        for one, many in zip(wanted, found, strict=True):
            assert relative_error(many, one) < 2e-2
