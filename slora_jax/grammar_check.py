"""Compiling the form of an answer, first in a process that may be killed.

Some small grammars take llguidance minutes or gigabytes to compile ({"multipleOf": 40353607} does), which its own
limits do not see, and a crash of it would take the server along. So a child process tries every new grammar under a
limit of time and memory, and only what it managed is compiled here.
"""

from collections.abc import Sequence
import json
import select
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from slora_jax.structured import StructuredOutputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_SECONDS = 5.0  # for one grammar
_START_SECONDS = 120.0  # for the child to read the vocabulary
_MEMORY_BYTES = 4 << 30
# What may stand between the tokens of JSON. llguidance's own default has no end, and small models never reach one.
_WHITESPACE = r" |\n[ \t]{0,40}"
# Work for a mask is limited too: 200 k units of fuel are about 15 ms, then the answer fails. Errors tell nothing of the
# grammar's inside.
_LIMITS = dict(
    initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, step_max_items=50_000, max_grammar_size=100_000,
    max_lexer_states=50_000, verbose_errors=False,
)  # fmt: skip


def make_vocabulary(tokenizer: str, size: int, eos: Sequence[int]) -> "LLTokenizer":
    """The model's tokens as llguidance wants them. tokenizer: contents of tokenizer.json. Takes up to a second."""
    return llguidance().LLTokenizer(tokenizer, n_vocab=size, eos_token=list(eos))


def compile_form(vocabulary: "LLTokenizer", kind: str, text: str) -> "LLMatcher":
    """A matcher at its beginning, its first mask made. StructuredOutputError if the form cannot be used."""
    guidance = llguidance()
    try:
        if kind == "json_schema":
            options = {"whitespace_pattern": _WHITESPACE}
            grammar = guidance.LLMatcher.grammar_from_json_schema(text, overrides=options)
        else:
            grammar = guidance.grammar_from(kind, text)
    except Exception as error:  # noqa: BLE001 - its converters raise whatever they meet
        raise StructuredOutputError(f"structured output: {kind}: {one_line(str(error))}") from None
    matcher = guidance.LLMatcher(vocabulary, grammar, log_level=0, limits=guidance.LLParserLimits(**_LIMITS))
    allowed = 0 if matcher.is_error() else int.from_bytes(matcher.compute_bitmask(), "little")
    if matcher.is_error():
        raise StructuredOutputError(f"structured output: {kind}: {one_line(matcher.get_error())}")
    for token in vocabulary.eos_tokens:
        allowed &= ~(1 << token)
    if not allowed:
        raise StructuredOutputError(f"structured output: {kind}: it allows no text but the empty one")
    return matcher


class GrammarCheck:
    """The child process. It is started when it is first needed, and again after it was killed."""

    def __init__(self, tokenizer: str, size: int, eos: Sequence[int]):
        self._greeting = dict(tokenizer=tokenizer, size=size, eos=list(eos))
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def try_out(self, kind: str, text: str) -> None:
        """Returns if the form can be compiled. StructuredOutputError if not, or if it takes too long or too much."""
        with self._lock:
            if self._child is None:
                self._child = self._start()
            try:
                error = self._ask(self._child, dict(kind=kind, text=text), _SECONDS)
            except (OSError, EOFError, TimeoutError):
                self._stop()
                raise StructuredOutputError(
                    f"structured output: {kind}: it takes too long or too much memory to compile; make it simpler"
                ) from None
        if error:
            raise StructuredOutputError(error)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "slora_jax.grammar_check"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._child = child
        try:
            self._ask(child, self._greeting, _START_SECONDS)
        except (OSError, EOFError, TimeoutError):
            self._stop()
            raise StructuredOutputError("structured output: the process that checks grammars does not start") from None
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()

    @staticmethod
    def _ask(child: "subprocess.Popen[bytes]", question: dict[str, Any], seconds: float) -> str | None:
        """What went wrong there, or None. TimeoutError or EOFError if no answer comes."""
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(question).encode() + b"\n")
        child.stdin.flush()
        if not select.select([child.stdout], [], [], seconds)[0]:
            raise TimeoutError
        line = child.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)["error"]


def llguidance() -> Any:
    """The package. StructuredOutputError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise StructuredOutputError('structured output needs llguidance: pip install "slora-jax[structured]"') from None
    return llguidance


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"


def main() -> None:
    """The child: a vocabulary on the first line, then a form a line. It ends with its standard input."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    vocabulary = make_vocabulary(**json.loads(sys.stdin.buffer.readline()))
    error: str | None = None
    while True:
        sys.stdout.write(json.dumps({"error": error}) + "\n")
        sys.stdout.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            compile_form(vocabulary, **json.loads(line))
            error = None
        except StructuredOutputError as refused:
            error = str(refused)


if __name__ == "__main__":
    main()
