"""Hugging Face directories: round trips for every family, and every refusal."""

import json

from hf_files import hf_config, hf_tensors, write_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax.errors import ModelError
from slora_jax.loading import load_config, load_model
from slora_jax.loading.config import config_from_hf
from slora_jax.model_config import RopeScaling
from slora_jax.shapes import named_shape

FAMILIES = ["tiny-llama", "tiny-gqa", "tiny-qwen2", "tiny-qwen3", "tiny-tied"]


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("shape", FAMILIES)
def test_round_trip(tmp_path, shape):
    params = write_model(tmp_path / "m", shape)
    model = load_model(tmp_path / "m", dtype="float32")
    assert model.config == named_shape(shape) == load_config(tmp_path / "m", check_weights=True)
    assert model.name == "m" and model.tokenizer is None and model.eos_token_ids == (2,)
    assert model.params.keys() == params.keys()
    for name, array in params.items():
        assert model.params[name].dtype == jnp.float32
        np.testing.assert_array_equal(model.params[name], array)


def test_several_files_with_an_index(tmp_path):
    params = write_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    for index in (False, True):
        if index:
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
            save_file(tensors, tmp_path / "other.safetensors")  # not named by the index, so not read
        model = load_model(tmp_path, dtype="float32")
        for name, array in params.items():
            np.testing.assert_array_equal(model.params[name], array)
    (tmp_path / file).unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors is missing"):
        load_model(tmp_path)
    for bad in ({}, {"weight_map": {"a": "../x.safetensors"}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(bad))
        with pytest.raises(ModelError, match=r"weight_map|not a safetensors file of this directory"):
            load_model(tmp_path)


def test_dtype_and_weight_dtype(tmp_path):
    params = write_model(tmp_path)
    low = load_model(tmp_path, dtype=jnp.bfloat16).params
    rounded = load_model(tmp_path, dtype="float32", weight_dtype="bfloat16").params
    for name, array in params.items():
        expected = np.asarray(array).astype(jnp.bfloat16)
        assert low[name].dtype == jnp.bfloat16 and rounded[name].dtype == jnp.float32
        np.testing.assert_array_equal(low[name], expected)
        np.testing.assert_array_equal(rounded[name], expected.astype(np.float32))
    for options in ({"dtype": "float16"}, {"dtype": "no such"}, {"weight_dtype": "int8"}):
        with pytest.raises(ModelError, match="is not supported; choose one of"):
            load_model(tmp_path, **options)


def test_half_precision_files(tmp_path):
    params = write_model(tmp_path)
    for dtype in (jnp.bfloat16, np.float16):
        save_file(
            {name: array.astype(dtype) for name, array in hf_tensors(named_shape("tiny-gqa"), params).items()},
            tmp_path / "model.safetensors",
        )
        model = load_model(tmp_path, dtype="float32")
        np.testing.assert_array_equal(model.params["wgu"], np.asarray(params["wgu"]).astype(dtype).astype(np.float32))


def test_shardings_and_progress(tmp_path):
    write_model(tmp_path)
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "tp", None))
    calls = []
    model = load_model(tmp_path, shardings={"wo": sharding}, progress=lambda *call: calls.append(call))
    assert model.params["wo"].sharding == sharding
    assert len(model.params["embed"].sharding.device_set) == 1
    assert [done for done, _, _ in calls] == sorted({done for done, _, _ in calls})
    assert calls[-1][0] == calls[-1][1] == sum(array.nbytes for array in model.params.values())
    assert {what for _, _, what in calls} == set(model.params)


def test_harmless_extras_are_ignored(tmp_path):
    params = write_model(tmp_path, "tiny-tied")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    extra["lm_head.weight"] = np.zeros((3, 3), np.float32)
    edit_tensors(tmp_path, lambda tensors: tensors.update(extra))
    np.testing.assert_array_equal(load_model(tmp_path, dtype="float32").params["embed"], params["embed"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing tensors: model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "missing tensors: lm_head.weight"),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.zeros(64, np.float32)}),
            "does not have: model.layers.0.self_attn.o_proj.bias",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(32, np.float32)}),
            r"wrong shape: model.norm.weight is \[32\], config says \[64\]",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(64, np.int8)}), "is I8; only float weights"),
        (
            lambda t: [t.pop(name) for name in list(t) if "q_proj" in name or "norm" in name],
            "missing tensors: .*, .*, .*, .* and 6 more",
        ),
    ],
)
def test_wrong_tensors(tmp_path, edit, message):
    write_model(tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_config(tmp_path, check_weights=True)
    assert load_config(tmp_path).hidden_size == 64


def test_damaged_files(tmp_path):
    write_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="damaged or not a safetensors file"):
        load_model(tmp_path)
    weights.write_bytes(whole)
    save_file({"model.norm.weight": np.ones(64, np.float32)}, tmp_path / "more.safetensors")
    with pytest.raises(ModelError, match=r"model.norm.weight is in both model.safetensors and more.safetensors"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json cannot be read as JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json must hold a JSON object"):
        load_model(tmp_path)


def test_pickles_are_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*.safetensors"):
        load_model(tmp_path)
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"x")
    for source in (tmp_path, pickle):
        with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle.*convert it to safetensors"):
            load_model(source)


def test_sources_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    write_model(tmp_path / "m")
    for source, message in [
        ("no/such/path", "no model at no/such/path: give a Hugging Face directory"),
        ("models/llama", "no model at models/llama"),
        ("org/model.gguf", "no model at org/model.gguf"),
        ("models", r"holds no model: looked for config.json.*\.gguf.*slora_model.json"),
        ("adapter", "adapter is a LoRA adapter, not a base model"),
        ("notes.txt", "neither a .gguf file nor a model directory"),
        ("m/model.safetensors", "single file of a model; give its directory, m"),
    ]:
        with pytest.raises(ModelError, match=message):
            load_model(source)


def test_hub_ids(tmp_path, monkeypatch):
    import huggingface_hub

    params = write_model(tmp_path / "cache")
    asked = []

    def fake(name, *, allow_patterns, **_):
        asked.append((name, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    model = load_model("org/tiny", dtype="float32")
    assert model.name == "org/tiny"
    np.testing.assert_array_equal(model.params["wo"], params["wo"])
    assert load_config("org/tiny") == model.config
    assert [name for name, _ in asked] == ["org/tiny"] * 2
    assert "*.safetensors" in asked[0][1] and "*.safetensors" not in asked[1][1]
    (tmp_path / "cache" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config.json"):
        load_model("org/tiny")

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ModelError, match=r"cannot download org/tiny .*\(no route to host\); check the id and the network"
    ):
        load_model("org/tiny")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([5, 6], 2, (5, 6)), (7, 2, (7,)), (None, [2, 3], (2, 3)), (None, None, ())],
)
def test_eos_token_ids(tmp_path, generation, config, expected):
    write_model(tmp_path, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_model(tmp_path).eos_token_ids == expected


def test_bad_eos_token_id(tmp_path):
    write_model(tmp_path, eos_token_id="</s>")
    with pytest.raises(ModelError, match="eos_token_id"):
        load_model(tmp_path)


LLAMA = hf_config(named_shape("tiny-llama"))
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = hf_config(named_shape("tiny-qwen2"))
QWEN3 = hf_config(named_shape("tiny-qwen3"))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 10000.0, RopeScaling(kind="linear", factor=2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            5e5,
            RopeScaling(
                kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
            ),
        ),
        (
            {"rope_parameters": LLAMA3 | {"rope_theta": 3e5}, "rope_theta": 1.0},
            3e5,
            RopeScaling(
                kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
            ),
        ),
    ],
)
def test_rope(fields, theta, scaling):
    raw = {key: value for key, value in LLAMA.items() if key != "rope_theta"} | fields
    config = config_from_hf(raw)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_defaults_of_old_llama_configs():
    raw = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim", "rms_norm_eps")}
    config = config_from_hf(raw | {"max_position_embeddings": None, "architectures": None})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.max_position) == (4, 16, 1e-6, 2048)


def test_mistral_without_a_window():
    assert config_from_hf(MISTRAL | {"sliding_window": None}).architecture == "MistralForCausalLM"
    assert config_from_hf(MISTRAL | {"sliding_window": 512}).max_position == 512
    assert config_from_hf(MISTRAL).max_position == 512  # transformers' default of 4096 covers it
    with pytest.raises(ModelError, match="sliding_window 4096 is smaller than max_position_embeddings 32768"):
        config_from_hf(MISTRAL | {"max_position_embeddings": 32768})


def test_qwen2_ignores_an_unused_window():
    assert config_from_hf(QWEN2 | {"sliding_window": 16, "use_sliding_window": False}).qkv_bias


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (LLAMA | {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported; supported are LlamaFor"),
        (LLAMA | {"architectures": None, "model_type": "mamba"}, "architecture mamba is not supported"),
        (LLAMA | {"architectures": ["LlamaForCausalLM", "X"]}, "LlamaForCausalLM, X is not supported"),
        (MISTRAL | {"sliding_window": 128}, "sliding_window 128 is smaller than"),
        (QWEN2 | {"use_sliding_window": True}, "use_sliding_window is not supported"),
        (QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        (LLAMA | {"attention_bias": True}, "attention_bias is not supported for LlamaForCausalLM"),
        (QWEN3 | {"attention_bias": True}, "attention_bias is not supported for Qwen3ForCausalLM"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias is not supported"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\) is not supported"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type yarn is not supported"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type dynamic is not supported"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor must be larger"),
        (LLAMA | {"rope_scaling": 2}, "rope_scaling must be an object"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters per layer type"),
        ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "hidden_size is missing"),
        (LLAMA | {"vocab_size": "many"}, "vocab_size must be a positive integer, not 'many'"),
        (LLAMA | {"rms_norm_eps": -1}, "rms_norm_eps must be a positive number"),
        (LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 2}, "num_heads 3 is not a multiple"),
        (LLAMA | {"num_attention_heads": 5, "head_dim": None}, "hidden_size 64 is not a multiple"),
        (LLAMA | {"head_dim": 2, "num_key_value_heads": 1}, "must be a multiple of 16"),
        (LLAMA | {"head_dim": 17, "num_attention_heads": 16, "num_key_value_heads": 16}, "head_dim 17 is odd"),
    ],
)
def test_refused_configs(raw, message):
    with pytest.raises(ModelError, match=message) as caught:
        config_from_hf(raw, "some/model")
    assert str(caught.value).startswith("some/model") and "\n" not in str(caught.value)
