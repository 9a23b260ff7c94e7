"""Rows of logits that are whole, or of which every device has some columns, as sampling sees them."""

import dataclasses

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sharding.layout import Layout
from sharding.mesh import AXIS


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Rows of `size` logits on one device."""

    size: int

    def columns(self, ids: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """Where tokens stand in this device's part of a row; past its end for those of others and for -1."""
        return jnp.where(ids >= 0, ids, self.size)

    def ids(self, columns: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """Tokens that stand in columns of this device's part."""
        return columns

    def part(self, rows: Shaped[Array, "R V"], columns: int) -> Shaped[Array, "R v"]:
        """This device's `columns` columns of whole rows."""
        return rows

    def join(self, part: Float[Array, "R v"]) -> Float[Array, "R V"]:
        """Whole rows from every device's part."""
        return part

    def pick(self, part: Float[Array, "R v"], ids: Int[Array, "R"]) -> Float[Array, "R"]:
        """One token's value in each row."""
        return jnp.take_along_axis(part, ids[:, None], axis=1)[:, 0]

    def merge(self, found: Int[Array, "R k"]) -> Int[Array, "N R k"]:
        """What each device found in its part, on every device."""
        return found[None]


@dataclasses.dataclass(frozen=True)
class SplitVocabulary(Vocabulary):
    """The same inside shard_map, for rows split in runs of the same length, as Layout.vocab cuts them. Where the last
    run ends past the vocabulary, its columns hold -inf.
    """

    width: int

    @staticmethod
    def of(layout: Layout) -> "SplitVocabulary":
        return SplitVocabulary(layout.vocab_size, layout.vocab.shape[1])

    def _first(self) -> jax.Array:
        return lax.axis_index(AXIS) * self.width

    def columns(self, ids: Int[Array, "*n"]) -> Int[Array, "*n"]:
        column = ids - self._first()
        return jnp.where((ids >= 0) & (column >= 0) & (column < self.width), column, self.width)

    def ids(self, columns: Int[Array, "*n"]) -> Int[Array, "*n"]:
        return columns + self._first()

    def part(self, rows: Shaped[Array, "R V"], columns: int) -> Shaped[Array, "R v"]:
        padded = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % columns)))
        return lax.dynamic_slice_in_dim(padded, self._first(), columns, axis=1)

    def join(self, part: Float[Array, "R v"]) -> Float[Array, "R V"]:
        return lax.all_gather(part, AXIS, axis=1, tiled=True)[:, : self.size]

    def pick(self, part: Float[Array, "R v"], ids: Int[Array, "R"]) -> Float[Array, "R"]:
        column = self.columns(ids)[:, None]
        found = jnp.take_along_axis(part, jnp.minimum(column, self.width - 1), axis=1)
        return lax.psum(jnp.where(column < self.width, found, 0)[:, 0], AXIS)

    def merge(self, found: Int[Array, "R k"]) -> Int[Array, "N R k"]:
        return lax.all_gather(found, AXIS)

    def hide_padding(self, part: Float[Array, "R v"]) -> Float[Array, "R v"]:
        """-inf in the columns past the vocabulary."""
        return jnp.where(self.ids(jnp.arange(self.width)) < self.size, part, -jnp.inf)
