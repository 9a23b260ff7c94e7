"""What each device holds: heads, columns, shards of arrays, an adapter's granules; and the choice between layouts."""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Geometry
from pallas_kernels.lora.kernel_matmul_sm90 import unsupported
from pallas_kernels.lora.product_tiles import CHUNK
from pallas_kernels.lora.table import section_starts
from pallas_kernels.lora.windows import TILE
from sharding import CostModel, Layout, Room, Shards, choose_layout, make_mesh
from slora_jax.adapters import AdapterShape, random_adapter
from slora_jax.adapters.shards import shard_adapter, shard_image
from slora_jax.parallel import make_parallel, param_shards
from slora_jax.shapes import named_shape

COMM_FREE, S_LORA = ("comm-free",) * 4, ("s-lora",) * 4


def layout(heads, kv_heads, devices, lora=COMM_FREE):
    q, kv, h, f = heads * 16, kv_heads * 16, 64, 160
    geometry = Geometry(
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16,
        in_sizes=(h, h, h, q, h, h, f),
        out_sizes=(q, kv, kv, h, f, f, h),
    )
    return Layout(devices=devices, geometry=geometry, vocab_size=100, lora=lora)


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (9, 3), (16, 2), (5, 5), (6, 1)])
def test_every_query_head_is_on_one_device_next_to_its_kv_head(heads, kv_heads, devices):
    found = layout(heads, kv_heads, devices)
    real = found.q_heads[found.q_heads >= 0]
    assert sorted(real) == list(range(heads))
    group = found.q_heads.shape[1] // found.kv_heads.shape[1]
    for device in range(devices):
        for i, head in enumerate(found.q_heads[device]):
            assert head < 0 or head // (heads // kv_heads) == found.kv_heads[device, i // group]


def test_sizes_that_divide_are_megatrons():
    found = layout(8, 4, 4)
    assert found.q_heads.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] and found.kv_heads.ravel().tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert found.columns("heads", 3)[1].tolist() == [*range(32, 64), *range(144, 160), *range(208, 224)]
    assert found.columns("mlp", 2)[3].tolist() == [*range(120, 160), *range(280, 320)]
    assert layout(8, 2, 4).kv_heads.ravel().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_s_lora_splits_every_granule_once(devices):
    config = named_shape("tiny-gqa")
    ranks = np.random.default_rng(0).choice([0, 1, 8, 20, 64], (3, 7))
    adapter = random_adapter(config, ranks)
    whole = Layout(devices=devices, geometry=config.geometry, vocab_size=256, lora=S_LORA)
    shards = shard_adapter(adapter, whole)
    column = [0, 1, 2, 4, 5]
    assert (shards.shrink_granules.sum(axis=0)[:, column] == adapter.granules[:, column]).all()
    assert (shards.shrink_granules[:, :, [3, 6]] == adapter.granules[:, [3, 6]]).all()


def test_images_store_each_weight_once_in_s_loras_layout():
    config = dataclasses.replace(named_shape("tiny-llama"), hidden_size=512, mlp_size=1024, num_heads=32)
    config = dataclasses.replace(config, num_kv_heads=32)
    adapter = random_adapter(config, 64)
    for lora, device_share in ((S_LORA, 0.25), (COMM_FREE, None)):
        cut = Layout(devices=4, geometry=config.geometry, vocab_size=256, lora=lora)
        stored = [np.count_nonzero(shard_image(adapter, cut, d, np.float32)) for d in range(4)]
        weights = adapter.nbytes / 4
        if device_share:
            assert stored == [weights * device_share] * 4
        else:
            assert all(weights / 4 < n < weights for n in stored)


def test_shards_take_permute_and_fill_up():
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    mesh = make_mesh(2)
    whole = np.arange(24, dtype=np.float32).reshape(4, 6) + 1
    shards = Shards(mesh=mesh, axis=1, index=np.array([[0, 3, 1], [2, 5, -1]]))
    wanted = np.concatenate([whole[:, [0, 3, 1, 2, 5]], np.zeros((4, 1))], axis=1)
    placed = shards.put(whole)
    assert np.array_equal(placed, wanted)
    assert [part.data.shape for part in placed.addressable_shards] == [(4, 3)] * 2
    stored = jax.device_put(whole, shards.stored(whole.shape))
    assert stored.addressable_shards[0].data.shape == (2, 6)
    moved = shards.rearrange(stored)
    assert moved.sharding == placed.sharding and np.array_equal(moved, wanted)
    plain = Shards(mesh=mesh, axis=0, index=np.array([[0, 1], [2, 3]]))
    assert plain.stored(whole.shape) == plain.sharding and plain.rearrange(stored) is stored


def test_param_shards_name_every_parameter():
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    config = named_shape("tiny-qwen2")
    shards = param_shards(config, make_parallel(config, 2))
    split = {name: (where.axis, where.index.size) for name, where in shards.items() if isinstance(where, Shards)}
    assert split == {
        "embed": (0, 256),
        "wqkv": (2, 128),
        "bqkv": (1, 128),
        "wo": (1, 64),
        "wgu": (2, 320),
        "wdown": (1, 160),
        "lm_head": (0, 256),
    }


@pytest.mark.parametrize(
    "name, devices, supported, aligned",
    [
        ("llama-3.1-8b", 4, True, True),
        ("llama-2-13b", 2, True, True),
        ("llama-2-7b", 4, False, False),  # read amiss until all widths were asked
        ("llama-2-13b", 8, False, False),
    ],
)
def test_sections_of_a_part_begin_with_a_chunk_where_lora_matmul_is_supported(name, devices, supported, aligned):
    config = named_shape(name)
    parts = Layout(devices=devices, geometry=config.geometry, vocab_size=config.vocab_size, lora=COMM_FREE)
    ranks = np.full((config.num_layers, 7), 8, np.int32)
    sizes = dict(in_sizes=config.geometry.in_sizes, out_sizes=config.geometry.out_sizes)
    adapter = AdapterShape(ranks=ranks, scaling=np.ones_like(ranks, np.float32), **sizes)
    _, b_start = section_starts(jnp.asarray(adapter.granules), parts.expand)
    starts = shard_adapter(adapter, parts).expand_start[:, None] + np.stack(b_start)  # [N, 7, L]
    x, w = jnp.zeros((TILE, 64), jnp.bfloat16), jnp.zeros((1, 64, 64), jnp.bfloat16)
    assert (unsupported(x, w, parts.expand) is None) == supported
    assert (starts % CHUNK == 0).all() == aligned


def test_auto_weighs_latency_against_bytes():
    geometry = named_shape("llama-30b-m").geometry
    options = dict(devices=4, tokens=64, rank=64)
    slow, fast = CostModel(latency=1e-3), CostModel(latency=1e-7, gather_latency=1e-7, rows=0.0, gather_rows=0.0)
    assert choose_layout(geometry, adapters=1, model=slow, **options) == COMM_FREE
    assert choose_layout(geometry, adapters=64, model=fast, **options) == S_LORA
    assert choose_layout(geometry, adapters=64, model=slow, **options | dict(devices=1)) == COMM_FREE


@pytest.mark.parametrize("name, rank", [("llama-70b-m", 64), ("llama-30b-m", 32)])
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("adapters", [10, 100])
def test_auto_chooses_what_was_faster_on_h200s(name, rank, devices, adapters):
    """benchmarks/results/tensor_parallel_h200.json: the same layout for steps of half of 256 sequences."""
    model = CostModel(latency=21e-6, gather_latency=24e-6)
    options = dict(devices=devices, tokens=128, adapters=adapters, rank=rank)
    assert choose_layout(named_shape(name).geometry, model=model, **options) == COMM_FREE


def test_auto_leaves_room_for_sequences():
    """What served more on two H200s with 2,592 pages for 128 requests of 194 tokens on average
    (benchmarks/results/tensor_parallel_served_h200x2.json): S-LoRA's layout, 1.07 times as many, where a hundred
    adapters leave no room for all, and the other one where ten do.
    """
    geometry, pages = named_shape("llama-70b-m").geometry, 2592
    per_layer = sum(a * b for a, b in zip(geometry.in_sizes, geometry.out_sizes, strict=True))
    room = Room(bytes=pages * 20971520, context=194, weights=geometry.num_layers * per_layer)
    options = dict(devices=2, tokens=128, rank=64, model=CostModel(latency=19e-6, gather_latency=23e-6))
    options |= dict(groups=("qkv", "o"))
    assert choose_layout(geometry, adapters=100, room=room, **options)[:2] == ("s-lora", "s-lora")
    assert choose_layout(geometry, adapters=10, room=room, **options) == COMM_FREE
    large = dataclasses.replace(room, bytes=10 * room.bytes)
    for adapters in (10, 100, 1000):
        free = choose_layout(geometry, adapters=adapters, **options)
        assert choose_layout(geometry, adapters=adapters, room=large, **options) == free


def test_auto_weighs_no_group_without_adapters():
    options = dict(
        devices=2,
        tokens=64,
        adapters=64,
        rank=64,
        model=CostModel(latency=1e-7, gather_latency=1e-7, rows=0.0, gather_rows=0.0),
    )
    geometry = named_shape("llama-30b-m").geometry
    assert choose_layout(geometry, groups=("gu",), **options) == ("comm-free", "comm-free", "s-lora", "comm-free")
    assert choose_layout(geometry, groups=(), **options) == COMM_FREE


def test_auto_without_adapters():
    options = dict(devices=2, tokens=8, adapters=0, rank=16, model=CostModel())
    assert choose_layout(named_shape("llama-30b-m").geometry, **options) == COMM_FREE


def test_bad_layouts_are_refused():
    with pytest.raises(ValueError, match="must name 's-lora' or 'comm-free'"):
        layout(4, 4, 2, ("other",) * 4)
    if len(jax.devices()) >= 4:
        with pytest.raises(ValueError, match="must be a multiple of 16"):
            make_parallel(dataclasses.replace(named_shape("tiny-llama"), head_dim=8), 4)
