"""Requests and answers as JSON lines."""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from slora_jax.cli.options import SAMPLING
from slora_jax.errors import RequestError
from slora_jax.requests import Completion, Request, RequestOutput, TokenLogprob
from slora_jax.sampling_params import SamplingParams

_OPTIONS = {option.name: option for option in SAMPLING}
_FIELDS = ("prompt", "messages", "prompt_token_ids", "adapter", "id", *_OPTIONS, "logit_bias")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of input: the request it makes, or why it makes none. id: what the line gives as its id, if anything."""

    request: Request | None
    error: str | None = None
    id: Any = None


def parse_row(line: str, defaults: Mapping[str, Any]) -> Row:
    """A JSON line to a Row. defaults: fields of SamplingParams that the line may override."""
    row_id = None
    try:
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise RequestError(f"the line is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise RequestError('the line must be a JSON object, such as {"prompt": "Hello"}')
        row_id = fields.get("id")
        return Row(_request(fields, defaults), id=row_id)
    except RequestError as error:
        return Row(None, str(error), row_id)


def _request(fields: dict[str, Any], defaults: Mapping[str, Any]) -> Request:
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise RequestError(f"unknown field {unknown[0]!r}; the fields are {', '.join(_FIELDS)}")
    given = {name: value for name, value in fields.items() if value is not None}
    adapter = given.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise RequestError(f"adapter must be a name, not {adapter!r}")
    ids = given.get("prompt_token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise RequestError("prompt_token_ids must be a list of integers")
    sampling = {name: option.check(given[name]) for name, option in _OPTIONS.items() if name in given}
    if "logit_bias" in given:
        sampling["logit_bias"] = _logit_bias(given["logit_bias"])
    return Request(
        prompt=given.get("prompt"),
        messages=given.get("messages"),
        prompt_token_ids=ids,
        adapter=adapter,
        sampling=SamplingParams(**{**defaults, **sampling}),
    )


def _logit_bias(value: Any) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise RequestError('logit_bias must map token ids to numbers, such as {"42": -100}') from None


def answer_row(output: RequestOutput, row_id: Any = None) -> dict[str, Any]:
    """A finished request as a JSON object."""
    first = output.completions[0]
    row: dict[str, Any] = {} if row_id is None else {"id": row_id}
    row |= {"adapter": output.adapter, **_completion(first), "prompt_tokens": len(output.prompt_token_ids)}
    if len(output.completions) > 1:
        row["completions"] = [_completion(completion) for completion in output.completions]
    if output.prompt_logprobs is not None:
        row["prompt_logprobs"] = [_logprob(entry) for entry in output.prompt_logprobs]
    for name in ("ttft", "latency"):
        seconds = getattr(output.timings, name)
        row[f"{name}_seconds"] = None if seconds is None else round(seconds, 4)
    return row


def _completion(completion: Completion) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
    if completion.stop_reason is not None:
        fields["stop_reason"] = completion.stop_reason
    if completion.error is not None:
        fields["error"] = completion.error
    if completion.logprobs is not None:
        fields["logprobs"] = [_logprob(entry) for entry in completion.logprobs]
    return fields


def _logprob(entry: TokenLogprob | None) -> dict[str, Any] | None:
    return None if entry is None else {"token_id": entry.token_id, "logprob": entry.logprob, "top": dict(entry.top)}
