"""Log-probabilities in the two forms of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from slora_jax.requests import TokenLogprob
from slora_jax.tokenizer import Tokenizer


class TokenTexts:
    """Token ids as strings. as_ids: "token_id:42" instead of the token's text, which may stand for several ids."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool):
        self._tokenizer = None if as_ids else tokenizer

    def __call__(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self._tokenizer.decode([token], skip_special=False)


def chat_logprobs(entries: Sequence[TokenLogprob], text: TokenTexts) -> dict[str, Any]:
    """The field logprobs of a chat's choice."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        shown = text(token)
        return {"token": shown, "logprob": _finite(logprob), "bytes": list(shown.encode("utf-8", "replace"))}

    return {
        "content": [
            one(e.token_id, e.logprob) | {"top_logprobs": [one(token, value) for token, value in e.top.items()]}
            for e in entries
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """The field logprobs of a completion's choices, which says where in the text each token begins."""

    def __init__(self, text: TokenTexts):
        self._text = text
        self._offset = 0

    def __call__(self, entries: Sequence[TokenLogprob | None], tokens: Sequence[int]) -> dict[str, Any]:
        """entries: of the next tokens; None for the first token of a prompt, which nothing comes before."""
        names, offsets, values, tops = [], [], [], []
        for entry, token in zip(entries, tokens, strict=True):
            name = self._text(token)
            names.append(name)
            offsets.append(self._offset)
            self._offset += len(name)
            values.append(None if entry is None else _finite(entry.logprob))
            # at least the token itself, as OpenAI has it
            best = {} if entry is None else {**entry.top, token: entry.logprob}
            tops.append(None if entry is None else {self._text(t): _finite(value) for t, value in best.items()})
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999.0 for what is impossible."""
    return max(logprob, -9999.0)
