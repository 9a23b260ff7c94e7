"""How the kernel for few adapters deals a group's outputs out: to pairs of thread blocks, in stripes of 64 outputs."""

import dataclasses
import itertools
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp

from pallas_kernels.geometry import GROUPS, TILE_COLS, Geometry, ceil_div
from pallas_kernels.lora.config import CLUSTERS

MOST_WIDE = 4
"""Stripes that a pair takes at a time: their sums are a thread's registers."""
HALF = TILE_COLS // 2


class Part(NamedTuple):
    """A module of the group: its place in the group, its number, its first stripe of the group's outputs and how many
    there are, its first pair and how many it has, and how many pairs before these have as many halves as any.
    """

    place: int
    module: int
    first: int
    stripes: int
    first_pair: int
    pairs: int
    full_before: int


class Tile(NamedTuple):
    """A stripe of a module, or half of one. shift: where the 64 columns that a pair takes begin, counted from the
    stripe's: for a half HALF before or after, and those that are not the stripe's are zeros.
    """

    stripe: Any
    shift: Any


@dataclasses.dataclass(frozen=True)
class Stripes:
    """No pair has stripes of two modules, so that it needs the A of one. Neighbours halve one if their number is odd.

    passes: how many times a pair goes through the input, at most. width: stripes and halves that it takes each time, at
    most. largest: halves that a pair has, a whole stripe being two. light: pairs that have less, or nothing. pairs:
    all.
    """

    parts: tuple[Part, ...]
    passes: int
    width: int
    largest: int
    light: int
    pairs: int

    @classmethod
    def of(cls, geometry: Geometry, group: str, pairs: int = CLUSTERS) -> "Stripes":
        """Gives the module with the most stripes a pair another one, as long as there are pairs."""
        modules = GROUPS[group]
        stripes = [geometry.out_tiles(m) for m in modules]
        given = [1] * len(modules)
        for _ in range(pairs - len(modules)):
            most = max(range(len(modules)), key=lambda i: stripes[i] / given[i])
            if given[most] == stripes[most]:
                break
            given[most] += 1
        halves = [_halves(n, of) for n, of in zip(stripes, given, strict=True)]
        largest = max(map(max, halves))
        full = [of.count(largest) for of in halves]
        before = [[sum(counts[:i]) for counts in (stripes, given, full)] for i in range(len(modules))]
        parts = [
            Part(i, m, first, stripes[i], first_pair, given[i], full_before)
            for i, (m, (first, first_pair, full_before)) in enumerate(zip(modules, before, strict=True))
        ]
        tiles = ceil_div(largest, 2)
        passes = ceil_div(tiles, MOST_WIDE)
        return cls(tuple(parts), passes, ceil_div(tiles, passes), largest, pairs - sum(full), pairs)

    def of_pair(self, pair) -> "PairStripes":
        """What a pair has to do: int32 scalars of a kernel, or a number."""
        chosen = [jnp.int32(v) for v in self.parts[0]]
        for part in self.parts[1:]:
            chosen = [jnp.where(pair >= part.first_pair, v, old) for v, old in zip(part, chosen, strict=True)]
        place, module, first, stripes, first_pair, pairs, full_before = chosen
        within = jnp.minimum(pair - first_pair, pairs)
        couple, second = within >> 1, within & 1
        begin, end = (jnp.minimum(lax.div(2 * (couple + i) * stripes + pairs - 1, pairs), stripes) for i in (0, 1))
        halves = jnp.where(2 * couple == pairs - 1, 2, 1) * (end - begin)
        # A module's couples have `largest` stripes or one less, or none of its pairs has as many halves.
        full_before += 2 * jnp.maximum(begin - couple * (self.largest - 1), 0)
        full_before += jnp.where(halves == self.largest, second, 0)
        halves = jnp.where(within < pairs, halves, 0)
        turn = jnp.where(halves < self.largest, pair - full_before, self.light + full_before)
        return PairStripes(self, place, module, first, begin, halves, second, turn)


def _halves(stripes: int, pairs: int) -> list[int]:
    """Of each of a module's pairs. Two neighbours have the same number. If one has no neighbour, it has no half one."""
    first = [min(ceil_div(2 * couple * stripes, pairs), stripes) for couple in range(ceil_div(pairs, 2) + 1)]
    couples = [(end - begin, min(2, pairs - 2 * i)) for i, (begin, end) in enumerate(itertools.pairwise(first))]
    return [2 * count // of for count, of in couples for _ in range(of)]


@dataclasses.dataclass(frozen=True)
class PairStripes:
    """place, module: as in Part. first: the module's first stripe of the group's outputs. begin: of the module's, the
    first one of the pair and its neighbour. halves: the pair's. second: 1 if it is the second of the two. turn: the
    pair's among all, if those with less to do come first.
    """

    stripes: Stripes
    place: Any
    module: Any
    first: Any
    begin: Any
    halves: Any
    second: Any
    turn: Any

    @property
    def modules(self) -> list[int]:
        """Of the group."""
        return [part.module for part in self.stripes.parts]

    @property
    def users(self):
        """Pairs with stripes of the module."""
        found = jnp.int32(self.stripes.parts[0].pairs)
        for part in self.stripes.parts[1:]:
            found = jnp.where(self.place == part.place, part.pairs, found)
        return found

    def tile(self, n) -> Tile:
        """The pair's n-th. The last one may be half a stripe, whose other half is the neighbour's last one."""
        whole = self.halves >> 1
        own = self.begin + jnp.where(self.second == 1, self.halves - whole, 0)
        side = jnp.where(self.second == 1, HALF, -HALF)
        return Tile(jnp.where(n == whole, self.begin + whole, own + n), jnp.where(n == whole, side, 0))

    def pass_of(self, number: int):
        """First tile of a pass, of the pair's, and how many it has: about the same each, never more than before."""
        passes, total = self.stripes.passes, (self.halves + 1) >> 1
        least = lax.div(total, jnp.int32(passes))
        longer = total - least * passes
        return number * least + jnp.minimum(number, longer), least + jnp.where(number < longer, 1, 0)

    def first_stages(self, number: int, count, deltas):
        """Of all stages, the first of a pass's base weights and the first of its deltas. These follow the next pass's
        base weights, so that others have the more time for their y.
        """
        has = [jnp.where(self.pass_of(n)[1] > 0, 1, 0) for n in range(self.stripes.passes)]
        before = lambda n: sum(has[: max(n, 0)], jnp.int32(0))  # noqa: E731
        base = before(number) * count + before(number - 1) * deltas
        return base, before(number + 2) * count + before(number) * deltas
