"""Tool calls in the text of an answer, in the formats that common chat templates teach."""

from collections.abc import Collection
import dataclasses
import json
import re
import secrets
from typing import Any, Literal

ToolFormat = Literal["hermes", "llama3", "mistral", "forced", "forced_arguments"]
"""hermes: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, also Qwen's. llama3: the answer is
``{"name": ..., "parameters": {...}}``. mistral: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``, or
``[TOOL_CALLS]name{...}``. forced: structured output, a JSON list of calls; forced_arguments: one call's arguments."""

_MARKS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": "<|python_tag|>"}
_JSON = json.JSONDecoder()
_NAMED = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*(?:\[ARGS\])?\s*(?=\{)")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """arguments: JSON text."""

    name: str
    arguments: str

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """index: in a stream, which of the answer's calls it is."""
        function = {"name": self.name, "arguments": self.arguments}
        # nine letters or digits, because Mistral's templates take no other ids back
        call = {"id": secrets.token_hex(5)[:9], "type": "function", "function": function}
        return call if index is None else {"index": index} | call


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it knows no tools, or none of these formats."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    return "llama3" if '"parameters"' in template or "<|python_tag|>" in template else None


class ToolParser:
    """Splits the text of one answer, piece by piece, into what is said and what is called.

    A call comes out when it is complete. What looks like a call and is none, or names no tool, is text.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]):
        self._form = form
        self._names = frozenset(names)
        self._held = ""
        self._in_call = False
        self._skip_space = True  # before the first word and after a call
        self._said = False  # something other than white space
        self._called = False

    def push(self, text: str, final: bool = False) -> tuple[str, list[ToolCall]]:
        """New text and new calls. final: nothing follows."""
        self._held += text
        if self._form.startswith("forced"):
            said, calls = self._forced() if final else ("", [])
        elif self._form == "llama3":
            said, calls = self._llama3(final)
        else:
            said, calls = self._marked(_MARKS[self._form], final)
        self._said = self._said or bool(said.strip())
        return said, calls

    def _forced(self) -> tuple[str, list[ToolCall]]:
        try:
            value = json.loads(self._held)
        except ValueError:  # cut short
            return self._take(), []
        if self._form == "forced_arguments":
            (name,) = self._names
            value = [{"name": name, "arguments": value}]
        calls = self._calls(value)
        return ("", calls) if calls else (self._take(), [])

    def _marked(self, mark: str, final: bool) -> tuple[str, list[ToolCall]]:
        """Text, then calls behind marks."""
        said, calls = "", list[ToolCall]()
        while True:
            if not self._in_call:
                if self._skip_space:
                    self._held = self._held.lstrip()
                    self._skip_space = not self._held
                at = self._held.find(mark)
                if at < 0:
                    keep = 0 if final else _overlap(self._held, mark)
                    return said + self._take(len(self._held) - keep), calls
                said += self._take(at)
                self._in_call = True
            found, length = self._one(self._held[len(mark) :], final)
            if found:
                calls += found
            elif length or final:  # it is complete, or never will be, and no call
                length = length or len(self._held) - len(mark)
                said += self._held[: len(mark) + length]
            else:
                return said, calls
            self._held = self._held[len(mark) + length :]
            self._in_call, self._skip_space = False, bool(found)

    def _one(self, text: str, final: bool) -> tuple[list[ToolCall], int]:
        """The calls at the beginning of a text behind a mark, and its length; (no calls, 0) while it is incomplete."""
        if self._form == "hermes":
            end = text.find("</tool_call>")
            if end < 0 and not final:
                return [], 0
            inner = text if end < 0 else text[:end]
            length = len(text) if end < 0 else end + len("</tool_call>")
            value, rest = _decode(inner.lstrip())
            return (self._calls([value]) if rest is not None and not rest.strip() else []), length
        named = _NAMED.match(text)
        body = text[named.end() :] if named else text.lstrip()
        value, rest = _decode(body)
        if rest is None:
            return [], 0
        value = [{"name": named[1], "arguments": value}] if named else value
        return self._calls(value), len(text) - len(rest)

    def _llama3(self, final: bool) -> tuple[str, list[ToolCall]]:
        """The whole answer is calls, with ; between them, or the whole answer is text."""
        if self._said:
            return self._take(), []
        start = self._held.lstrip(" \n;,").removeprefix(_MARKS["llama3"]).lstrip()
        if not final and (not start or _MARKS["llama3"].startswith(start)):
            return "", []
        if not start.startswith("{"):
            return ("" if self._called and not start else self._take()), []
        value, rest = _decode(start)
        if rest is None:
            return (self._take(), []) if final else ("", [])
        calls = self._calls([value])
        if not calls:
            return self._take(), []
        self._held, self._called = rest, True
        said, more = self._llama3(final)
        return said, calls + more

    def _calls(self, values: Any) -> list[ToolCall]:
        """All of them, or none."""
        calls = []
        for value in values if isinstance(values, list) else [values]:
            name = value.get("name") if isinstance(value, dict) else None
            arguments = value.get("arguments", value.get("parameters")) if isinstance(value, dict) else None
            if isinstance(arguments, str):
                arguments, rest = _decode(arguments)
            if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                return []
            calls.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False)))
        return calls

    def _take(self, end: int | None = None) -> str:
        end = len(self._held) if end is None else end
        taken, self._held = self._held[:end], self._held[end:]
        return taken


def _decode(text: str) -> tuple[Any, str | None]:
    """The JSON value at the beginning of a text, and what follows it; None if there is none, or not all of it."""
    try:
        value, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError):
        return None, None
    return value, text[end:]


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
