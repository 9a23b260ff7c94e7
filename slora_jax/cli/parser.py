"""Arguments and help texts of ``slora-jax``.

argparse, because it starts in a few milliseconds and its errors can be one line; nothing here imports jax.
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

import slora_jax
from slora_jax.cli.options import SAMPLING, named_path, token_bias
from slora_jax.cli.serve_options import engine_group, serve_options
from slora_jax.cli.workload_options import TRACE_HELP, bench_options, simulate_options

_MODEL = (
    "base model: a Hugging Face directory or id (org/name), a .gguf file, a directory written by slora-jax convert, "
    "or random:SHAPE for random weights (for instance random:llama-2-7b)"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line. `command` of the result is the name of a module of this package.

    Exits with status 2 and one line on standard error where it is wrong.
    """
    parser = _Parser(
        prog="slora-jax",
        description="Answers prompts with one base model and any number of LoRA adapters, all in one batch.",
        epilog="slora-jax COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"slora-jax {slora_jax.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _demo(commands)
    _generate(commands)
    _serve(commands)
    _key(commands)
    _convert(commands)
    _inspect(commands)
    _simulate(commands)
    _bench(commands)
    if argv and argv[0] in commands.choices:
        # prompts and options may take turns, which argparse only allows without subcommands
        return commands.choices[argv[0]].parse_intermixed_args(
            argv[1:], argparse.Namespace(command=argv[0], argv=list(argv))
        )
    return parser.parse_args(argv)


def _command(commands, name: str, summary: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _demo(commands) -> None:
    parser = _command(
        commands,
        "demo",
        "show base model and adapters answering in one batch",
        "Answers a dozen prompts with the base model and every adapter of a directory, all in one batch, and shows\n"
        "what the page pool held meanwhile. `make demo` runs it with a small model and six adapters.",
    )
    parser.add_argument("--model", required=True, help=_MODEL)
    parser.add_argument(
        "--adapters",
        required=True,
        metavar="DIR",
        help="directory whose subdirectories are PEFT adapters for that model",
    )
    parser.add_argument("--max-tokens", type=int, default=48, help="longest answer, in tokens (default: 48)")
    engine_group(parser)


def _generate(commands) -> None:
    parser = _command(
        commands,
        "generate",
        "answer prompts",
        "Answers prompts from the command line, from standard input (one prompt) or from a file of JSON lines.",
        "examples:\n"
        '  slora-jax generate org/model "What is a page pool?"\n'
        '  slora-jax generate org/model --adapter pirate=./pirate --use base --use pirate "What is a bucket for?"\n'
        "  slora-jax generate org/model --adapter pirate=./pirate --jsonl requests.jsonl > answers.jsonl\n"
        "\n"
        "A row of a JSONL file is an object with one of prompt (continued as it stands), messages (a chat: a list of\n"
        "{role, content}) or prompt_token_ids, and, if wanted, adapter (a name; none is the base model), id (repeated\n"
        "in the answer) and any sampling option under its name with underscores, for instance max_tokens. Every row\n"
        "is answered by one line, in the same order; a row that cannot be served is answered by its error.",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="prompts; without any, standard input is one")
    parser.add_argument(
        "--adapter",
        metavar="NAME=PATH",
        type=named_path,
        action="append",
        default=[],
        help="a LoRA adapter: its directory or Hugging Face id, and the name it shall have; repeat for more",
    )
    parser.add_argument(
        "--use",
        metavar="NAME",
        action="append",
        help="who answers the prompts: the name of an adapter, or base; repeat to ask several "
        "(default: every adapter given, or the base model if there is none)",
    )
    parser.add_argument("--jsonl", metavar="FILE", help="read requests from a file of JSON lines; - is standard input")
    parser.add_argument("--json", action="store_true", help="print answers as JSON lines (always so with --jsonl)")
    chat = parser.add_argument_group("prompts")
    chat.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without the chat template")
    chat.add_argument("--system", metavar="TEXT", help="system message before the prompt in the chat template")
    sampling = parser.add_argument_group("sampling", "With --jsonl these are the defaults of every row.")
    for option in SAMPLING:
        sampling.add_argument(option.flag, dest=option.name, **option.argparse())
    sampling.add_argument(
        "--logit-bias",
        metavar="ID=BIAS",
        type=token_bias,
        action="append",
        help="number added to the logit of a token id; repeat for more",
    )
    engine_group(parser)


def _serve(commands) -> None:
    parser = _command(
        commands,
        "serve",
        "serve the model and its adapters over HTTP",
        "Serves OpenAI's API (chat, completions, models), S-LoRA's /generate and vLLM's adapter calls. The field\n"
        "`model` of a call names an adapter, or the base model. A status page is at /.",
        "examples:\n"
        "  slora-jax serve org/model --adapters ./adapters\n"
        "  slora-jax key alice --file keys.json --adapter 'team-*'\n"
        "  slora-jax serve org/model --adapters ./adapters --host 0.0.0.0 --api-keys keys.json",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    serve_options(parser)
    engine_group(parser)


def _key(commands) -> None:
    parser = _command(
        commands,
        "key",
        "make an API key for slora-jax serve",
        "Makes a key, prints it, and adds its hash to a file. A server that runs with the file sees it soon after.",
        "examples:\n"
        "  slora-jax key operator --file keys.json --admin\n"
        "  slora-jax key alice --file keys.json --adapter 'team-*' --requests-per-minute 60",
    )
    parser.add_argument("name", metavar="NAME", help="who gets the key; it stands in logs and metrics")
    parser.add_argument("--file", required=True, metavar="FILE", help="key file; it is made if it is not there")
    parser.add_argument(
        "--adapter",
        metavar="PATTERN",
        action="append",
        help="an adapter that the key may use, or a pattern such as team-*; repeat for more (default: all)",
    )
    parser.add_argument("--no-base", action="store_true", help="the key may not use the base model")
    parser.add_argument("--admin", action="store_true", help="the key may load and unload adapters and read metrics")
    parser.add_argument("--max-concurrent", type=int, metavar="N", help="answers at the same time")
    parser.add_argument("--requests-per-minute", type=float, metavar="X")
    parser.add_argument("--tokens-per-minute", type=float, metavar="X", help="of prompts and answers")
    parser.add_argument("--weight", type=float, metavar="X", help="share among keys under load (default: 1)")


def _convert(commands) -> None:
    parser = _command(
        commands,
        "convert",
        "write a model as an Orbax checkpoint, which loads fastest",
        "Reads a base model of any supported format and writes it as an Orbax checkpoint with its tokenizer. Such a\n"
        "directory is read straight into the wanted layout on one or several devices.",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("out", metavar="OUT", help="directory to write; it must not exist")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace a converted model at OUT")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _inspect(commands) -> None:
    parser = _command(
        commands,
        "inspect",
        "show a model or adapter, the memory it takes, and whether it is supported",
        "Shows sizes, ranks, pages and memory of a base model or a LoRA adapter, and whether it would be accepted or\n"
        "why not, without running it. The exit status is 0 if it is accepted and 1 if it is refused.",
        "examples:\n  slora-jax inspect org/model\n  slora-jax inspect ./pirate --base org/model",
    )
    parser.add_argument("source", metavar="MODEL|ADAPTER", help=f"{_MODEL}; or a PEFT adapter's directory or id")
    parser.add_argument("--base", metavar="MODEL", help="base model of the adapter, to check it against")


def _simulate(commands) -> None:
    parser = _command(
        commands,
        "simulate",
        "predict throughput, latency and page use of a workload, without a GPU",
        "Runs a workload through the engine's scheduler and page pool against a model of the device's time: by\n"
        "default the floor, which is bytes and operations at the ceilings of one H200; or one measured, with\n"
        "--calibrate or --cost.",
        "examples:\n"
        "  slora-jax simulate --setting S2 --adapters 2000 --rate 10 --seconds 120\n"
        "  slora-jax simulate --trace trace.jsonl --shape llama-3.1-8b --rank 16 --policy early-abort\n"
        "  slora-jax simulate --calibrate result-of-bench.json --adapters 2000 --rate 20\n"
        "\n" + TRACE_HELP,
    )
    simulate_options(parser)


def _bench(commands) -> None:
    parser = _command(
        commands,
        "bench",
        "measure a workload on this machine, with random weights of a named shape",
        "Measures an engine under S-LoRA's synthetic trace and other workloads: throughput, latencies, SLO, fairness,\n"
        "page use, steps; and the share of what bytes and operations would allow. Options that take a list are\n"
        "measured in all combinations. Needs the repository's benchmarks/ directory.",
        "examples:\n"
        "  slora-jax bench --setting S2 --adapters 5,100,1000,2000 --rate 50 --seconds 20 --json s2.json --plots s2\n"
        "  slora-jax bench --burst --requests 1000 --adapters 200 --compare no-adapters,fixed-slots --json burst.json\n"
        "  slora-jax bench noisy --policy fair\n"
        "  slora-jax bench --shape tiny-llama --rank 8 --adapters 4 --requests 16 --lengths 4,32 --page-pool 8M\n"
        "\n" + TRACE_HELP,
    )
    bench_options(parser)
