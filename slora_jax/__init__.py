"""slora-jax: one base model, thousands of LoRA adapters, all in the same batch.

Names are imported when they are first used (PEP 562): importing jax takes over a second, which ``slora-jax --help``
need not wait.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slora_jax.adapters import Adapter, read_adapter
    from slora_jax.batch import Batch, Output, Sampling, State
    from slora_jax.engine import Engine
    from slora_jax.engine_config import EngineConfig
    from slora_jax.errors import AdapterError, CapacityError, ModelError, RequestError, SloraError
    from slora_jax.model_config import ModelConfig, RopeScaling, param_specs
    from slora_jax.policies import Quota
    from slora_jax.requests import (
        Completion,
        Delta,
        EmbeddingOutput,
        EmbeddingRequest,
        Request,
        RequestOutput,
        Timings,
        TokenLogprob,
    )
    from slora_jax.sampling_params import SamplingParams
    from slora_jax.step import compiler_options, make_batch_step, make_forward
    from slora_jax.structured import StructuredOutput

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterError",
    "Batch",
    "CapacityError",
    "Completion",
    "Delta",
    "EmbeddingOutput",
    "EmbeddingRequest",
    "Engine",
    "EngineConfig",
    "ModelConfig",
    "ModelError",
    "Output",
    "Quota",
    "Request",
    "RequestError",
    "RequestOutput",
    "RopeScaling",
    "Sampling",
    "SamplingParams",
    "SloraError",
    "State",
    "Timings",
    "TokenLogprob",
    "StructuredOutput",
    "compiler_options",
    "make_batch_step",
    "make_forward",
    "param_specs",
    "read_adapter",
]

_MODULES = {
    "adapters": ("Adapter", "read_adapter"),
    "batch": ("Batch", "Output", "Sampling", "State"),
    "engine": ("Engine",),
    "engine_config": ("EngineConfig",),
    "errors": ("AdapterError", "CapacityError", "ModelError", "RequestError", "SloraError"),
    "model_config": ("ModelConfig", "RopeScaling", "param_specs"),
    "policies": ("Quota",),
    "requests": (
        "Completion",
        "Delta",
        "EmbeddingOutput",
        "EmbeddingRequest",
        "Request",
        "RequestOutput",
        "Timings",
        "TokenLogprob",
    ),
    "sampling_params": ("SamplingParams",),
    "structured": ("StructuredOutput",),
    "step": ("compiler_options", "make_batch_step", "make_forward"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
