"""Options of ``slora-jax simulate`` and ``slora-jax bench``: the workload, the model and adapters, the engine."""

import argparse
from collections.abc import Callable
from typing import Any

from slora_jax.cli.options import add_policy_options, byte_size

TRACE_HELP = (
    "A row of a trace is an object with arrival (seconds), prompt_len, output_len (tokens) and adapter (an index,\n"
    "or null for the base model), and, if wanted, tenant, priority and prefix_len (tokens that the prompts of an\n"
    "adapter begin with)."
)
WORKLOADS = ("trace", "overhead", "churn", "noisy", "prefixes", "replace")
SYSTEMS = ("slora-jax", "no-adapters", "merged", "fixed-slots", "ragged-dot", "one-hot", "peft")


def simulate_options(parser: argparse.ArgumentParser) -> None:
    _workload(parser, one)
    model = _model(parser)
    model.add_argument("--cost", metavar="FILE", help="cost model in JSON, see docs/scheduling.md (default: the floor)")
    model.add_argument(
        "--calibrate",
        metavar="FILE",
        help="fit the cost model to the steps in a result of slora-jax bench, and take its model, adapters, pool and "
        "limits where no option says otherwise",
    )
    _engine(parser)
    _output(parser)


def bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workload",
        nargs="?",
        default="trace",
        choices=WORKLOADS,
        help="trace (default); overhead: fixed batches; churn: more adapters than fit; noisy: a tenant at ten times "
        "the rate; prefixes: shared beginnings; replace: new contents under old names",
    )
    _workload(parser, many)
    _model(parser)
    engine = _engine(parser)
    engine.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    engine.add_argument("--max-model-len", type=int, metavar="N", help="default: what the workload needs")
    engine.add_argument(
        "--implementation", choices=("auto", "mosaic", "xla"), default="auto", help="kernels (default: auto)"
    )
    systems = parser.add_argument_group("systems", "What is measured; see benchmarks/serving/README.md.")
    systems.add_argument("--system", choices=SYSTEMS, default="slora-jax", help="default: slora-jax")
    systems.add_argument(
        "--compare",
        type=many(_system),
        default=[],
        metavar="NAMES",
        help=f"others to measure afterwards, each in a process of its own: {', '.join(SYSTEMS[1:])}",
    )
    systems.add_argument("--slots", type=int, default=64, metavar="N", help="of fixed-slot systems (default: 64)")
    out = _output(parser)
    out.add_argument("--plots", metavar="DIR", help="draw plots as PNG (needs the extra bench)")
    out.add_argument("--twin", action="store_true", help="print the floor only: simulate, measure nothing")
    out.add_argument("--quiet", action="store_true", help="show no progress")


def one(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return kind


def many(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Type of a list of `kind`, separated by commas."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {_NAMES.get(kind, 'values')}") from None

    return parse


_NAMES: dict[Callable[[str], Any], str] = {int: "integers", float: "numbers"}


def _system(text: str) -> str:
    if text not in SYSTEMS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SYSTEMS)}")
    return text


def lengths(text: str) -> tuple[int, int]:
    """LEAST,LIMIT."""
    try:
        least, limit = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEAST,LIMIT, for instance 8,512") from None
    return least, limit


def _workload(parser: argparse.ArgumentParser, kind: Callable[[Callable[[str], Any]], Callable[[str], Any]]) -> None:
    def default(value: Any) -> Any:
        return [value] if kind is many else value

    n, x = ("N", "X") if kind is one else ("N,…", "X,…")
    work = parser.add_argument_group("workload", "S-LoRA's synthetic trace, unless --trace or --chat says otherwise.")
    work.add_argument("--trace", metavar="FILE", help="JSON lines; - is standard input")
    work.add_argument(
        "--chat", action="store_true", help="lengths of conversations: 85 tokens in and 165 out on average"
    )
    work.add_argument(
        "--adapters", type=kind(int), default=default(200), metavar=n, help="0: the base model only (default: 200)"
    )
    work.add_argument(
        "--rate", type=kind(float), default=default(10.0), metavar=x, help="requests a second (default: 10)"
    )
    work.add_argument("--seconds", type=float, metavar="X", help="length of the trace (default: 120)")
    work.add_argument("--requests", type=int, metavar="N", help="its number of requests instead")
    work.add_argument(
        "--alpha",
        type=kind(float),
        default=default(1.0),
        metavar=x,
        help="1: adapters equally popular (default); less: skewed",
    )
    work.add_argument(
        "--cv",
        type=kind(float),
        default=default(1.0),
        metavar=x,
        help="variation of the gaps between arrivals (default: 1)",
    )
    work.add_argument(
        "--lengths",
        type=lengths,
        default=(8, 512),
        metavar="LEAST,LIMIT",
        help="of prompts and answers, in tokens (default: 8,512)",
    )
    work.add_argument(
        "--prefix", type=int, default=0, metavar="N", help="tokens before each prompt that an adapter's requests share"
    )
    work.add_argument("--seed", type=int, default=42, metavar="N", help="default: 42")
    work.add_argument("--burst", action="store_true", help="all requests at once")


def _model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    base = parser.add_argument_group("model")
    base.add_argument("--setting", choices=("S1", "S2", "S4", "S5", "S6"), help="S-LoRA's (default: S2)")
    base.add_argument("--shape", metavar="NAME", help="another named shape, for instance llama-3.1-8b")
    base.add_argument("--rank", type=int, action="append", metavar="N", help="of adapters in turn; repeat for more")
    base.add_argument(
        "--target",
        choices=("q", "k", "v", "o", "gate", "up", "down"),
        action="append",
        help="projections with adapters; repeat for more (default: q, k, v, o)",
    )
    return base


def _engine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--page-pool",
        type=byte_size,
        metavar="SIZE",
        help="for instance 24G (default: 100G in simulate, else what the GPU has free, 1G on a CPU)",
    )
    engine.add_argument("--max-seqs", type=int, metavar="N", help="running at the same time (default: 256)")
    engine.add_argument("--max-step-tokens", type=int, metavar="N", help="default: 2048")
    engine.add_argument(
        "--policy", default="fcfs", metavar="NAME", help="fcfs, cluster, early-abort, fair, gather or priority"
    )
    add_policy_options(engine)
    engine.add_argument("--no-prefix-caching", action="store_true", help="keep no keys and values for later requests")
    return engine


def _output(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    out = parser.add_argument_group("output")
    out.add_argument("--slo", type=float, default=6.0, metavar="X", help="target for the first token (default: 6 s)")
    out.add_argument(
        "--json", metavar="FILE", help="also write all figures as JSON; - prints them instead of the table"
    )
    return out
