"""How the kernel for few adapters deals a group's outputs out: to pairs of thread blocks, in stripes of 64 outputs."""

import dataclasses
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp

from pallas_kernels.geometry import GROUPS, Geometry, ceil_div
from pallas_kernels.lora.config import CLUSTERS

MOST_WIDE = 3
"""Stripes that a pair takes at a time: their sums are a thread's registers."""


class Part(NamedTuple):
    """A module of the group: its place in the group, its number, its first stripe of the group's outputs and how many
    there are, and its first pair and how many it has.
    """

    place: int
    module: int
    first: int
    stripes: int
    first_pair: int
    pairs: int


@dataclasses.dataclass(frozen=True)
class Stripes:
    """No pair has stripes of two modules, so that it needs the A of one.

    passes: how many times a pair goes through the input, at most. width: stripes that it takes each time, at most.
    """

    parts: tuple[Part, ...]
    passes: int
    width: int

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
        parts = [Part(i, m, sum(stripes[:i]), stripes[i], sum(given[:i]), given[i]) for i, m in enumerate(modules)]
        largest = max(ceil_div(part.stripes, part.pairs) for part in parts)
        passes = ceil_div(largest, MOST_WIDE)
        return cls(tuple(parts), passes, ceil_div(largest, passes))

    @property
    def users(self) -> int:
        """Pairs with stripes, the first ones."""
        return sum(part.pairs for part in self.parts)

    def of_pair(self, pair) -> "PairStripes":
        """What a pair has to do: int32 scalars of a kernel, or a number."""
        chosen = [jnp.int32(v) for v in self.parts[0]]
        for part in self.parts[1:]:
            chosen = [jnp.where(pair >= part.first_pair, v, old) for v, old in zip(part, chosen, strict=True)]
        place, module, first, stripes, first_pair, pairs = chosen
        within = pair - first_pair
        begin, end = (lax.div((within + i) * stripes, pairs) for i in (0, 1))
        live = within < pairs
        return PairStripes(self, place, module, first, jnp.where(live, begin, 0), jnp.where(live, end, 0))


@dataclasses.dataclass(frozen=True)
class PairStripes:
    """place, module: as in Part. first: the module's first stripe of the group's outputs. begin, end: the pair's, of
    the module's.
    """

    stripes: Stripes
    place: Any
    module: Any
    first: Any
    begin: Any
    end: Any

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

    def pass_of(self, number: int):
        """First stripe of a pass, of the module's, and how many it has: about the same each, never more than before."""
        passes, total = self.stripes.passes, self.end - self.begin
        least = lax.div(total, jnp.int32(passes))
        longer = total - least * passes
        return self.begin + number * least + jnp.minimum(number, longer), least + jnp.where(number < longer, 1, 0)
