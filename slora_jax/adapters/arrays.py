"""Adapters given as a pytree of arrays, straight from a trainer. Three forms are understood:

- flat, PEFT's names: ``{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": A, ...}``;
- nested, by layer: ``{0: {"q": {"a": A, "b": B}, ...}, ...}``, a layer key being ``0``, ``"0"`` or ``"layers.0"``;
- stacked over all layers: ``{"q": {"a": [L, rank, in], "b": [L, out, rank]}, ...}``.

A is ``[rank, inputs]`` and B ``[outputs, rank]`` as in PEFT, float32, float16 or bfloat16, numpy or jax.
Modules are q, k, v, o, gate, up, down, or PEFT's names for them (``q_proj`` and so on).
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from pallas_kernels.geometry import MODULES
from slora_jax.adapters.targets import MODULE_NAMES
from slora_jax.adapters.tensors import Key, parse_names
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig

_LAYER = re.compile(r"(?:layers\.)?(\d{1,6})")


def flatten(arrays: Mapping[Any, Any], config: ModelConfig) -> dict[Key, tuple[str, np.ndarray]]:
    """A pytree in one of the three forms to ``{(layer, module, factor): (name in the pytree, host array)}``.

    Shapes and dtypes are not checked here. Raises AdapterError for a pytree of another form.
    """
    if not arrays:
        raise AdapterError("the pytree of weights is empty; give at least one projection's a and b")
    if any(isinstance(key, str) and ".lora_" in key for key in arrays):
        if not all(isinstance(key, str) for key in arrays):
            raise AdapterError("the pytree mixes PEFT's tensor names with other keys; give one form only")
        return {key: (name, _host(arrays[name], name)) for key, name in parse_names(arrays, config).items()}
    if all(key in MODULE_NAMES for key in arrays):
        return _stacked(arrays, config)
    return _nested(arrays, config)


def _nested(arrays: Mapping[Any, Any], config: ModelConfig) -> dict[Key, tuple[str, np.ndarray]]:
    result: dict[Key, tuple[str, np.ndarray]] = {}
    for layer_key, modules in arrays.items():
        match = _LAYER.fullmatch(str(layer_key))
        if match is None or not isinstance(modules, Mapping):
            raise AdapterError(
                f"key {layer_key!r} is neither a layer (0 or 'layers.0'), a module ({', '.join(MODULES)}) nor a PEFT "
                "tensor name"
            )
        layer = int(match[1])
        if layer >= config.num_layers:
            raise AdapterError(f"layer {layer_key!r}: this base model has only {config.num_layers} layers")
        for module, factors in modules.items():
            where = f"[{layer_key!r}][{module!r}]"
            for factor, array in enumerate(_factors(module, factors, where)):
                key = (layer, MODULE_NAMES[module], factor)
                if key in result:
                    raise AdapterError(f"{where} and {result[key][0]} stand for the same weight; give it once")
                result[key] = (f"{where}[{'ab'[factor]!r}]", array)
    return result


def _stacked(arrays: Mapping[Any, Any], config: ModelConfig) -> dict[Key, tuple[str, np.ndarray]]:
    result: dict[Key, tuple[str, np.ndarray]] = {}
    for module, factors in arrays.items():
        for factor, array in enumerate(_factors(module, factors, f"[{module!r}]")):
            name = f"[{module!r}][{'ab'[factor]!r}]"
            if array.ndim != 3 or array.shape[0] != config.num_layers:
                raise AdapterError(
                    f"{name} has shape {list(array.shape)}; stacked weights have 3 axes, the first of "
                    f"{config.num_layers} layers"
                )
            for layer in range(config.num_layers):
                key = (layer, MODULE_NAMES[module], factor)
                if key in result:
                    raise AdapterError(f"{name} and {result[key][0]} stand for the same weight; give it once")
                result[key] = (name, array[layer])
    return result


def _factors(module: Any, factors: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    if module not in MODULE_NAMES:
        raise AdapterError(f"{where} is not a projection; modules are {', '.join(MODULES)}")
    if not isinstance(factors, Mapping) or factors.keys() != {"a", "b"}:
        raise AdapterError(f'{where} must hold exactly "a" [rank, inputs] and "b" [outputs, rank]')
    return _host(factors["a"], f"{where}['a']"), _host(factors["b"], f"{where}['b']")


def _host(array: Any, name: str) -> np.ndarray:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise AdapterError(f"{name} is {type(array).__name__}, not an array; give numpy or jax arrays")
    if not getattr(array, "is_fully_addressable", True):
        raise AdapterError(
            f"{name} is spread over several hosts; gather it first (jax.experimental.multihost_utils.process_allgather)"
        )
    return np.asarray(array)
