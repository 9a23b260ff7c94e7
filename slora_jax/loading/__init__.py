"""Base models from Hugging Face directories and ids, GGUF files, Orbax directories, or made at random."""

from slora_jax.loading.load import LoadedModel, load_config, load_model
from slora_jax.loading.orbax import save_orbax
from slora_jax.loading.random import random_params

__all__ = ["LoadedModel", "load_config", "load_model", "random_params", "save_orbax"]
