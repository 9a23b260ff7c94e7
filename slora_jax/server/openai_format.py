"""Answers in the form of OpenAI's API. One object writes the whole answer or its pieces, so that they say the same."""

from collections.abc import Iterator, Sequence
import dataclasses
import time
from typing import Any

from slora_jax.requests import Delta, RequestOutput, TokenLogprob
from slora_jax.server.event_template import EventTemplate
from slora_jax.server.events import event
from slora_jax.server.logprobs import CompletionLogprobs, TokenTexts, chat_logprobs
from slora_jax.server.merging import merged
from slora_jax.server.tool_choice import Tools
from slora_jax.server.tools import ToolParser


def usage(outputs: Sequence[RequestOutput], score_only: bool = False) -> dict[str, int]:
    """score_only: the one token that the engine had to make does not count."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    answer = 0 if score_only else sum(len(c.token_ids) for output in outputs for c in output.completions)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class _Format:
    kind: str
    chunk_kind: str

    def __init__(self, response_id: str, model: str, texts: TokenTexts, token_ids: bool, usage_follows: bool):
        """token_ids: each choice has the ids of its tokens, as vLLM's return_token_ids asks. usage_follows: a stream's
        usage comes in an event of its own, and the others say that they have none.
        """
        self._id = response_id
        self._model = model
        self._created = int(time.time())
        self._texts = texts
        self._token_ids = token_ids
        self._usage_follows = usage_follows
        self._templates: dict[tuple[int, int], EventTemplate] = {}  # by prompt and choice

    def events(self, pieces: Sequence[tuple[int, Delta]], outputs: Sequence[RequestOutput]) -> Iterator[bytes]:
        """Events of pieces of a stream, given as (index of the prompt, Delta), to be sent in this order."""
        for prompt, delta in merged(pieces):
            written = self.plain(prompt, delta)
            if written is None:
                chunk = self.chunk(prompt, delta, outputs[prompt])
                written = self._event(chunk) if chunk else b""
                if delta.finish_reason is None and delta.logprobs is None and self._repeats:
                    example = dataclasses.replace(delta, text=EventTemplate.TEXT, token_ids=EventTemplate.TOKENS)
                    chunk = self.chunk(prompt, example, outputs[prompt])
                    assert chunk is not None
                    self._templates[prompt, delta.index] = EventTemplate(self._event(chunk))
            yield written

    def plain(self, prompt: int, delta: Delta) -> bytes | None:
        """The event of a piece that only adds text to a choice that has begun, empty if there is nothing to say yet.
        None for any other piece. Nothing changes by asking.
        """
        template = self._templates.get((prompt, delta.index))
        if template is None or delta.finish_reason is not None or delta.logprobs is not None:
            return None
        return template.fill(delta.text, delta.token_ids) if delta.text or self._token_ids else b""

    def chunk(self, prompt: int, delta: Delta, output: RequestOutput) -> dict[str, Any] | None:
        """What an event says of a piece; None where there is nothing to say yet."""
        raise NotImplementedError

    @property
    def _repeats(self) -> bool:
        """Whether pieces that only add text differ in nothing else."""
        raise NotImplementedError

    def _event(self, chunk: dict[str, Any]) -> bytes:
        return event(chunk | {"usage": None} if self._usage_follows else chunk)

    def _envelope(self, kind: str, choices: list[dict[str, Any]], digest: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": digest,  # which contents of the adapter answer
            "choices": choices,
        }

    def usage_event(self, outputs: Sequence[RequestOutput], score_only: bool = False) -> bytes:
        envelope = self._envelope(self.chunk_kind, [], outputs[0].adapter_digest)
        return event(envelope | {"usage": usage(outputs, score_only)})


class ChatFormat(_Format):
    """Chat completions. tools: what finds calls of tools in an answer, None if there are no tools."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        response_id: str,
        model: str,
        texts: TokenTexts,
        token_ids: bool,
        usage_follows: bool,
        tools: Tools | None,
    ):
        super().__init__(response_id, model, texts, token_ids, usage_follows)
        self._tools = tools
        self._parsers: dict[int, ToolParser] = {}  # by index of the choice
        self._calls: dict[int, int] = {}  # how many each choice has made
        self._begun = False

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = [
            {
                "index": c.index,
                "message": {"role": "assistant", "refusal": None} | self._said(c.index, c.text, True, False),
                "logprobs": None if c.logprobs is None else chat_logprobs(c.logprobs, self._texts),
                "finish_reason": self._reason(c.index, c.finish_reason),
                "stop_reason": c.stop_reason,
            }
            | ({"token_ids": c.token_ids} if self._token_ids else {})
            for c in output.completions
        ]
        return self._envelope(self.kind, choices, output.adapter_digest) | {"usage": usage([output])}

    def _said(self, index: int, text: str, final: bool, streamed: bool) -> dict[str, Any]:
        """Text of a choice as the fields of a message, or of what a chunk adds to one."""
        if self._tools is None:
            return {"content": text} if text or not streamed else {}
        parser = self._parsers.setdefault(index, self._tools.parser())
        said, calls = parser.push(text, final)
        before = self._calls.get(index, 0)
        self._calls[index] = before + len(calls)
        fields: dict[str, Any] = {"content": said} if said or not (calls or streamed) else {}
        if not streamed:
            fields.setdefault("content", None)
        if calls:
            fields["tool_calls"] = [c.as_json(before + i if streamed else None) for i, c in enumerate(calls)]
        return fields

    def _reason(self, index: int, reason: str | None) -> str | None:
        """Why a choice ended. OpenAI says "stop" where the caller chose the function itself."""
        called = self._calls.get(index) and self._tools is not None and self._tools.form != "forced_arguments"
        return "tool_calls" if reason == "stop" and called else reason

    def events(self, pieces: Sequence[tuple[int, Delta]], outputs: Sequence[RequestOutput]) -> Iterator[bytes]:
        if not self._begun:  # not before: which contents answer may only be known now
            self._begun = True
            yield self._event(self._first(outputs[0]))
        yield from super().events(pieces, outputs)

    def plain(self, prompt: int, delta: Delta) -> bytes | None:
        # tokens without text are written without any content
        return super().plain(prompt, delta) if delta.text or not self._token_ids else None

    @property
    def _repeats(self) -> bool:
        return self._tools is None

    def _first(self, output: RequestOutput) -> dict[str, Any]:
        """The chunk before any text, which names the speaker of every choice."""
        speaker = {"role": "assistant", "content": ""}
        choices = [
            {"index": c.index, "delta": speaker, "logprobs": None, "finish_reason": None} for c in output.completions
        ]
        return self._envelope(self.chunk_kind, choices, output.adapter_digest)

    def chunk(self, prompt: int, delta: Delta, output: RequestOutput) -> dict[str, Any] | None:
        added = self._said(delta.index, delta.text, delta.finish_reason is not None, True)
        if not (added or delta.logprobs or delta.finish_reason or self._token_ids):
            return None
        choice = {
            "index": delta.index,
            "delta": added,
            "logprobs": None if delta.logprobs is None else chat_logprobs(delta.logprobs, self._texts),
            "finish_reason": self._reason(delta.index, delta.finish_reason),
        }
        if self._token_ids:
            choice["token_ids"] = list(delta.token_ids)
        if delta.finish_reason is not None:
            choice["stop_reason"] = output.completions[delta.index].stop_reason
        return self._envelope(self.chunk_kind, [choice], output.adapter_digest)


class CompletionFormat(_Format):
    """Completions. echoed: the text of each prompt, to stand before its answers, or None.

    score_only: the prompts alone are shown, with their log-probabilities.
    """

    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        response_id: str,
        model: str,
        texts: TokenTexts,
        token_ids: bool,
        usage_follows: bool,
        n: int,
        echoed: Sequence[str] | None,
        score_only: bool,
    ):
        super().__init__(response_id, model, texts, token_ids, usage_follows)
        self._n = n
        self._echoed = echoed
        self._score_only = score_only
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by index of the choice
        self._begun: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = []
        for index, output in enumerate(outputs):
            for done in output.completions:
                delta = Delta("", done.index, done.text, done.token_ids, done.finish_reason, output, done.logprobs)
                choices.append(self._choice(index, delta, output))
        envelope = self._envelope(self.kind, choices, outputs[0].adapter_digest)
        return envelope | {"usage": usage(outputs, self._score_only)}

    def chunk(self, prompt: int, delta: Delta, output: RequestOutput) -> dict[str, Any] | None:
        if not (delta.text or delta.logprobs or delta.finish_reason or self._token_ids):
            return None
        return self._envelope(self.chunk_kind, [self._choice(prompt, delta, output)], output.adapter_digest)

    @property
    def _repeats(self) -> bool:
        return not self._score_only

    def _choice(self, prompt: int, delta: Delta, output: RequestOutput) -> dict[str, Any]:
        """What a delta adds to its choice; the prompt comes with the first."""
        index = prompt * self._n + delta.index
        text, tokens, entries = delta.text, list(delta.token_ids), delta.logprobs
        made = [] if self._score_only else tokens
        if self._score_only:
            text, tokens, entries = "", [], None if entries is None else []
        shown: list[TokenLogprob | None] | None = None if entries is None else list(entries)
        if self._echoed is not None and index not in self._begun:
            text = self._echoed[prompt] + text
            if shown is not None and output.prompt_logprobs is not None:
                shown = [*output.prompt_logprobs, *shown]
                tokens = [*output.prompt_token_ids, *tokens]
        self._begun.add(index)
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": delta.finish_reason}
        if self._token_ids:
            choice["token_ids"] = made
        if shown is not None:
            writer = self._logprobs.setdefault(index, CompletionLogprobs(self._texts))
            choice["logprobs"] = writer(shown, tokens)
        if delta.finish_reason is not None:
            choice["stop_reason"] = output.completions[delta.index].stop_reason
            if self._score_only:
                choice |= {"finish_reason": "length", "stop_reason": None}
        return choice
