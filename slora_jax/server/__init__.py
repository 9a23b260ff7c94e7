"""The HTTP server: OpenAI's API, S-LoRA's and vLLM's adapter calls before one Engine. Needs the extra ``server``."""

from slora_jax.server.app import create_app
from slora_jax.server.config import ServerConfig
from slora_jax.server.service import Service

__all__ = ["ServerConfig", "Service", "create_app"]
