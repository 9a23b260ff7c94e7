"""Which token may come next in an answer that has a form, through llguidance (https://github.com/guidance-ai/llguidance).

Grammars are compiled on the callers' threads; masks are made on the engine's, while the device computes the logits.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
import functools
import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from slora_jax.grammar_check import GrammarCheck, compile_form, llguidance, make_vocabulary, one_line
from slora_jax.structured import StructuredOutput, StructuredOutputError
from slora_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64  # compiled grammars
_END = "<|end of the structured output|>"


class Constraint:
    """How far one completion has come in its grammar. Masks are made and tokens are taken in turn.

    done: the text is complete, and nothing may follow.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, mask_words: int):
        """vocab_size: of the model. mask_words: 32-bit words of a mask of llguidance's."""
        self.matcher = matcher
        self.vocab_size = vocab_size
        self.mask_words = mask_words
        self.done = False

    def advance(self, token: int) -> str | None:
        """Takes the token that was chosen. Returns what went wrong, if anything did."""
        if not self.matcher.consume_token(token):
            return f"structured output: {one_line(self.matcher.get_error())}"
        self.done = self.matcher.is_stopped()
        return None


class Grammars:
    """Compiles the forms of answers for one model. May be called from any thread."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int], vocab_size: int):
        """vocab_size: tokens for which the model has a logit."""
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids)
        self._vocab_size = vocab_size
        self._kept: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._tools: tuple[LLTokenizer, GrammarCheck] | None = None
        self._making = threading.Lock()  # of _tools
        self._lock = threading.Lock()  # of _kept

    def start(self, wanted: StructuredOutput, n: int = 1) -> list[Constraint]:
        """Constraints of `n` completions. StructuredOutputError if the form cannot be used."""
        vocabulary, check = self._prepare()
        key = (wanted.kind, wanted.text())
        with self._lock:
            matcher = self._kept.get(key)
        if matcher is None:
            check.try_out(*key)
            matcher = compile_form(vocabulary, *key)
        with self._lock:
            self._kept[key] = matcher
            self._kept.move_to_end(key)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            words = (vocabulary.vocab_size + 31) // 32
            return [Constraint(matcher.deep_copy(), self._vocab_size, words) for _ in range(n)]

    def close(self) -> None:
        """Ends the process that tries grammars out."""
        with self._making:
            if self._tools is not None:
                self._tools[1].close()

    def _prepare(self) -> "tuple[LLTokenizer, GrammarCheck]":
        with self._making:
            if self._tools is None:
                if self._tokenizer is None:
                    raise StructuredOutputError("structured output needs a tokenizer, and this model has none")
                llguidance()
                data = json.loads(self._tokenizer.to_json())
                size, eos = max(self._tokenizer.vocab_size, self._vocab_size), self._eos
                if not eos:  # llguidance needs one: a token that the model does not have, so it is never chosen
                    eos, size = [size], size + 1
                    flags: dict[str, Any] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                    end = flags | dict(id=eos[0], content=_END, special=True)
                    data["added_tokens"] = [*data.get("added_tokens", ()), end]
                given = (json.dumps(data), size, eos)
                self._tools = make_vocabulary(*given), GrammarCheck(*given)
            return self._tools


def token_masks(constraints: Mapping[int, Constraint], rows: int) -> np.ndarray:
    """Which tokens may come next: uint32 [rows, W], where bit v % 32 of word v // 32 stands for token v.

    constraints: by row. Rows without one allow every token; without any constraint W is 0.
    """
    if not constraints:
        return np.zeros((rows, 0), np.uint32)
    some = next(iter(constraints.values()))
    masks = np.full((rows, some.mask_words), 0xFFFFFFFF, np.uint32)
    where = (masks.ctypes.data, masks.shape[1] * 4, rows)
    _executor().unsafe_compute_mask_ptr([(c.matcher, row) for row, c in constraints.items()], *where)
    return masks[:, : (some.vocab_size + 31) // 32]


@functools.cache
def _executor() -> Any:
    """Threads that make the masks of several rows at once."""
    return llguidance().LLExecutor()
