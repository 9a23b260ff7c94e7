"""Pieces of an answer that have gathered become one, so that a server that is behind has less to write."""

from collections.abc import Sequence
import dataclasses

from slora_jax.requests import Delta


def merged(pieces: Sequence[tuple[int, Delta]]) -> Sequence[tuple[int, Delta]]:
    """The same answers in fewer pieces: (index of the prompt, Delta). Those with log-probabilities stay as they are,
    and so do ends that are told in another way than as the end of a text.
    """
    if len(pieces) < 2:
        return pieces
    last: dict[tuple[int, int], int] = {}  # where the choice's last piece stands
    result: list[tuple[int, Delta]] = []
    for prompt, piece in pieces:
        at = last.get((prompt, piece.index))
        if at is not None and piece.logprobs is None and piece.finish_reason in (None, "stop", "length"):
            before = result[at][1]
            text, ids = before.text + piece.text, (*before.token_ids, *piece.token_ids)
            result[at] = prompt, dataclasses.replace(piece, text=text, token_ids=ids)
        else:
            last[prompt, piece.index] = len(result)
            result.append((prompt, piece))
    return result
