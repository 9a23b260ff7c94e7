"""Named model shapes for random weights: published models, S-LoRA's two synthetic ones, tiny ones for tests."""

import dataclasses

from slora_jax.errors import ModelError
from slora_jax.model_config import ModelConfig, RopeScaling

_LLAMA_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    mlp_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    norm_eps=1e-6,
    max_position=2048,
)
_LLAMA_2_7B = dataclasses.replace(_LLAMA_7B, norm_eps=1e-5, max_position=4096)
_LLAMA_31_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    mlp_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    norm_eps=1e-5,
    max_position=131072,
)
_TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    mlp_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    norm_eps=1e-5,
    max_position=512,
)
_TINY_GQA = dataclasses.replace(_TINY, num_layers=3, num_kv_heads=2, rope_theta=500000.0)

SHAPES: dict[str, ModelConfig] = {
    "llama-7b": _LLAMA_7B,
    "llama-2-7b": _LLAMA_2_7B,
    "llama-2-13b": dataclasses.replace(
        _LLAMA_2_7B, hidden_size=5120, mlp_size=13824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
    "llama-3.1-8b": _LLAMA_31_8B,
    "llama-3.1-70b": dataclasses.replace(_LLAMA_31_8B, hidden_size=8192, mlp_size=28672, num_layers=80, num_heads=64),
    # The "30B" and "70B" of S-LoRA's experiments (mprophet/model_config.py): not the official models, no GQA.
    "llama-30b-m": dataclasses.replace(
        _LLAMA_7B, hidden_size=7168, mlp_size=19456, num_layers=48, num_heads=56, num_kv_heads=56
    ),
    "llama-70b-m": dataclasses.replace(
        _LLAMA_7B, hidden_size=8192, mlp_size=24576, num_layers=80, num_heads=64, num_kv_heads=64
    ),
    "tiny-llama": _TINY,
    "tiny-gqa": dataclasses.replace(_TINY_GQA, rope_scaling=RopeScaling(kind="llama3", factor=8.0)),
    "tiny-qwen2": dataclasses.replace(_TINY_GQA, architecture="Qwen2ForCausalLM", qkv_bias=True, num_layers=2),
    # As in Qwen3, the heads together are wider than the hidden state.
    "tiny-qwen3": dataclasses.replace(
        _TINY_GQA, architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=32, num_layers=2
    ),
    "tiny-tied": dataclasses.replace(_TINY_GQA, tied_embeddings=True, vocab_size=128, num_layers=2),
}
"""Every named shape, by the name used in ``random:<name>``."""


def named_shape(name: str) -> ModelConfig:
    """The configuration of a named shape.

    Raises ModelError, listing the names, where there is none called ``name``.
    """
    if name not in SHAPES:
        raise ModelError(f"no model shape is called {name!r}; choose one of: {', '.join(SHAPES)}")
    return SHAPES[name]
