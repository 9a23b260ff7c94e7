"""Text to token ids and back: prompts, chat templates, and streaming text that never splits a character.

Prompts, messages and ids come from users and are checked here, so those arguments are typed Any.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import os
from pathlib import Path
import shutil
from typing import Any

from tokenizers.decoders import DecodeStream

from slora_jax.errors import ModelError, RequestError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


class Tokenizer:
    """A model's tokeniser with its chat template.

    Attributes: ``name`` for messages; ``vocab_size`` ids that have a text; ``eos_token_ids`` ids that end an answer,
    as far as the tokeniser's own files tell.
    """

    def __init__(
        self,
        fast: Any,
        *,
        name: str,
        eos_token_ids: Iterable[int] = (),
        model_vocab_size: int = 0,
    ):
        """fast: a transformers ``PreTrainedTokenizerFast``. eos_token_ids: further ones than its own.

        model_vocab_size: ids the model can produce; it may pad its vocabulary, and padded ids decode to nothing.
        """
        self._fast = fast
        self._backend = fast.backend_tokenizer
        # Files may carry the limits of their training run; a prompt is never cut in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.name = name
        self.vocab_size = len(fast)
        self._id_limit = max(self.vocab_size, model_vocab_size)
        own = () if fast.eos_token_id is None else (fast.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *eos_token_ids)))

    @classmethod
    def from_directory(cls, path: Path, *, model_vocab_size: int = 0) -> "Tokenizer | None":
        """The tokeniser of a Hugging Face directory; None where the directory has no tokeniser files.

        tokenizer.json is used as it stands: transformers' model-specific classes rebuild some of its parts.
        Raises ModelError where the files cannot be read. Code in the directory is never run.
        """
        if not any((path / file).is_file() for file in _TOKENIZER_FILES):
            return None
        transformers = import_transformers()
        whole = (path / "tokenizer.json").is_file()
        loader = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
        options = {} if whole else {"trust_remote_code": False}
        try:
            fast = loader.from_pretrained(str(path), local_files_only=True, **options)
        except Exception as error:  # noqa: BLE001 - transformers and tokenizers raise many kinds
            raise ModelError(f"{path}: the tokenizer cannot be loaded: {_one_line(error)}") from None
        if getattr(fast, "backend_tokenizer", None) is None:
            raise ModelError(f"{path}: {type(fast).__name__} has no fast tokenizer; add a tokenizer.json")
        return cls(fast, name=str(path), model_vocab_size=model_vocab_size)

    def save(self, path: Path) -> None:
        """Write the files that ``from_directory`` reads to the new directory ``path``."""
        transformers = import_transformers()
        path.mkdir(parents=True)
        # A plain fast tokenizer, so that no model-specific class is named in the files.
        plain = transformers.PreTrainedTokenizerFast(
            tokenizer_object=self._backend,
            chat_template=self._fast.chat_template,
            **{key: value for key, value in self._fast.special_tokens_map.items() if isinstance(value, str)},
        )
        plain.save_pretrained(str(path))
        if not (path / "tokenizer.json").is_file():
            shutil.rmtree(path)
            raise ModelError(f"{self.name}: the tokenizer cannot be saved as tokenizer.json")

    def to_json(self) -> str:
        """The contents of its tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text: Any, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of a prompt, with the model's start token where it has one. RequestError if it is no text.

        max_tokens: a text so long that it must have more is refused (RequestError) without the work, which takes
        seconds for megabytes. One that is let through may still have more.
        """
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be a string, not {type(text).__name__}")
        if max_tokens is not None and len(text) > max_tokens * self._longest_token:
            raise RequestError(f"the prompt has {len(text)} characters, more than {max_tokens} tokens can; shorten it")
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, ValueError) as error:  # a lone surrogate is the one string that is no text
            raise RequestError(f"the prompt is not valid Unicode text: {_one_line(error)}") from None

    @functools.cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def decode(self, ids: Iterable[Any], skip_special: bool = True) -> str:
        """Text of token ids. Raises RequestError for an id outside the vocabulary."""
        known = [token for token in map(self.check_id, ids) if token < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=skip_special)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._fast.chat_template)

    @property
    def chat_template(self) -> str:
        """The text of the template, of all its variants if it has several."""
        return str(self._fast.chat_template or "")

    def render(self, messages: Any, add_generation_prompt: bool = True, tools: Sequence[Any] | None = None) -> str:
        """The prompt text that the model's chat template makes of ``messages``.

        messages: a list of mappings with the strings ``role`` and ``content``. tools: functions that the model may
        call, as OpenAI's API describes them. Raises RequestError where there is no template, where messages are
        malformed, or where the template refuses them.
        """
        if not self.has_chat_template:
            raise RequestError(f"{self.name} has no chat template; send a plain prompt instead of messages")
        _check_messages(messages)
        try:
            return self._fast.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # noqa: BLE001 - templates raise their own errors through jinja2
            raise RequestError(f"the chat template refuses these messages: {_one_line(error)}") from None

    def chat(
        self,
        messages: Any,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of ``render(...)``. The template writes the special tokens itself, so none are added. max_tokens as
        in encode.
        """
        text = self.render(messages, add_generation_prompt, tools)
        return self.encode(text, add_special_tokens=False, max_tokens=max_tokens)

    def stream(self, skip_special: bool = True) -> "TokenDecoder":
        """A new incremental decoder for one answer."""
        return TokenDecoder(self, skip_special)

    def check_id(self, token: Any) -> int:
        """``token`` as an int; RequestError where the model has no such id."""
        try:
            value = int(token)
        except (TypeError, ValueError):
            value = -1
        if not 0 <= value < self._id_limit or value != token:
            raise RequestError(f"token id {token!r} is not in the vocabulary (0 to {self._id_limit - 1})")
        return value


class TokenDecoder:
    """Turns the ids of one answer into text as they come. The pieces together are ``decode`` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = DecodeStream(skip_special_tokens=skip_special)
        self._ids: list[int] = []
        self._told: list[str] = []
        self._open = 0

    def push(self, token_id: Any) -> str:
        """Text that ``token_id`` finishes; "" while it ends inside a UTF-8 character or has no text.

        Raises RequestError for an id outside the vocabulary.
        """
        token = self._tokenizer.check_id(token_id)
        if token >= self._tokenizer.vocab_size:
            return ""
        self._ids.append(token)
        self._open += 1
        try:
            piece = self._decoder.step(self._tokenizer._backend, token)
        except Exception:  # noqa: BLE001 - it raises nothing more specific
            piece = self._start_over()
        if not piece:
            return ""
        self._open = 0
        self._told.append(piece)
        return piece

    def flush(self) -> str:
        """The text still held back, for the end of the answer: an unfinished character comes out as U+FFFD."""
        if not self._open:
            return ""
        told = "".join(self._told)
        text = self._tokenizer.decode(self._ids, self._skip_special)
        # Only where bytes that are no UTF-8 followed: then text that was already told would read differently now.
        rest = text[len(told) :] if text.startswith(told) else self._tokenizer.decode(self._ids[-self._open :])
        self._told.append(rest)
        self._open = 0
        return rest

    def _start_over(self) -> str | None:
        """The decoder gave up because a byte that is no UTF-8 changed text it had told: go on from the held ids."""
        self._decoder = DecodeStream(skip_special_tokens=self._skip_special)
        pieces = [self._decoder.step(self._tokenizer._backend, token) for token in self._ids[-self._open :]]
        return "".join(piece for piece in pieces if piece) or None


def import_transformers() -> Any:
    """The transformers module, without its notice that PyTorch is missing: only its tokenizers are used."""
    before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before
    return transformers


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"messages[{index}] must be a mapping with role and content, not {type(message).__name__}"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(f"messages[{index}] needs the string {key!r}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:157] + "...") if len(text) > 160 else text or type(error).__name__
