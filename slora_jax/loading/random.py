"""Random weights made on the device, one array at a time: no host copy, no second copy of an array in device memory."""

from concurrent.futures import ThreadPoolExecutor
import functools
import math
from typing import Any
import zlib

import jax
import jax.numpy as jnp

from sharding import WHOLE, Shards, partition
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
    for name in specs:
        make, args = _program(config, name, seed, dtype, shardings)
        params[name] = jax.block_until_ready(make(*args))
        done += params[name].nbytes
        if progress:
            progress(done, total, name)
    return params


def compile_random_params(config: ModelConfig, dtype: Any = "bfloat16", shardings: Shardings | None = None) -> None:
    """Compiles what random_params needs, side by side, for JAX's compile cache. Takes no device memory."""

    def compile_one(name: str) -> None:
        make, args = _program(config, name, 0, resolve_dtype(dtype), shardings)
        make.lower(*args).compile()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(compile_one, param_specs(config)))


def _program(config: ModelConfig, name: str, seed: int, dtype: Any, shardings: Shardings | None) -> tuple[Any, Any]:
    """What makes one parameter, and its arguments."""
    shape = param_specs(config)[name].shape
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    where = (shardings or {}).get(name)
    maker = _shards_maker(shape, dtype, where) if isinstance(where, Shards) else _maker(shape, dtype, where)
    return maker, (key, *_moments(config, name, shape))


def _moments(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("norm"):
        return 1.0, 0.1
    if name == "bqkv":
        return 0.0, 0.1
    inputs = config.hidden_size if name in ("embed", "lm_head") else shape[-2]
    return 0.0, 1.0 / math.sqrt(inputs)


def _filler(shape: tuple[int, ...], dtype: Any):
    """``(axis, fill)``: ``fill(key, mean, deviation, pick) -> array`` is made slice by slice along `axis`.

    The random bits take several times the memory of the values, so they exist for one slice only: one layer of a
    stacked array, an eighth of the columns of an embedding table. pick: what to keep of a slice.
    """
    axis = 0 if len(shape) == 3 else len(shape) - 1
    slices = shape[0] if len(shape) == 3 else math.gcd(shape[-1], 8)
    part = (*shape[:axis], shape[axis] // slices, *shape[axis + 1 :])

    def fill(key, mean, deviation, pick):
        def values(index):
            drawn = jax.random.normal(jax.random.fold_in(key, index), part, jnp.float32)
            return pick((mean + deviation * drawn).astype(dtype))

        def body(index, array):
            return jax.lax.dynamic_update_slice_in_dim(array, values(index), index * part[axis], axis)

        kept = list(jax.eval_shape(values, 0).shape)
        kept[axis] = shape[axis]
        return jax.lax.fori_loop(0, slices, body, jnp.zeros(kept, dtype))

    return axis, fill


@functools.lru_cache(maxsize=64)
def _maker(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None):
    """Compiled (key, mean, deviation) -> array."""
    _, fill = _filler(shape, dtype)
    return jax.jit(lambda key, mean, deviation: fill(key, mean, deviation, lambda x: x), out_shardings=sharding)


def _shards_maker(shape: tuple[int, ...], dtype: Any, shards: Shards):
    """The same where every device keeps some elements of an axis: it draws a slice whole and picks its own."""
    axis, fill = _filler(shape, dtype)

    def make(key, mean, deviation, index):
        def pick(x):
            real = (index >= 0).reshape(-1, *[1] * (len(shape) - 1 - shards.axis))
            return jnp.where(real, jnp.take(x, jnp.maximum(index, 0), axis=shards.axis), 0)

        if shards.axis == axis:  # biases, which are small
            return pick(fill(key, mean, deviation, lambda x: x))
        return fill(key, mean, deviation, pick)

    split = jax.shard_map(
        make,
        mesh=shards.mesh,
        in_specs=(WHOLE, WHOLE, WHOLE, partition("device")),
        out_specs=shards.sharding.spec,
        check_vma=False,
    )
    return jax.jit(lambda key, mean, deviation: split(key, mean, deviation, shards.index.ravel()))
