"""Writes an adapter as a PEFT directory."""

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pallas_kernels.geometry import MODULES
from slora_jax.adapters.adapter import Adapter
from slora_jax.adapters.source import CONFIG_FILE, WEIGHTS_FILE
from slora_jax.adapters.targets import projection_name
from slora_jax.adapters.weights import tensor_name


def save_adapter(adapter: Adapter, directory: str | os.PathLike[str]) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors, which read_adapter reads back to the same digest.

    Each file is replaced as a whole; whoever reads between the two finds them not to belong together. Alphas are
    written as the float32 scaling times the rank. Returns the directory, which is made if it is not there.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    alphas = {
        projection_name(layer, module): float(np.float64(adapter.scaling[layer, module]) * adapter.ranks[layer, module])
        for layer, module in np.argwhere(adapter.ranks).tolist()
    }
    ranks = {projection_name(*place): int(adapter.ranks[*place]) for place in np.argwhere(adapter.ranks).tolist()}
    rank, alpha = adapter.max_rank, next(iter(alphas.values()))
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "base_model_name_or_path": adapter.base_model,
    }
    tensors = {}
    for layer, module, factor in adapter.weights.keys():
        get = adapter.b if factor else adapter.a
        tensors[tensor_name(layer, module, factor)] = get(layer, MODULES[module])
    scratch = path / f".{WEIGHTS_FILE}.new"
    save_file(tensors, scratch)
    os.replace(scratch, path / WEIGHTS_FILE)
    scratch = path / f".{CONFIG_FILE}.new"
    scratch.write_text(json.dumps(fields))
    os.replace(scratch, path / CONFIG_FILE)
    return path
