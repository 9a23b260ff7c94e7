"""Settings of a server."""

import dataclasses
import ipaddress
from pathlib import Path
from typing import Literal

from slora_jax.errors import SloraError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server. Times are in seconds, sizes in bytes.

    model_name: the base model's name in the API; adapters are called by their own names.
    adapters: directory whose subdirectories are adapters, named as they are; it is watched every `scan_seconds`.
    load_root: directory under which POST /v1/load_lora_adapter may name adapters; None refuses that call.
    registry: file that remembers what was loaded and unloaded through the API; None forgets it with the process.
    api_keys: file of API keys, see keys.py; None lets everybody in, which is allowed on loopback only, unless
        `allow_anonymous`, and then without the administrator's calls.
    max_body: largest request body. header_seconds, body_seconds: longest times to send a request's headers, its body.
        write_seconds: longest time for which a client may leave its answer unread.
    max_prompts, max_completions: prompts in a call, and prompts times n. max_answer_tokens: tokens of an answer.
    max_inputs: inputs in a call for embeddings, of which max_prompts are computed at a time.
    max_queue: completions that wait for the engine, beyond what it runs at once, before callers are sent away with 429.
    max_adapters: adapters registered at the same time. max_loads_per_minute: calls that load an adapter, each of which
        reads one whole.
    warm_up: compile every step shape after the adapters were read and before the first call is taken; "greedy": only
        what requests that take the likeliest token need.
    traces: send OpenTelemetry traces.
    drain_seconds: how long a shutdown waits for answers in flight.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    adapters: Path | None = None
    load_root: Path | None = None
    registry: Path | None = None
    api_keys: Path | None = None
    allow_anonymous: bool = False
    scan_seconds: float = 2.0
    max_body: int = 4 << 20
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    max_prompts: int = 64
    max_completions: int = 128
    max_inputs: int = 2048
    max_answer_tokens: int = 4096
    max_queue: int = 256
    max_adapters: int = 200_000
    max_loads_per_minute: float = 600.0
    warm_up: bool | Literal["greedy"] = False
    traces: bool = False
    drain_seconds: float = 30.0

    def __post_init__(self):
        for name in ("max_body", "max_prompts", "max_completions", "max_inputs", "max_answer_tokens", "max_adapters"):
            if getattr(self, name) < 1:
                raise SloraError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_queue < 0:
            raise SloraError(f"max_queue must be 0 or more, not {self.max_queue}")
        for name in ("scan_seconds", "header_seconds", "body_seconds", "write_seconds", "max_loads_per_minute"):
            if not getattr(self, name) > 0:
                raise SloraError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("adapters", "load_root"):
            path = getattr(self, name)
            if path is not None and not path.is_dir():
                raise SloraError(f"{name}: {path} is no directory; give one that exists")
        if self.api_keys is None and not self.on_loopback and not self.allow_anonymous:
            raise SloraError(
                f"{self.host} can be reached from other machines: give --api-keys FILE (slora-jax key makes one), "
                "or --allow-anonymous to let everybody ask"
            )

    @property
    def on_loopback(self) -> bool:
        """Whether the server listens to this machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
