"""LoRA adapters on the host: read PEFT's files or arrays, check them, and lay them out for the page pool."""

from slora_jax.adapters.adapter import Adapter, read_adapter
from slora_jax.adapters.limits import AdapterLimits
from slora_jax.adapters.synthetic import clone, random_adapter

__all__ = ["Adapter", "AdapterLimits", "clone", "random_adapter", "read_adapter"]
