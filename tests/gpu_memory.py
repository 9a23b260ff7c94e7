"""Makes what a kernel forgets to write visible."""

import jax
from jax import numpy as jnp


def poison(like) -> None:
    """On a GPU, fills memory that the next arrays of these shapes are likely to get with NaN."""
    if jax.default_backend() == "gpu":
        fills = [[jnp.full(x.shape, jnp.nan, x.dtype) for _ in range(2)] for x in jax.tree.leaves(like)]
        jax.block_until_ready(fills)
