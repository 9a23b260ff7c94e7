"""Random weights made on the device, one array at a time: no host copy, no second copy of an array in device memory."""

import functools
import math
from typing import Any
import zlib

import jax
import jax.numpy as jnp

from slora_jax.loading.params import Progress, Shardings, resolve_dtype
from slora_jax.model_config import ModelConfig, param_specs


def random_params(
    config: ModelConfig,
    seed: int = 0,
    dtype: Any = "bfloat16",
    shardings: Shardings | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Parameters of ``param_specs(config)`` with values that keep activations finite.

    Matrices are normal with standard deviation 1/sqrt(inputs), norms near 1, biases near 0. The values depend on seed,
    parameter name and dtype only, not on the shardings.
    """
    dtype = resolve_dtype(dtype)
    specs = param_specs(config)
    total, done = sum(math.prod(spec.shape) for spec in specs.values()) * dtype.itemsize, 0
    params = {}
    for name, spec in specs.items():
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        mean, deviation = _moments(config, name, spec.shape)
        make = _maker(spec.shape, dtype, (shardings or {}).get(name))
        params[name] = jax.block_until_ready(make(key, mean, deviation))
        done += params[name].nbytes
        if progress:
            progress(done, total, name)
    return params


def _moments(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("norm"):
        return 1.0, 0.1
    if name == "bqkv":
        return 0.0, 0.1
    inputs = config.hidden_size if name in ("embed", "lm_head") else shape[-2]
    return 0.0, 1.0 / math.sqrt(inputs)


@functools.lru_cache(maxsize=64)
def _maker(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None):
    """Compiled (key, mean, deviation) -> array, made slice by slice along an axis that is never sharded.

    The random bits take several times the memory of the values, so they exist for one slice only: one layer of a
    stacked array, an eighth of the columns of an embedding table.
    """
    axis = 0 if len(shape) == 3 else len(shape) - 1
    slices = shape[0] if len(shape) == 3 else math.gcd(shape[-1], 8)
    part = (*shape[:axis], shape[axis] // slices, *shape[axis + 1 :])

    def make(key, mean, deviation):
        def fill(index, array):
            values = jax.random.normal(jax.random.fold_in(key, index), part, jnp.float32)
            values = (mean + deviation * values).astype(dtype)
            return jax.lax.dynamic_update_slice_in_dim(array, values, index * part[axis], axis)

        return jax.lax.fori_loop(0, slices, fill, jnp.zeros(shape, dtype))

    return jax.jit(make, out_shardings=sharding)
