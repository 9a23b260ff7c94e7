"""From the fields of a call to SamplingParams."""

from collections.abc import Sequence
from typing import Any

from slora_jax.engine import Engine
from slora_jax.errors import RequestError
from slora_jax.sampling_params import SamplingParams
from slora_jax.server.errors import ApiError
from slora_jax.server.schemas import ChatBody, CompletionBody, SamplingFields, SloraParameters

_DIRECT = ("frequency_penalty", "min_p", "n", "presence_penalty", "repetition_penalty", "seed", "stop_token_ids")
_COMPLETION_TOKENS = 16  # OpenAI's default for completions; an answer in a chat may be as long as there is room


def make_params(**fields: Any) -> SamplingParams:
    """SamplingParams, or ApiError 400 with the name of the field that is wrong."""
    try:
        return SamplingParams(**fields)
    except RequestError as error:
        raise bad_request(error) from None


def bad_request(error: Exception, param: str | None = None) -> ApiError:
    """An error of the engine's as OpenAI's API shows it; its texts begin with the field where there is one."""
    words = str(error).split(maxsplit=1)
    known = words and (words[0] in SamplingParams.__dataclass_fields__ or words[0] in ("messages", "prompt"))
    return ApiError(400, str(error), param=words[0] if known else param)


def completion_params(body: CompletionBody) -> tuple[SamplingParams, bool]:
    """Sampling of a completions call, and whether the generated token is left out: echo with max_tokens 0 scores the
    prompt alone, which the engine does while it makes one token.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of must equal n: answers are not ranked", param="best_of")
    tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    score_only = bool(body.echo) and tokens == 0
    fields = _common(body) | dict(max_tokens=1 if score_only else tokens, logprobs=body.logprobs)
    if body.echo:
        fields["prompt_logprobs"] = body.logprobs
    return make_params(**fields), score_only


def chat_params(body: ChatBody, limit: int) -> SamplingParams:
    """limit: tokens of an answer whose length the client leaves open."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "give max_completion_tokens or max_tokens, not both", param="max_tokens")
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return make_params(**_common(body), max_tokens=limit if given is None else given, logprobs=logprobs)


def slora_params(body: SloraParameters) -> SamplingParams:
    return make_params(
        temperature=body.temperature if body.do_sample else 0.0,
        top_k=0 if body.top_k == -1 else body.top_k,
        top_p=body.top_p,
        max_tokens=body.max_new_tokens,
        stop=body.stop_sequences or (),
        ignore_eos=body.ignore_eos,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logprobs=0,
    )


def room_for(engine: Engine, prompts: Sequence[Sequence[int]], adapter: str | None, most: int) -> int:
    """The longest answer that the model, the pool and the server's limit leave to every one of these prompts."""
    longest = max(map(len, prompts))
    return max(1, min(most, engine.longest(adapter) - longest))


def _common(body: SamplingFields) -> dict[str, Any]:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    fields = {name: getattr(body, name) for name in _DIRECT}
    fields = {name: value for name, value in fields.items() if value is not None}
    fields["temperature"] = 1.0 if body.temperature is None else body.temperature
    fields["top_p"] = 1.0 if body.top_p is None else body.top_p
    fields["top_k"] = 0 if body.top_k is None or body.top_k == -1 else body.top_k  # -1 is off in vLLM
    fields["stop"] = () if body.stop is None else body.stop
    fields["ignore_eos"] = body.ignore_eos
    fields["skip_special_tokens"] = body.skip_special_tokens
    try:
        fields["logit_bias"] = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    except ValueError:
        raise ApiError(400, 'logit_bias maps token ids to numbers, such as {"42": -100}', param="logit_bias") from None
    return fields
