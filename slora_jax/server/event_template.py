"""Events that differ in their text and token ids only: one is written, the others are filled in."""

from collections.abc import Sequence

from slora_jax.server.events import to_json


class EventTemplate:
    """Made of an event whose text is TEXT and whose token ids, if it has them, are TOKENS."""

    TEXT, TOKENS = "\0", (0,)

    def __init__(self, example: bytes):
        # they stand in the choice, which comes last, so nothing that a caller named can be taken for them
        self._head, _, rest = example.rpartition(to_json(self.TEXT))
        self._between, self._token_ids, self._end = rest.partition(to_json(self.TOKENS))

    def fill(self, text: str, token_ids: Sequence[int]) -> bytes:
        """The event of a text and its tokens."""
        written = to_json(text) if text else b'""'
        if not self._token_ids:
            return b"%b%b%b" % (self._head, written, self._between)
        ids = b"%d" % token_ids[0] if len(token_ids) == 1 else ",".join(map(str, token_ids)).encode()
        return b"%b%b%b[%b]%b" % (self._head, written, self._between, ids, self._end)
