"""The padded shapes that steps are compiled for."""

import bisect
import dataclasses


def powers_of_two(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, … and `last` itself, which need not be a power of two."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return (*sizes, last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes in increasing order. Decode steps pad their sequences to one of `seqs`; steps with prompt chunks pad their
    tokens to one of `tokens`.
    """

    seqs: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def default(cls, max_seqs: int, max_step_tokens: int, *, gpu: bool = False) -> "Buckets":
        """Powers of two (decode from 1, prompt steps from 64), the largest sizes exact.

        gpu: without the small ones that take a GPU as long as the next, since reading the weights decides, and with
        some between the large ones, where every token of padding costs.
        """
        seqs, tokens = powers_of_two(1, max_seqs), powers_of_two(64, max(max_step_tokens, 64))
        if gpu:
            seqs = tuple(n for n in seqs if n not in (2, 4, 16) or n == max_seqs)
            between = (n + n // f for n in tokens for f, least in ((4, 512), (2, 256)) if least <= n < tokens[-1])
            sizes = sorted({*tokens, *(n for n in between if n < tokens[-1])})
            tokens = tuple(n for n in sizes if n >= 256 or n == tokens[-1])
        return cls(seqs=seqs, tokens=tokens)

    @property
    def max_seqs(self) -> int:
        return self.seqs[-1]

    @property
    def wide_rows(self) -> int:
        """Rows of logits of steps in which log-probabilities of prompts are wanted: more than the others have."""
        return self.max_seqs + min(self.tokens[-1], max(self.max_seqs, 256))

    def shape(self, num_seqs: int, num_tokens: int, decode_only: bool) -> tuple[int, int]:
        """Padded (sequences, tokens) of a step."""
        if decode_only:
            size = self.seqs[bisect.bisect_left(self.seqs, num_seqs)]
            return size, size
        return self.max_seqs, self.tokens[bisect.bisect_left(self.tokens, num_tokens)]
