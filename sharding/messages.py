"""Messages between the processes of one model as frames of bytes: JSON for what they are made of, and their arrays.

A received message is data only: it can hold plain values, arrays, and the dataclasses that the receiver names.
"""

from collections.abc import Iterable
import dataclasses
import functools
import json
from typing import Any

import numpy as np

_SCALARS = (bool, int, float, str)
_COLLECTIONS = (list, tuple, set, frozenset)


class Sender:
    """Makes frames of messages. An array that is the same as in the last message, at the same place, is not sent again:
    from one decode step to the next that is most of the page and adapter tables.
    """

    def __init__(self) -> None:
        self._last: list[bytes] = []

    def encode(self, message: Any) -> list[bytes]:
        """message: of None, bool, int, float, str, lists, tuples, sets, dicts with string keys, numpy arrays and
        scalars, and dataclasses of these. Raises TypeError for anything else.
        """
        arrays: list[bytes] = []
        body = json.dumps(_plain(message, arrays), separators=(",", ":")).encode()
        last = self._last
        changed = bytes(i >= len(last) or last[i] != array for i, array in enumerate(arrays))
        self._last = arrays
        return [body, changed, *[array for array, is_new in zip(arrays, changed, strict=True) if is_new]]


class Receiver:
    """Makes the messages of one Sender, in their order, of its frames."""

    def __init__(self) -> None:
        self._last: list[bytes] = []

    def decode(self, frames: list[bytes], types: Iterable[type] = ()) -> Any:
        """types: dataclasses that the message may hold. ValueError if it holds another. Arrays cannot be written to."""
        body, changed, *new = frames
        fresh = iter(new)
        self._last = [next(fresh) if is_new else self._last[i] for i, is_new in enumerate(changed)]
        return _value(json.loads(body), iter(self._last), {t.__name__: t for t in types})


def _plain(value: Any, arrays: list[bytes]) -> Any:
    """The value as JSON has it: what JSON does not know is a list of its kind and its parts."""
    if isinstance(value, np.ndarray):
        arrays.append(value.tobytes())
        return ["array", value.dtype.name, value.shape]
    if value is None or isinstance(value, _SCALARS):
        return value
    if isinstance(value, np.generic):
        return value.item()
    for kind in _COLLECTIONS:
        if isinstance(value, kind):
            return [kind.__name__, [_plain(item, arrays) for item in value]]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return ["dict", list(value), [_plain(item, arrays) for item in value.values()]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ["class", type(value).__name__, [_plain(getattr(value, n), arrays) for n in _fields(type(value))]]
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


@functools.cache
def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _value(plain: Any, arrays: Any, types: dict[str, type]) -> Any:
    if not isinstance(plain, list):
        return plain
    kind, *parts = plain
    if kind == "array":
        return np.frombuffer(next(arrays), np.dtype(parts[0])).reshape(parts[1])
    values = [_value(part, arrays, types) for part in parts[-1]]
    if kind == "class":
        if parts[0] not in types:
            raise ValueError(f"a message holds a {parts[0]}, which is not expected here")
        known = types[parts[0]]
        return known(**dict(zip(_fields(known), values, strict=True)))
    if kind == "dict":
        return dict(zip(parts[0], values, strict=True))
    return next(known for known in _COLLECTIONS if known.__name__ == kind)(values)
