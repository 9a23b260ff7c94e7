"""PEFT directories written by hand, for tests of reading them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from slora_jax.model_config import ModelConfig

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, mlp_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
"""The base model of the adapter tests: q and o 32 -> 32, k and v 32 -> 16, gate and up 32 -> 48, down 48 -> 32."""

MODULES = ("q", "k", "v", "o", "gate", "up", "down")


def tensor_name(layer: int, module: str, factor: str) -> str:
    block = "self_attn" if module in ("q", "k", "v", "o") else "mlp"
    return f"base_model.model.model.layers.{layer}.{block}.{module}_proj.lora_{factor}.weight"


def qv_tensors(rank: int = 4, dtype: Any = np.float32, config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    """A and B of q and v in every layer."""
    rng = np.random.default_rng(7)
    tensors = {}
    for layer in range(config.num_layers):
        for module in ("q", "v"):
            i = MODULES.index(module)
            tensors[tensor_name(layer, module, "A")] = rng.normal(size=(rank, config.in_sizes[i])).astype(dtype)
            tensors[tensor_name(layer, module, "B")] = rng.normal(size=(config.out_sizes[i], rank)).astype(dtype)
    return tensors


def qv_fields(**changes: Any) -> dict[str, Any]:
    """Configuration that fits qv_tensors()."""
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes}


def write_adapter(
    directory: Path, fields: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | bytes | None = None
) -> Path:
    """Writes a directory that is right unless something else is given. tensors: by name, or the bytes of the file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(qv_fields() if fields is None else fields))
    data = save(qv_tensors()) if tensors is None else tensors if isinstance(tensors, bytes) else save(tensors)
    (directory / "adapter_model.safetensors").write_bytes(data)
    return directory
