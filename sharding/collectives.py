"""The base model's own collectives, inside shard_map: an embedding with a split vocabulary, sums of rows."""

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.mesh import AXIS


def embed(table: Float[Array, "V H"], tokens: Int[Array, "T"]) -> Float[Array, "T H"]:
    """Rows of an embedding table of which this device has a part; one all-reduce."""
    row = tokens - lax.axis_index(AXIS) * table.shape[0]
    mine = (row >= 0) & (row < table.shape[0])
    part = jnp.where(mine[:, None], table[jnp.where(mine, row, 0)], 0)
    return lax.psum(part, AXIS)


def sum_rows(part: jax.Array) -> jax.Array:
    """The all-reduce that ends a row-split projection."""
    return lax.psum(part, AXIS)
