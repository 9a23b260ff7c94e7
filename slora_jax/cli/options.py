"""Sampling options, which are flags on the command line and fields in JSON lines, and the types of arguments."""

import argparse
import dataclasses
import importlib.util
import json
from typing import Any

from slora_jax.errors import RequestError, SloraError
from slora_jax.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class SamplingOption:
    """A field of SamplingParams. kind: its type in Python and in JSON. many: it is a list of them."""

    name: str
    kind: type
    help: str
    many: bool = False

    @property
    def flag(self) -> str:
        return "--" + (self.name.removesuffix("s") if self.name == "stop_token_ids" else self.name).replace("_", "-")

    def argparse(self) -> dict[str, Any]:
        """Keyword arguments of add_argument. An option that is not given stays None."""
        if self.kind is bool:
            return dict(action="store_true", default=None, help=self.help)
        if self.many:
            return dict(action="append", type=self.kind, metavar=_METAVARS[self.kind], help=self.help + "; repeatable")
        default = {field.name: field.default for field in dataclasses.fields(SamplingParams)}[self.name]
        note = "" if default is None else f" (default: {default})"
        return dict(type=self.kind, metavar=_METAVARS[self.kind], help=self.help + note)

    def check(self, value: Any) -> Any:
        """The value of a JSON field. Raises RequestError if it has another type."""
        if self.many and not (self.kind is str and isinstance(value, str)):
            if not isinstance(value, list):
                raise RequestError(f"{self.name} must be a list, not {value!r}")
            return tuple(self._one(item) for item in value)
        return self._one(value)

    def _one(self, value: Any) -> Any:
        # JSON does not tell 1 from 1.0, and a bool is an int in Python
        kinds = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise RequestError(f"{self.name} must be {_NAMES[self.kind]}, not {value!r}")
        return value


_METAVARS = {int: "N", float: "X", str: "TEXT"}
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}

SAMPLING = (
    SamplingOption("max_tokens", int, "longest answer, in tokens"),
    SamplingOption("temperature", float, "0 always takes the likeliest token; larger is more random"),
    SamplingOption("top_k", int, "choose among the k likeliest tokens only; 0 is off"),
    SamplingOption("top_p", float, "choose among the likeliest tokens of this total probability only; 1 is off"),
    SamplingOption("min_p", float, "leave out tokens less likely than this share of the likeliest; 0 is off"),
    SamplingOption("seed", int, "same seed, same answer"),
    SamplingOption("presence_penalty", float, "taken from the logit of tokens already in the answer"),
    SamplingOption("frequency_penalty", float, "the same, once for each time the token is there"),
    SamplingOption("repetition_penalty", float, "divides the logit of tokens in prompt and answer; 1 is off"),
    SamplingOption("stop", str, "end the answer before this text", many=True),
    SamplingOption("stop_token_ids", int, "end the answer at this token id", many=True),
    SamplingOption("ignore_eos", bool, "go on past the model's end token"),
    SamplingOption("logprobs", int, "report this many of the likeliest tokens at each step (in JSON answers)"),
    SamplingOption("prompt_logprobs", int, "the same for the tokens of the prompt"),
    SamplingOption("n", int, "answers to each prompt"),
)


def sampling_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of SamplingParams that were given as flags."""
    given = {option.name: getattr(args, option.name) for option in SAMPLING}
    given["logit_bias"] = dict(args.logit_bias) if args.logit_bias else None
    return {name: value for name, value in given.items() if value is not None}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of EngineConfig from the flags of the engine."""
    tiers = {name: getattr(args, name) for name in ("host_adapter_bytes", "adapter_chunk_bytes", "adapter_step_bytes")}
    return dict(
        **{name: size for name, size in tiers.items() if size is not None},
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_seqs=args.max_seqs,
        page_pool_bytes=args.page_pool,
        few_adapters=args.few_adapters,
        deterministic=args.deterministic,
        tensor_parallel=args.tp,
        lora_layout=args.lora_layout,
        progress=not args.quiet,
    )


def require_server() -> None:
    """Raises SloraError where the packages of the extra ``server`` are missing."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise SloraError(f'{missing[0]} is not installed; the server needs: pip install "slora-jax[server]"')


def named_path(text: str) -> tuple[str, str]:
    """NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, for instance pirate=./adapters/pirate")
    if name == "base":
        raise argparse.ArgumentTypeError("base stands for the base model; give the adapter another name")
    return name, path


def token_bias(text: str) -> tuple[int, float]:
    """ID=BIAS."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, for instance 42=-100") from None


def add_policy_options(group: argparse._ArgumentGroup) -> None:
    """--policy-option, a list of (name, value), and --prompt-gap."""
    group.add_argument(
        "--policy-option",
        type=_policy_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the policy, for instance ttft=6; repeat for more",
    )
    group.add_argument(
        "--prompt-gap",
        type=int,
        default=0,
        metavar="N",
        help="steps in which nobody starts after one that started all it could, while many run (default: 0)",
    )


def _policy_option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value in JSON or a plain word."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, for instance ttft=6")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def byte_size(text: str) -> int:
    """A number of bytes, with K, M, G or T for powers of 1024."""
    number, unit = text.upper().removesuffix("IB").removesuffix("B"), 0
    if number and number[-1] in "KMGT":
        number, unit = number[:-1], "KMGT".index(number[-1]) + 1
    try:
        size = int(float(number) * 1024**unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, for instance 512M or 40G") from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"a size must be positive, not {text}")
    return size
