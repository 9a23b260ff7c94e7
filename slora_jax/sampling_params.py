"""What a caller asks of the generated text."""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from slora_jax.errors import RequestError
from slora_jax.structured import StructuredOutput


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise RequestError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request. Meanings follow OpenAI's API and vLLM where both have a field.

    max_tokens: tokens to generate at most, at least 1. temperature: 0 is greedy.
    top_k: 0 is off. top_p, min_p: kept probability mass, and least probability relative to the best token.
    seed: same seed, same tokens, whatever else runs; None draws one.
    presence/frequency_penalty: over generated tokens. repetition_penalty: over prompt and generated tokens, 1 is off.
    logit_bias: token id -> added to its logit. stop: strings that end the text (not included in it).
    stop_token_ids: token ids that end it. ignore_eos: run past the model's end token.
    logprobs: None, or how many of the best tokens to report at each step (0 = only the chosen one).
    prompt_logprobs: the same for the prompt's tokens. n: completions per prompt.
    skip_special_tokens: leave tokens such as a turn's marks out of the text.
    structured: the form that the text must have; where it is complete, the text ends. Only stop, stop_token_ids and
    max_tokens can cut it short.

    Raises RequestError naming the field if a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _need(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}")
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            _need(math.isfinite(getattr(self, name)), f"{name} must be a finite number, not {getattr(self, name)}")
        _need(self.temperature >= 0, f"temperature must be 0 (greedy) or more, not {self.temperature}")
        _need(self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}")
        _need(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        _need(0 <= self.min_p <= 1, f"min_p must be from 0 to 1, not {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            _need(-2 <= getattr(self, name) <= 2, f"{name} must be from -2 to 2, not {getattr(self, name)}")
        _need(self.repetition_penalty > 0, f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        _need(self.seed is None or 0 <= self.seed < 2**63, f"seed must be from 0 to 2**63 - 1, not {self.seed}")
        for token, bias in self.logit_bias.items():
            _need(math.isfinite(bias), f"logit_bias of token {token} must be a finite number, not {bias}")
        _need(len(self.logit_bias) <= 1024, f"logit_bias has {len(self.logit_bias)} entries; at most 1024 are allowed")
        _need(all(self.stop), "stop must not contain an empty string")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _need(value is None or 0 <= value <= 20, f"{name} must be None or from 0 to 20, not {value}")
        _need(1 <= self.n <= 128, f"n must be from 1 to 128, not {self.n}")
