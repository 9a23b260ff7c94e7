"""What goes into the engine and what comes out."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from slora_jax.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt: exactly one of `prompt` (text), `prompt_token_ids` or `messages` (chat, through the model's
    template).

    adapter: name of a registered adapter, or None for the base model. priority: larger goes first under the policy
    "priority". tenant: whom the policy "fair" counts the request for.
    """

    prompt: str | None = None
    adapter: str | None = None
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    prompt_token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    request_id: str | None = None
    priority: int = 0
    tenant: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token, and those of the best tokens at its place (token id -> log-probability)."""

    token_id: int
    logprob: float
    top: Mapping[int, float]


@dataclasses.dataclass(slots=True)
class Completion:
    """One generated text. finish_reason: "stop", "length", "abort" or "error"; stop_reason: the stop string or token id
    that ended it. error: why, after "error", and after "abort" if the scheduling policy gave it up.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclasses.dataclass(slots=True)
class Timings:
    """Moments in seconds of ``time.monotonic``; None until reached."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished is None else self.finished - self.arrival


@dataclasses.dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A finished request. `text`, `token_ids` and `finish_reason` are those of the first completion.

    adapter_digest: identity of the adapter's contents that answered, None for the base model.
    prompt_logprobs: one entry for each prompt token, None for the first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    adapter: str | None
    adapter_digest: str | None
    completions: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None
    timings: Timings

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.completions[0].finish_reason


@dataclasses.dataclass(frozen=True)
class EmbeddingRequest:
    """A text to be made a vector: exactly one of `prompt` or `prompt_token_ids`. Other fields as in Request.

    normalize: to length 1, so that a dot product of two is the cosine of their angle.
    """

    prompt: str | None = None
    adapter: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    normalize: bool = True
    request_id: str | None = None
    priority: int = 0
    tenant: str | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class EmbeddingOutput:
    """A finished EmbeddingRequest.

    embedding: float32 [H], the model's final hidden state (after its last norm) at the prompt's last token; None if it
    failed, and `error` then says why. adapter_digest: as in RequestOutput.
    """

    request_id: str
    prompt_token_ids: list[int]
    adapter: str | None
    adapter_digest: str | None
    embedding: np.ndarray | None
    error: str | None
    timings: Timings


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed answer. `text` never ends inside a UTF-8 character or a possible stop string.

    logprobs: one entry for each of `token_ids`, if the request asked for them. output: the whole result, on the
    request's last delta only.
    """

    request_id: str
    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None = None
    output: RequestOutput | None = None
    logprobs: Sequence[TokenLogprob] | None = None
