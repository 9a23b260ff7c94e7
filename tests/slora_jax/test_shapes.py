"""Named shapes and the random weights made for them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slora_jax.errors import ModelError
from slora_jax.loading import load_config, load_model, random_params
from slora_jax.loading.random import _maker
from slora_jax.model_config import param_specs
from slora_jax.shapes import SHAPES, named_shape

TINY = [name for name in SHAPES if name.startswith("tiny")]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
    ],
)
def test_published_parameter_counts(name, parameters):
    specs = param_specs(named_shape(name))
    assert sum(math.prod(spec.shape) for spec in specs.values()) == parameters


@pytest.mark.parametrize(
    ("name", "sizes"), [("llama-30b-m", (48, 7168, 56, 19456)), ("llama-70b-m", (80, 8192, 64, 24576))]
)
def test_s_lora_shapes(name, sizes):
    config = named_shape(name)
    assert (config.num_layers, config.hidden_size, config.num_heads, config.mlp_size) == sizes
    assert config.num_kv_heads == config.num_heads and config.head_dim == 128


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_fits_the_page_layout(name):
    assert SHAPES[name].geometry.page_tiles > 0


def test_unknown_shape_lists_the_names():
    with pytest.raises(ModelError, match=r"llama-9b.*tiny-gqa"):
        named_shape("llama-9b")
    with pytest.raises(ModelError, match="llama-9b"):
        load_config("random:llama-9b")


@pytest.mark.parametrize("name", TINY)
def test_random_params_match_the_specs(name):
    config = named_shape(name)
    params = random_params(config, seed=3, dtype=jnp.float32)
    specs = param_specs(config)
    assert params.keys() == specs.keys()
    for key, array in params.items():
        assert array.shape == specs[key].shape and array.dtype == jnp.float32
        assert np.isfinite(array).all()
    assert np.std(params["wdown"]) == pytest.approx(config.mlp_size**-0.5, rel=0.1)
    assert np.mean(params["attn_norm"]) == pytest.approx(1.0, abs=0.1)


def test_random_params_depend_on_seed_and_name_only():
    config = named_shape("tiny-llama")
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, None, "tp"))
    first = random_params(config, seed=1)
    again = random_params(config, seed=1, shardings={"wqkv": sharding})
    other = random_params(config, seed=2)
    assert again["wqkv"].sharding == sharding
    for key in first:
        assert first[key].dtype == jnp.bfloat16
        assert jnp.array_equal(first[key], again[key])
        assert not jnp.array_equal(first[key], other[key])
    assert not jnp.array_equal(first["embed"], first["lm_head"])


def test_random_arrays_need_little_memory_beside_the_result():
    def temporary(*shape):
        make = _maker(shape, jnp.dtype("float32"), None)
        return make.lower(jax.random.key(0), 0.0, 1.0).compile().memory_analysis().temp_size_in_bytes

    assert temporary(32, 128, 256) < 1.1 * temporary(4, 128, 256)
    assert temporary(4096, 256) < 4096 * 256 * 4


def test_load_model_random():
    seen = []
    model = load_model("random:tiny-tied", progress=lambda done, total, what: seen.append((done, total, what)))
    assert model.name == "tiny-tied" and model.config == named_shape("tiny-tied") == load_config("random:tiny-tied")
    assert model.tokenizer is None and model.eos_token_ids == ()
    assert "lm_head" not in model.params
    done, total, _ = seen[-1]
    assert done == total == sum(array.nbytes for array in model.params.values())
