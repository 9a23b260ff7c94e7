"""LoRA adapters on the host: read PEFT's files or arrays, check them, and lay them out for the page pool."""

from slora_jax.adapters.adapter import Adapter
from slora_jax.adapters.directory import AdapterFiles, AdapterReader
from slora_jax.adapters.limits import AdapterLimits
from slora_jax.adapters.read import read_adapter
from slora_jax.adapters.save import save_adapter
from slora_jax.adapters.shape import AdapterShape
from slora_jax.adapters.synthetic import clone, random_adapter

__all__ = [
    "Adapter",
    "AdapterFiles",
    "AdapterLimits",
    "AdapterReader",
    "AdapterShape",
    "clone",
    "random_adapter",
    "read_adapter",
    "save_adapter",
]
