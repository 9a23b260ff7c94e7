"""How the kernel for few adapters deals a group's outputs out to thread blocks and pairs of them: in stripes of 64."""

import dataclasses
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp

from pallas_kernels.geometry import GROUPS, Geometry, ceil_div
from pallas_kernels.lora.config import CLUSTER, CLUSTERS

MOST_WIDE = 4
"""Stripes that a thread block takes at a time: their sums are a thread's registers."""
LEAST_OWN = 2
"""Stripes that a thread block must have to take them by itself."""


class Part(NamedTuple):
    """A module of the group: its place in the group, its number, its first stripe of the group's outputs and how many
    there are, its first pair and how many it has, and how many pairs before these have as many stripes as any.
    """

    place: int
    module: int
    first: int
    stripes: int
    first_pair: int
    pairs: int
    full_before: int


@dataclasses.dataclass(frozen=True)
class Stripes:
    """No pair has stripes of two modules, so that it needs the A of one. All pairs of a module go through neighbouring
    stripes at a time.

    each: thread blocks of a pair that have stripes of their own; if it is one, both take the same, each with half of
    the input. passes: how many times a thread block goes through its input, at most. width: stripes that it takes each
    time, at most. largest: that a pair has. light: pairs that have less, or nothing. pairs: all.
    """

    parts: tuple[Part, ...]
    each: int
    passes: int
    width: int
    largest: int
    light: int
    pairs: int

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        group: str,
        pairs: int = CLUSTERS,
        most_each: int = CLUSTER,
        most_wide: int = MOST_WIDE,
    ) -> "Stripes":
        """Gives the module with the most stripes a pair another one, as long as there are pairs. Where all pairs have
        enough, nothing is halved, and nobody needs another one's sums.
        """
        modules = GROUPS[group]
        stripes = [geometry.out_tiles(m) for m in modules]
        given = [1] * len(modules)
        for _ in range(pairs - len(modules)):
            most = max(range(len(modules)), key=lambda i: stripes[i] / given[i])
            if given[most] == stripes[most]:
                break
            given[most] += 1
        largest = max(ceil_div(n, of) for n, of in zip(stripes, given, strict=True))
        full = [max(n - of * (largest - 1), 0) for n, of in zip(stripes, given, strict=True)]
        before = [[sum(counts[:i]) for counts in (stripes, given, full)] for i in range(len(modules))]
        parts = [
            Part(i, m, first, stripes[i], first_pair, given[i], full_before)
            for i, (m, (first, first_pair, full_before)) in enumerate(zip(modules, before, strict=True))
        ]
        has_own = all(n >= LEAST_OWN * most_each * of for n, of in zip(stripes, given, strict=True))
        each = most_each if has_own else 1
        most = max(ceil_div(n, of * each) for n, of in zip(stripes, given, strict=True))
        passes = ceil_div(most, most_wide)
        return cls(tuple(parts), each, passes, ceil_div(most, passes), largest, pairs - sum(full), pairs)

    def of_pair(self, pair, part) -> "PairStripes":
        """What a thread block of a pair has to do: int32 scalars of a kernel, or numbers."""
        chosen = [jnp.int32(v) for v in self.parts[0]]
        for of in self.parts[1:]:
            chosen = [jnp.where(pair >= of.first_pair, v, old) for v, old in zip(of, chosen, strict=True)]
        place, module, first, stripes, first_pair, pairs, full_before = chosen
        within = jnp.minimum(pair - first_pair, pairs)
        passes, total, blocks = [], jnp.int32(0), pairs * self.each
        number = within * self.each + (part if self.each > 1 else 0)
        for i in range(self.passes):
            before = jnp.minimum(i * blocks * self.width, stripes)
            length = jnp.minimum(stripes - before, blocks * self.width)
            begin, end = _share(number, length, blocks), _share(number + 1, length, blocks)
            passes.append((before + begin, jnp.where(within < pairs, end - begin, 0)))
            total += _share(within + 1, length, pairs) - _share(within, length, pairs)
        # A module's pairs have `largest` stripes or one less, or none of them has `largest`.
        least_of_last = self.largest - 1 - (self.passes - 1) * self.width * self.each
        full_before += jnp.maximum(_share(within, length, pairs) - within * least_of_last, 0)
        is_light = (total < self.largest) | (within == pairs)
        turn = jnp.where(is_light, pair - full_before, self.light + full_before)
        return PairStripes(self, place, module, first, passes, turn)


def _share(number, length, takers):
    """Where the share of one of so many takers begins, of `length` in a row."""
    return lax.div(number * length, takers)


@dataclasses.dataclass(frozen=True)
class PairStripes:
    """Of a thread block. place, module: as in Part. first: the module's first stripe of the group's outputs. passes:
    first stripe of each, of the module's, and how many it has, never more than the one before. turn: the pair's among
    all, if those with less to do come first.
    """

    stripes: Stripes
    place: Any
    module: Any
    first: Any
    passes: list
    turn: Any

    @property
    def modules(self) -> list[int]:
        """Of the group."""
        return [part.module for part in self.stripes.parts]

    @property
    def users(self):
        """Thread blocks that multiply the same ranks with B of the module."""
        found = jnp.int32(self.stripes.parts[0].pairs)
        for part in self.stripes.parts[1:]:
            found = jnp.where(self.place == part.place, part.pairs, found)
        return found * self.stripes.each

    def first_stages(self, number: int, count, deltas):
        """Of all stages, the first of a pass's base weights and the first of its deltas. These follow the next pass's
        base weights, so that others have the more time for their y.
        """
        has = [jnp.where(count > 0, 1, 0) for _, count in self.passes]
        before = lambda n: sum(has[: max(n, 0)], jnp.int32(0))  # noqa: E731
        base = before(number) * count + before(number - 1) * deltas
        return base, before(number + 2) * count + before(number) * deltas
