"""`read_adapter`: an adapter from whatever a caller gives."""

from collections.abc import Mapping
import os
from typing import Any

from slora_jax.adapters.adapter import Adapter
from slora_jax.adapters.directory import AdapterReader, SourceErrors
from slora_jax.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig


def read_adapter(
    source: str | os.PathLike[str] | Mapping[Any, Any] | Adapter,
    config: ModelConfig,
    *,
    limits: AdapterLimits = DEFAULT_LIMITS,
) -> Adapter:
    """Reads and checks an adapter for a base model.

    source: a directory in PEFT's format; a Hugging Face id ``org/name[@revision]``; arrays with their settings,
    ``{"weights": pytree, "lora_alpha": 16, "use_rslora": False, "alpha_pattern": {}}``, the last two optional (see
    Adapter.from_arrays); or an Adapter, which is only checked against the model.
    No tensor is read before the configuration and the file's header have been checked against the model.
    Raises AdapterError, beginning with the source, that names what is refused, why, and the remedy.
    """
    if isinstance(source, str | os.PathLike):
        return AdapterReader(config, limits).read(source)
    with SourceErrors("weights given as arrays"):
        if isinstance(source, Adapter):
            source.check_fits(config)
            return source
        return _from_mapping(source, config, limits)


def _from_mapping(source: Mapping[Any, Any], config: ModelConfig, limits: AdapterLimits) -> Adapter:
    if "weights" not in source or "lora_alpha" not in source:
        raise AdapterError(
            'give {"weights": pytree, "lora_alpha": number}; the scaling cannot be known from weights alone'
        )
    unknown = sorted(str(key) for key in source.keys() - {"weights", "lora_alpha", "use_rslora", "alpha_pattern"})
    if unknown:
        raise AdapterError(
            f"unknown key {unknown[0]!r}; the keys are weights, lora_alpha, use_rslora and alpha_pattern"
        )
    settings = {key: value for key, value in source.items() if key != "weights"}
    return Adapter.from_arrays(source["weights"], config, limits=limits, **settings)
