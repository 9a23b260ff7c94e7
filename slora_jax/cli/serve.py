"""``slora-jax serve``."""

import argparse
from pathlib import Path
from typing import Any, Literal

import jax

from slora_jax.cli.options import engine_options, require_server
from slora_jax.engine import Engine
from slora_jax.engine_config import EngineConfig

_WARM_UP: dict[str, bool | Literal["greedy"]] = {"all": True, "greedy": "greedy", "none": False}


def run(args: argparse.Namespace) -> int:
    require_server()
    from slora_jax.server import ServerConfig, Service
    from slora_jax.server.serve import run as run_server

    config = ServerConfig(
        model_name=args.model_name or default_name(args.model),
        host=args.host,
        port=args.port,
        adapters=_path(args.adapters),
        load_root=_path(args.load_root),
        registry=_path(args.registry),
        api_keys=_path(args.api_keys),
        allow_anonymous=args.allow_anonymous,
        max_loads_per_minute=args.max_loads_per_minute,
        max_queue=args.max_queue,
        max_answer_tokens=args.max_answer_tokens,
        warm_up=_WARM_UP[args.warm_up],
        drain_seconds=args.drain_seconds,
        traces=args.traces,
    )
    policy, policy_options = sharing(args)
    settings = EngineConfig(
        **engine_options(args),
        policy=policy,
        policy_options=policy_options,
        prompt_gap=args.prompt_gap,
        max_lora_rank=args.max_lora_rank,
        lora_targets=args.lora_targets,
        embeddings=args.embeddings,
        # else the adapters, which are read later, say up to which rank steps are compiled
        warm_up=config.warm_up if args.max_lora_rank is not None else False,
        seq_buckets=_sizes(args.seq_buckets),
        token_buckets=_sizes(args.token_buckets),
    )
    if jax.distributed.is_initialized() and jax.process_index():  # only process 0 has callers
        Engine.from_pretrained(args.model, settings)  # runs its steps and ends this process after the last
    service = Service(config, lambda: Engine.from_pretrained(args.model, settings))
    run_server(service, log_level=args.log_level.upper())
    return 0


def sharing(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Policy and its options: where there are keys, each gets its share."""
    from slora_jax.server.keys import read_keys

    policy = args.policy or ("fair" if args.api_keys else "fcfs")
    options = dict(args.policy_option)
    if policy == "fair" and args.api_keys and options.get("by", "tenant") == "tenant":
        options.setdefault("weights", {key.name: key.weight for key in read_keys(Path(args.api_keys))})
    return policy, options


def default_name(model: str) -> str:
    """The base model's name in the API: a Hub id as it is, of a path its last part, so that no path is shown."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _sizes(given: list[int] | None) -> tuple[int, ...] | None:
    return tuple(given) if given else None


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
