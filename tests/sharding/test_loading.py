"""Weights that are loaded straight into their shards are those that are loaded whole and then cut."""

import dataclasses

from hf_files import write_model
import numpy as np
import pytest

from sharding import Shards
from slora_jax.loading import load_config, load_model, save_orbax
from slora_jax.parallel import make_parallel, param_shards

pytestmark = pytest.mark.skipif("len(__import__('jax').devices()) < 4", reason="needs 4 devices")


def check(source, devices, dtype="float32", **kw):
    config = load_config(source)
    parallel = make_parallel(config, devices)
    shards = param_shards(config, parallel)
    whole = load_model(source, dtype=dtype, **kw).params
    split = load_model(source, dtype=dtype, shardings=shards, **kw).params
    for name, where in shards.items():
        wanted = where.put(np.asarray(whole[name])) if isinstance(where, Shards) else whole[name]
        assert np.array_equal(split[name], wanted), name
        assert split[name].dtype == wanted.dtype
        assert split[name].sharding.is_equivalent_to(getattr(where, "sharding", where), split[name].ndim), name


@pytest.mark.parametrize("devices", [2, 4])
def test_random(devices):
    check("random:tiny-qwen2", devices)


@pytest.mark.parametrize("devices", [2, 4])
def test_hugging_face(tmp_path, devices):
    write_model(tmp_path, "tiny-qwen2")
    check(str(tmp_path), devices)


@pytest.mark.parametrize("weight_dtype", [None, "bfloat16"])
def test_orbax(tmp_path, weight_dtype):
    model = load_model("random:tiny-qwen2", dtype="float32")
    path = save_orbax(tmp_path / "model", model.config, model.params)
    check(path, 4, weight_dtype=weight_dtype)


def test_orbax_where_nothing_divides(tmp_path):
    model = load_model("random:tiny-qwen2", dtype="float32")
    config = dataclasses.replace(model.config, vocab_size=251)
    params = {n: x[:251] if n in ("embed", "lm_head") else x for n, x in model.params.items()}
    path = save_orbax(tmp_path / "model", config, params)
    check(path, 3)
