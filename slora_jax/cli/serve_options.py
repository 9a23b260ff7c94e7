"""Options of ``slora-jax serve``, and of the engine for every command that has one."""

import argparse

from slora_jax.cli.options import add_policy_options, byte_size
from slora_jax.cli.workload_options import many


def serve_options(parser: argparse.ArgumentParser) -> None:
    """Adds what the server takes beside the model."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen to (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    parser.add_argument("--model-name", metavar="NAME", help="name of the base model in the API (default: from MODEL)")
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--adapters",
        metavar="DIR",
        help="directory whose subdirectories are adapters, named as they are; it is watched while the server runs",
    )
    adapters.add_argument(
        "--load-root",
        metavar="DIR",
        help="directory under which POST /v1/load_lora_adapter may name adapters (default: the call is refused)",
    )
    adapters.add_argument(
        "--max-loads-per-minute",
        type=float,
        default=600.0,
        metavar="X",
        help="calls that load adapters before they get 429 (default: 600)",
    )
    adapters.add_argument("--registry", metavar="FILE", help="remembers what was loaded and unloaded over HTTP")
    adapters.add_argument("--max-lora-rank", type=int, metavar="N", help="largest rank (default: as adapters come)")
    adapters.add_argument(
        "--lora-targets",
        type=many(str),
        metavar="NAMES",
        help="modules that adapters may target, for instance q,k,v,o; fewer make faster steps and a shorter start "
        "(default: all)",
    )
    access = parser.add_argument_group("callers")
    access.add_argument(
        "--api-keys", metavar="FILE", help="API keys, see slora-jax key (default: none are needed on this machine)"
    )
    access.add_argument(
        "--allow-anonymous", action="store_true", help="let everybody ask who can reach the server, without keys"
    )
    access.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="answers that may wait before callers get 429"
    )
    access.add_argument("--max-answer-tokens", type=int, default=4096, metavar="N", help="longest answer, in tokens")
    access.add_argument(
        "--policy",
        metavar="NAME",
        help="who goes first: fcfs, cluster, early-abort, fair, gather or priority "
        "(default: fair with --api-keys, else fcfs)",
    )
    add_policy_options(access)
    operation = parser.add_argument_group("operation")
    operation.add_argument("--drain-seconds", type=float, default=30.0, metavar="X", help="longest wait at a shutdown")
    operation.add_argument("--traces", action="store_true", help="send OpenTelemetry traces (extra otel)")
    operation.add_argument(
        "--warm-up",
        choices=("all", "greedy", "none"),
        default="all",
        help="what is compiled at start: everything, only what requests that take the likeliest token need, or "
        "nothing; the rest when it is first needed (default: all)",
    )
    for name, of in (("seq", "sequences in steps that decode"), ("token", "tokens in steps with prompts")):
        operation.add_argument(
            f"--{name}-buckets",
            type=many(int),
            metavar="N,N",
            help=f"sizes that are compiled, of {of}, the largest last; fewer make a shorter start and more padding",
        )
    operation.add_argument(
        "--embeddings",
        action="store_true",
        help="compile what /v1/embeddings needs at start, too (default: when it is first called)",
    )
    operation.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def engine_group(parser: argparse.ArgumentParser) -> None:
    """Adds the options that become fields of EngineConfig, see `engine_options`."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="compute type (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt plus answer, in tokens")
    group.add_argument("--max-seqs", type=int, metavar="N", help="answers generated at the same time at most")
    group.add_argument(
        "--page-pool",
        type=byte_size,
        metavar="SIZE",
        help="memory for KV cache and adapters, for instance 512M or 40G (default: what the GPU has free, 1G on a CPU)",
    )
    group.add_argument(
        "--host-adapter-bytes",
        type=byte_size,
        metavar="SIZE",
        help="host memory for adapters, ready to be copied to pages (default: half of what is free, 48G at most)",
    )
    group.add_argument(
        "--adapter-chunk-bytes",
        type=byte_size,
        metavar="SIZE",
        help="of an adapter that one copy to the device moves (default: 64M)",
    )
    group.add_argument(
        "--adapter-step-bytes",
        type=byte_size,
        metavar="SIZE",
        help="of adapters that are copied at most beside a step in which other requests run (default: 128M)",
    )
    group.add_argument(
        "--few-adapters",
        action="store_true",
        help="compile small steps once more, for adapters of 128 ranks or less in all",
    )
    group.add_argument(
        "--deterministic", action="store_true", help="the same answers bit for bit whatever else runs; slower"
    )
    group.add_argument(
        "--tp", type=int, metavar="N", default=1, help="devices that the model is spread over (default: 1)"
    )
    group.add_argument(
        "--lora-layout",
        choices=("auto", "s-lora", "comm-free"),
        default="auto",
        help="how adapters are cut for several devices (default: the cheaper one for each group of projections)",
    )
    group.add_argument("--quiet", action="store_true", help="show no progress")
