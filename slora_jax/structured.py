"""What form an answer must have. No dependencies: the grammar itself is in grammar.py."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from slora_jax.errors import RequestError

MAX_GRAMMAR_BYTES = 64 << 10  # of a grammar's text, before it is compiled
MAX_CHOICES = 1024


class StructuredOutputError(RequestError):
    """A form that an answer shall have cannot be used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """The form of an answer; exactly one of:

    json_schema: a JSON Schema, as a mapping, a boolean or its text. Keywords that cannot be enforced are refused.
    json_object: True for any JSON object.
    regex: a regular expression (Rust's syntax, no look-around) that the whole answer matches.
    grammar: a context-free grammar, in llguidance's variant of Lark or in GBNF.
    choice: the answer is one of these strings.

    Between the tokens of JSON there may be a space or an indented new line, so that no model fills its answer with
    white space. Raises StructuredOutputError, a RequestError, if it is not exactly one, or too large.
    """

    json_schema: Mapping[str, Any] | bool | str | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self):
        given = [self.json_schema is not None, self.json_object]
        given += [value is not None for value in (self.regex, self.grammar, self.choice)]
        if sum(given) != 1:
            raise StructuredOutputError(
                "structured output needs exactly one of json_schema, json_object, regex, grammar and choice"
            )
        if self.choice is not None:
            if isinstance(self.choice, str) or not all(isinstance(c, str) and c for c in self.choice):
                raise StructuredOutputError("structured output: choice must be a list of strings that are not empty")
            object.__setattr__(self, "choice", tuple(self.choice))
            if not 1 <= len(self.choice) <= MAX_CHOICES:
                raise StructuredOutputError(f"structured output: choice must have 1 to {MAX_CHOICES} strings")
        for name in ("regex", "grammar"):
            if getattr(self, name) == "":
                raise StructuredOutputError(f"structured output: {name} is empty")
        size = len(self.text().encode("utf-8", "surrogatepass"))
        if size > MAX_GRAMMAR_BYTES:
            raise StructuredOutputError(
                f"structured output: the form takes {size} bytes, and {MAX_GRAMMAR_BYTES} are allowed; make it smaller"
            )

    @property
    def kind(self) -> str:
        """Which field is given; json_object is a json_schema, {"type": "object"}."""
        if self.regex is not None:
            return "regex"
        if self.grammar is not None:
            return "grammar"
        return "choice" if self.choice is not None else "json_schema"

    def text(self) -> str:
        """The form as text: of JSON for a schema and for a choice."""
        if self.json_object:
            return '{"type": "object"}'
        if self.kind == "choice":
            return json.dumps(self.choice)
        if self.kind != "json_schema":
            return getattr(self, self.kind)
        if isinstance(self.json_schema, str):
            return self.json_schema
        try:
            return json.dumps(self.json_schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise StructuredOutputError("structured output: json_schema is not JSON") from None
