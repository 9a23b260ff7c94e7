"""The image of an adapter, read back by an independent and slow reader."""

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.geometry import GROUPS, MODULES
from slora_jax.adapters import Adapter, random_adapter
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig

RANKS = st.one_of(st.just(0), st.integers(1, 9), st.integers(1, 70))


def model(layers=2, hidden=32, mlp=80, heads=4, kv_heads=2, head_dim=16) -> ModelConfig:
    return ModelConfig(
        vocab_size=8,
        hidden_size=hidden,
        mlp_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


def read_image(image: np.ndarray, ranks: np.ndarray, config: ModelConfig):
    """Factors of an image [pages, L, E], element by element, and the tile at which each layer begins.

    Written from the description of the layout: a tile is found by the linear index of its 512 elements, and every
    element that is no weight must be zero.
    """
    elements = 2 * config.num_kv_heads * 16 * config.head_dim
    page_tiles = elements // 512
    unused = np.ones(image.shape, bool)
    factors, starts, at = {}, [], 0

    def take(rank: int, width: int) -> np.ndarray:
        nonlocal at
        matrix = np.zeros((rank, width), image.dtype)
        for granule in range((rank + 7) // 8):
            for column in range((width + 63) // 64):
                unit, slot = divmod(at, page_tiles)
                page, layer = divmod(unit, config.num_layers)
                for r in range(granule * 8, min(rank, granule * 8 + 8)):
                    for c in range(column * 64, min(width, column * 64 + 64)):
                        where = page, layer, slot * 512 + (r % 8) * 64 + c % 64
                        matrix[r, c] = image[where]
                        unused[where] = False
                at += 1
        return matrix

    for layer in range(config.num_layers):
        starts.append(at)
        for group in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            present = [MODULES.index(name) for name in group if ranks[layer, MODULES.index(name)]]
            a = [take(int(ranks[layer, m]), config.in_sizes[m]) for m in present]
            b = [take(int(ranks[layer, m]), config.out_sizes[m]).T for m in present]
            factors |= {(layer, m): pair for m, pair in zip(present, zip(a, b, strict=True), strict=True)}
    assert not image[unused].any()
    return factors, starts, at


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.lists(st.lists(RANKS, min_size=7, max_size=7), min_size=2, max_size=2).filter(lambda x: np.any(x)),
    widths=st.sampled_from([{}, {"hidden": 64, "mlp": 128}, {"kv_heads": 1, "heads": 1}, {"hidden": 65, "mlp": 1}]),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    seed=st.integers(0, 9),
)
def test_image_holds_a_and_b_and_nothing_else(ranks, widths, dtype, seed):
    config, ranks = model(**widths), np.array(ranks, np.int32)
    geometry = config.geometry
    adapter = random_adapter(config, ranks, seed=seed)
    image = adapter.image(geometry, dtype)
    assert image.dtype == dtype
    factors, starts, tiles = read_image(image, ranks, config)
    for (layer, module), (a, b) in factors.items():
        np.testing.assert_array_equal(a, adapter.a(layer, MODULES[module]).astype(dtype))
        np.testing.assert_array_equal(b, adapter.b(layer, MODULES[module]).astype(dtype))
    assert len(factors) == np.count_nonzero(ranks)
    assert adapter.tile_start(geometry).tolist() == starts
    assert adapter.num_tiles(geometry) == tiles
    assert adapter.num_pages(geometry) == len(image)
    assert (len(image) - 1) * geometry.tiles_per_page_id < tiles <= len(image) * geometry.tiles_per_page_id
    np.testing.assert_array_equal(adapter.granules, (ranks + 7) // 8)


@pytest.mark.parametrize("rank", [1, 8, 16, 64, 512])
def test_waste_is_under_one_page_id_for_llama_shapes(rank):
    # Tiles only, so no weights are made: one layer's widths of Llama-2-7B and Llama-3.1-8B.
    for hidden, mlp, heads, kv_heads in ((4096, 11008, 32, 32), (4096, 14336, 32, 8)):
        config = model(layers=1, hidden=hidden, mlp=mlp, heads=heads, kv_heads=kv_heads, head_dim=128)
        geometry = config.geometry
        for group in GROUPS.values():
            ranks = np.zeros((1, 7), np.int32)
            ranks[:, group] = rank
            adapter = random_adapter(config, ranks, dtype=np.float16)
            granules = -(-rank // 8)
            true = sum(granules * 8 * (config.in_sizes[m] + config.out_sizes[m]) for m in group)
            used = adapter.num_pages(geometry) * geometry.num_layers * geometry.page_elements
            assert 0 <= used - true < geometry.num_layers * geometry.page_elements
            if rank > 16:
                break


def test_rank_16_on_all_of_llama_8b_takes_40_page_ids():
    # The figure of DESIGN.md for 32 layers; one layer of the same widths has a 32nd of the tiles.
    config = model(layers=1, hidden=4096, mlp=14336, heads=32, kv_heads=8, head_dim=128)
    assert random_adapter(config, 16).num_tiles(config.geometry) * 32 == 40 * 32 * config.geometry.page_tiles


def test_image_of_other_sizes_is_refused():
    adapter = random_adapter(model(), 4)
    with pytest.raises(ValueError, match="cannot be laid out for"):
        adapter.image(model(hidden=64).geometry, np.float32)
    with pytest.raises(AdapterError, match="give an adapter of this base model"):
        adapter.check_fits(model(layers=3))


def test_weights_and_properties_are_read_only():
    adapter = random_adapter(model(), 4)
    for array in (adapter.ranks, adapter.granules, adapter.scaling, adapter.a(0, "q"), adapter.b(1, "down")):
        assert not array.flags.writeable
    with pytest.raises(AttributeError):
        adapter.digest = "other"


def test_summary():
    ranks = np.zeros((2, 7), np.int32)
    ranks[0, 0], ranks[1, 6] = 3, 12
    adapter = random_adapter(model(), ranks)
    assert adapter.targets == ("q", "down")
    assert adapter.rank_summary == "3-12" and random_adapter(model(), 5).rank_summary == "5"
    assert adapter.max_rank == 12
    assert adapter.nbytes == 4 * (3 * (32 + 64) + 12 * (80 + 32))
    assert repr(adapter) == f"Adapter({adapter.digest[:12]}, rank 3-12, q down)"
    with pytest.raises(AdapterError, match="does not target q_proj of layer 1"):
        adapter.a(1, "q")


def test_random_adapters():
    config = model()
    assert random_adapter(config, 4, seed=1) == random_adapter(config, 4, seed=1)
    assert random_adapter(config, 4, seed=1) != random_adapter(config, 4, seed=2)
    assert random_adapter(config, 4, ("k", "up")).targets == ("k", "up")
    assert random_adapter(config, 4, dtype=ml_dtypes.bfloat16).a(0, "q").dtype == ml_dtypes.bfloat16
    with pytest.raises(AdapterError, match="unknown target 'w'"):
        random_adapter(config, 4, ("w",))
    with pytest.raises(AdapterError, match="float64 is not supported"):
        random_adapter(config, 4, dtype=np.float64)
    wide = model(layers=1, hidden=512, mlp=512)
    x = np.random.default_rng(0).standard_normal(512)
    for rank in (2, 32):
        adapter: Adapter = random_adapter(wide, rank, scale=0.5)
        delta = adapter.scaling[0, 4] * adapter.b(0, "gate") @ (adapter.a(0, "gate") @ x)
        assert 0.1 < np.std(delta) < 1.5
