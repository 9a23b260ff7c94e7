"""Checks that the tensors at hand are exactly those that the configuration promises, before any of them is read."""

from collections.abc import Iterable, Mapping
import re

import numpy as np

from pallas_kernels.geometry import MODULES
from slora_jax.adapters.messages import shown
from slora_jax.adapters.targets import HF_MODULES
from slora_jax.adapters.weights import WEIGHT_DTYPES, tensor_name
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig

Key = tuple[int, int, int]
"""(layer, module, factor): factor 0 is A, 1 is B."""

_INDEX = {name: module for module, name in enumerate(HF_MODULES)}
_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d{1,6})\.(?P<module>(?:self_attn|mlp)\.\w+_proj)"
    r"\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
# What a foreign tensor gives away about the adapter: part of its name -> what is behind it.
_SIGNS = {
    "lora_magnitude_vector": "DoRA magnitudes; merge it into the base model with PEFT, or train without use_dora",
    "lora_embedding_": "a LoRA on the embedding; target only linear projections",
    "modules_to_save": "a replaced module; train without modules_to_save",
    "embed_tokens": "a replaced or resized embedding; train without new tokens",
    "lm_head": "a changed output head; target only linear projections",
    "token_adapter": "trained token embeddings; train without trainable_token_indices",
    ".bias": 'a trained bias; train with bias="none" and lora_bias=false',
    "lora_diag": "a KaSA diagonal; merge the adapter into the base model with PEFT",
    "base_layer": "base weights; save the adapter with PEFT's save_pretrained",
}


def parse_names(names: Iterable[str], config: ModelConfig) -> dict[Key, str]:
    """PEFT's tensor names to their place, with or without the adapter's own name in them (``lora_A.default.weight``).

    Raises AdapterError for a name that is not one of this model's projections, or for two names of one place.
    """
    found: dict[Key, str] = {}
    adapters = set()
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in _INDEX:
            sign = next(
                (what for part, what in _SIGNS.items() if part in name),
                "a tensor that no supported configuration explains",
            )
            raise AdapterError(f"unexpected tensor {shown(name, 160)}: {sign}")
        layer = int(match["layer"])
        if layer >= config.num_layers:
            raise AdapterError(
                f"unexpected tensor {shown(name, 160)}: this base model has only {config.num_layers} layers; the "
                "adapter is for another base model"
            )
        key = (layer, _INDEX[match["module"]], "AB".index(match["factor"]))
        adapters.add(match["adapter"])
        if key in found:
            raise AdapterError(
                f"tensors {shown(found[key], 160)} and {shown(name, 160)} stand for the same weight; "
                "save one adapter a file"
            )
        found[key] = name
    if len(adapters) > 1:
        names = shown(", ".join(sorted(map(str, adapters))))
        raise AdapterError(f"tensors of several adapters in one file ({names}); save one adapter a file")
    return found


def check_complete(found: Mapping[Key, str], ranks: np.ndarray, base_model: str | None) -> None:
    """Every targeted projection (rank > 0 in `ranks` [L, 7]) has A and B, and no other has any.

    Raises AdapterError naming one that differs.
    """
    expected = {(int(layer), int(module), factor) for layer, module in np.argwhere(ranks) for factor in (0, 1)}
    extra = sorted(found.keys() - expected)
    if extra:
        raise AdapterError(
            f"unexpected tensor {shown(found[extra[0]], 160)}{_more(extra)}: target_modules, exclude_modules and "
            "layers_to_transform do not name its module; the file and adapter_config.json do not belong together"
        )
    missing = sorted(expected - found.keys())
    if missing:
        raise AdapterError(
            f"tensor {tensor_name(*missing[0])} is missing{_more(missing)}; the file is incomplete, or the adapter is "
            "for another base model" + _named(base_model)
        )


def check_tensor(
    name: str,
    key: Key,
    shape: tuple[int, ...],
    dtype: np.dtype,
    ranks: np.ndarray,
    config: ModelConfig,
    base_model: str | None,
) -> None:
    """One tensor's dtype and shape against the ranks [L, 7] and the model's widths.

    Raises AdapterError with both shapes and the likely cause. name: how the message calls the tensor.
    """
    if dtype not in WEIGHT_DTYPES:
        raise AdapterError(f"{name} has dtype {dtype}; cast it to float32, float16 or bfloat16")
    layer, module, factor = key
    rank = int(ranks[layer, module])
    expected = (rank, config.in_sizes[module]) if factor == 0 else (config.out_sizes[module], rank)
    if shape == expected:
        return
    width = expected[1 - factor]
    if len(shape) == 2 and shape[factor] == width and shape[1 - factor] != width:
        cause = "its axes look swapped; A is [rank, inputs] and B is [outputs, rank]"
    elif len(shape) == 2 and shape[factor] == rank:
        side = "inputs" if factor == 0 else "outputs"
        cause = (
            f"{MODULES[module]}_proj of this base model has {width} {side}; the adapter is for another base model"
            + _named(base_model)
        )
    elif len(shape) == 2 and shape[1 - factor] == width:
        cause = f"its rank is {shape[factor]}, not {rank}; A, B and the configuration must agree on it"
    else:
        cause = f"the adapter is for another base model{_named(base_model)}, or the tensor is damaged"
    raise AdapterError(f"{name} has shape {list(shape)}, expected {list(expected)}: {cause}")


def _more(keys: list[Key]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _named(base_model: str | None) -> str:
    return f" (it names {shown(base_model)})" if base_model else ""
