"""Text of one completion as its tokens arrive: stop strings are found and never shown, characters are never split."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Detokenizer(Protocol):
    """Turns token ids into text piece by piece; a piece is empty while a character is incomplete."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """Collects text and says which part of it may be shown.

    detokenizer: None for models without a tokenizer, whose text stays empty.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: Sequence[str]):
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._shown = 0
        self.text = ""

    def push(self, token_id: int) -> str | None:
        """Adds a token. Returns the stop string that it completed, if any; the text then ends before it."""
        if self._detokenizer is None:
            return None
        return self._add(self._detokenizer.push(token_id))

    def flush(self) -> str | None:
        """Adds what was left of an incomplete character; nothing follows. Returns as push does."""
        if self._detokenizer is None:
            return None
        return self._add(self._detokenizer.flush())

    def take(self, final: bool) -> str:
        """New text that may be shown: all of it when `final`, else without a tail that could begin a stop string."""
        end = len(self.text) if final else len(self.text) - self._held_back()
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _add(self, piece: str) -> str | None:
        if not piece:
            return None
        seen = len(self.text)
        self.text += piece
        found = []
        for stop in self._stop:
            at = self.text.find(stop, max(0, seen - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[:at]
        return stop

    def _held_back(self) -> int:
        for n in range(max(map(len, self._stop), default=1) - 1, 0, -1):
            if any(len(stop) > n and self.text.endswith(stop[:n]) for stop in self._stop):
                return n
        return 0
