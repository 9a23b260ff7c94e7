"""Models in Hugging Face's format, written by hand from random parameters."""

import json

import numpy as np
from safetensors.numpy import save_file

from slora_jax.loading import random_params
from slora_jax.model_config import ModelConfig
from slora_jax.shapes import named_shape

MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


def hf_config(config: ModelConfig) -> dict:
    raw = {
        "architectures": [config.architecture],
        "model_type": MODEL_TYPES[config.architecture],
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "eos_token_id": 2,
    }
    if config.rope_scaling:
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return raw


def hf_tensors(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """The tensors as transformers names them, [out, in]; written out here by hand, not from the loader's table."""
    p = {name: np.asarray(array) for name, array in params.items()}
    q, kv, f = config.q_size, config.kv_size, config.mlp_size
    tensors = {"model.embed_tokens.weight": p["embed"], "model.norm.weight": p["final_norm"]}
    if not config.tied_embeddings:
        tensors["lm_head.weight"] = p["lm_head"]
    for i in range(config.num_layers):
        at = f"model.layers.{i}."
        tensors |= {
            at + "input_layernorm.weight": p["attn_norm"][i],
            at + "post_attention_layernorm.weight": p["mlp_norm"][i],
            at + "self_attn.q_proj.weight": p["wqkv"][i, :, :q].T,
            at + "self_attn.k_proj.weight": p["wqkv"][i, :, q : q + kv].T,
            at + "self_attn.v_proj.weight": p["wqkv"][i, :, q + kv :].T,
            at + "self_attn.o_proj.weight": p["wo"][i].T,
            at + "mlp.gate_proj.weight": p["wgu"][i, :, :f].T,
            at + "mlp.up_proj.weight": p["wgu"][i, :, f:].T,
            at + "mlp.down_proj.weight": p["wdown"][i].T,
        }
        if config.qkv_bias:
            tensors[at + "self_attn.q_proj.bias"] = p["bqkv"][i, :q]
            tensors[at + "self_attn.k_proj.bias"] = p["bqkv"][i, q : q + kv]
            tensors[at + "self_attn.v_proj.bias"] = p["bqkv"][i, q + kv :]
        if config.qk_norm:
            tensors[at + "self_attn.q_norm.weight"] = p["q_norm"][i]
            tensors[at + "self_attn.k_norm.weight"] = p["k_norm"][i]
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def write_model(path, shape="tiny-gqa", *, tensors=None, **changes):
    """A model directory of a named shape; ``changes`` go into config.json (None removes a field). Returns params."""
    config = named_shape(shape)
    params = random_params(config, seed=7, dtype="float32")
    path.mkdir(exist_ok=True)
    raw = {key: value for key, value in (hf_config(config) | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(raw))
    save_file(hf_tensors(config, params) if tensors is None else tensors, path / "model.safetensors")
    return params
