"""slora-jax: one base model, thousands of LoRA adapters, all in the same batch."""

from slora_jax.adapters import Adapter, read_adapter
from slora_jax.batch import Batch, Output, Sampling, State
from slora_jax.engine import Engine
from slora_jax.engine_config import EngineConfig
from slora_jax.errors import AdapterError, CapacityError, ModelError, RequestError, SloraError
from slora_jax.model_config import ModelConfig, RopeScaling, param_specs
from slora_jax.requests import Completion, Delta, Request, RequestOutput, Timings, TokenLogprob
from slora_jax.sampling_params import SamplingParams
from slora_jax.step import make_batch_step, make_forward

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterError",
    "Batch",
    "CapacityError",
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "ModelConfig",
    "ModelError",
    "Output",
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
    "make_batch_step",
    "make_forward",
    "param_specs",
    "read_adapter",
]
