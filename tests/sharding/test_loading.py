"""Weights that are loaded straight into their shards are those that are loaded whole and then cut."""

import dataclasses

from hf_files import write_model
import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from sharding import Shards
from slora_jax.loading import load_config, load_model, save_orbax
from slora_jax.loading.hf import open_checkpoint
from slora_jax.loading.params import pieces_of
from slora_jax.loading.sharded import load_shards
from slora_jax.model_config import param_specs
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


def test_only_the_slices_of_ones_own_devices_are_read(tmp_path, monkeypatch):
    """As in a process that has two of four devices: half of every split tensor is read from the file, and no more."""
    write_model(tmp_path, "tiny-llama")
    config = load_config(str(tmp_path))
    parallel = make_parallel(config, 4)
    mine = set(parallel.mesh.devices.flat[1:3])
    wanted = load_model(str(tmp_path), dtype="float32").params["wqkv"]
    checkpoint = open_checkpoint(tmp_path)
    read = []

    def read_slice(name, axis, start, stop):
        value = checkpoint.read_slice(name, axis, start, stop)
        read.append((name, value.size / np.prod(checkpoint.shapes[name])))
        return value

    def addressable(self, shape):
        return {d: i for d, i in self.devices_indices_map(shape).items() if d in mine}

    made = []
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", addressable)
    monkeypatch.setattr(
        jax, "make_array_from_single_device_arrays", lambda shape, sharding, arrays: made.extend(arrays)
    )
    for name, where in param_shards(config, parallel).items():
        if isinstance(where, Shards):
            spec = param_specs(config)[name]
            load_shards(where, spec.shape, np.dtype("float32"), pieces_of(config, name), read_slice, lambda x: x)
    total = {}
    for name, share in read:
        total[name] = total.get(name, 0) + share
    assert set(total) == {name for name in checkpoint.shapes if "norm" not in name}
    assert set(total.values()) == {0.5}
    where = param_shards(config, parallel)["wqkv"]
    found = [a for a in made if a.shape == (config.num_layers, config.hidden_size, where.index.shape[1])]
    for array, device in zip(found, (1, 2), strict=True):
        np.testing.assert_array_equal(array, where.take(np.asarray(wanted), device))
