"""Converted (Orbax) models: round trips to another dtype and sharding, and writes that leave nothing half-made."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slora_jax.errors import ModelError
from slora_jax.loading import load_config, load_model, orbax, random_params, save_orbax
from slora_jax.model_config import param_specs
from slora_jax.shapes import named_shape


@pytest.fixture(scope="module", params=["tiny-gqa", "tiny-qwen3"])
def saved(request, tmp_path_factory):
    """(path, config, params) of a model converted in float32."""
    config = named_shape(request.param)
    params = random_params(config, seed=5, dtype="float32")
    path = tmp_path_factory.mktemp("orbax") / "model"
    assert save_orbax(path, config, params, eos_token_ids=(3, 4), name="org/tiny") == path
    return path, config, params


def test_round_trip(saved):
    path, config, params = saved
    calls = []
    model = load_model(path, dtype="float32", progress=lambda *call: calls.append(call))
    assert model.config == config == load_config(path)
    assert (model.name, model.eos_token_ids, model.tokenizer) == ("org/tiny", (3, 4), None)
    assert model.params.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(model.params[name], array)
    total = sum(array.nbytes for array in params.values())
    assert [call[:2] for call in calls] == [(0, total), (total, total)]


def test_restore_to_another_dtype(saved):
    path, _, params = saved
    low = load_model(path, dtype="bfloat16").params
    rounded = load_model(path, dtype="float32", weight_dtype="bfloat16").params
    twice = load_model(path, dtype="bfloat16", weight_dtype="float16").params
    for name, array in params.items():
        value = np.asarray(array)
        assert low[name].dtype == jnp.bfloat16 and rounded[name].dtype == jnp.float32
        np.testing.assert_array_equal(low[name], value.astype(jnp.bfloat16))
        np.testing.assert_array_equal(rounded[name], value.astype(jnp.bfloat16).astype(np.float32))
        np.testing.assert_array_equal(twice[name], value.astype(np.float16).astype(jnp.bfloat16))


def test_restore_onto_a_mesh(saved):
    path, config, params = saved
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = {
        name: jax.sharding.NamedSharding(mesh, jax.P(*("tp" if axis else None for axis in spec.axes)))
        for name, spec in param_specs(config).items()
    }
    model = load_model(path, dtype="float32", shardings=shardings)
    for name, array in params.items():
        assert model.params[name].sharding == shardings[name]
        np.testing.assert_array_equal(model.params[name], array)


def tiny():
    config = named_shape("tiny-tied")
    return config, random_params(config, dtype="bfloat16")


def test_existing_paths_are_kept(tmp_path):
    config, params = tiny()
    path = tmp_path / "sub" / "model"
    save_orbax(path, config, params, name="first")
    with pytest.raises(ModelError, match="exists; choose another path or allow overwriting"):
        save_orbax(path, config, params)
    save_orbax(path, config, params, name="second", overwrite=True)
    assert load_model(path).name == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("x")
    with pytest.raises(ModelError, match="is not a converted model, so it is not overwritten"):
        save_orbax(tmp_path / "mine", config, params, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="cannot write to"):
        save_orbax(tmp_path / "file" / "model", config, params)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_broken_conversion_leaves_nothing(tmp_path, monkeypatch, overwrite):
    config, params = tiny()
    if overwrite:
        save_orbax(tmp_path / "model", config, params, name="good")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(orbax, "_write_params", fail)
    with pytest.raises(ModelError, match=r"cannot write .*model: No space left on device"):
        save_orbax(tmp_path / "model", config, params, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == (["model"] if overwrite else [])
    if overwrite:
        assert load_model(tmp_path / "model").name == "good"


def test_damaged_directories(tmp_path):
    config, params = tiny()
    whole = tmp_path / "whole"
    save_orbax(whole, config, params)
    manifest = json.loads((whole / "slora_model.json").read_text())
    for change, message in [
        ({"format": 99}, "format 99 is not 1; convert the model again"),
        ({"config": {}}, "damaged .*convert the model again"),
        ({"config": manifest["config"] | {"new": 1}}, "damaged .*convert the model again"),
        ({"config": manifest["config"] | {"mlp_size": 64}}, "parameters wdown, wgu do not fit"),
    ]:
        (whole / "slora_model.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ModelError, match=message):
            load_model(whole)
    (whole / "slora_model.json").write_text(json.dumps(manifest))
    shutil.rmtree(whole / "params")
    with pytest.raises(ModelError, match="convert the model again"):
        load_model(whole)
