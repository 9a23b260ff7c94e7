"""How many pages the pool gets."""

import math

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from slora_jax.batch import State
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.engine_config import ResolvedConfig
from slora_jax.errors import CapacityError
from slora_jax.model_config import ModelConfig, param_specs
from slora_jax.parallel import Parallel, local_config
from slora_jax.step import Params, make_forward

_CPU_POOL_BYTES = 1 << 30
_MARGIN = 0.03  # of the device's memory, left for fragmentation and small arrays


def page_bytes(config: ModelConfig, dtype: DTypeLike, parallel: Parallel | None = None) -> int:
    """Bytes of one page id over all layers, on one device."""
    geometry = parallel.layout.local if parallel else config.geometry
    return config.num_layers * geometry.page_elements * jnp.dtype(dtype).itemsize


def num_weights(config: ModelConfig) -> int:
    """Parameters of the whole model."""
    return sum(_param_sizes(config, None))


def weight_bytes(config: ModelConfig, dtype: DTypeLike, parallel: Parallel | None = None) -> int:
    """Bytes of the parameters on one device."""
    return sum(_param_sizes(config, parallel)) * jnp.dtype(dtype).itemsize


def _param_sizes(config: ModelConfig, parallel: Parallel | None) -> list[int]:
    part = local_config(config, parallel.layout) if parallel else config
    return [math.prod(s.shape) for s in param_specs(part).values()]


def device_memory() -> tuple[int, int] | None:
    """(limit, in use) of the first device in bytes, or None where the backend does not tell."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"], stats["bytes_in_use"]


def check_weights_fit(config: ModelConfig, dtype: str, name: str, parallel: Parallel | None = None) -> None:
    """Raises CapacityError, before anything is loaded, if the weights alone exceed the device's memory."""
    memory = device_memory()
    need = weight_bytes(config, dtype, parallel)
    if memory and need > memory[0] - memory[1]:
        raise CapacityError(
            f"{name} needs {need / 2**30:.1f} GiB of device memory in {dtype}, "
            f"{(memory[0] - memory[1]) / 2**30:.1f} GiB are free; "
            "use a smaller model, a larger GPU, a higher tensor_parallel, or raise XLA_PYTHON_CLIENT_MEM_FRACTION"
        )


def choose_num_pages(
    config: ModelConfig,
    params: Params,
    settings: ResolvedConfig,
    buckets: Buckets,
    max_model_len: int,
    max_rank: int,
    parallel: Parallel | None = None,
) -> int:
    """Pages that fit: as page_pool_bytes says, or all memory that the weights and the largest step leave free.

    settings must be resolved. Raises CapacityError if not even one page fits.
    """
    size = page_bytes(config, settings.dtype, parallel)
    memory = device_memory()
    if settings.page_pool_bytes is not None or memory is None:
        budget = settings.page_pool_bytes or _CPU_POOL_BYTES
        if budget < size:
            raise CapacityError(
                f"page_pool_bytes {budget} is less than one page of this model ({size} bytes); set it higher"
            )
        return budget // size
    limit, used = memory
    logits = 4 * buckets.max_seqs * config.vocab_size * 4  # float32, and the sampler's temporaries
    # XLA times its matrix products on buffers of its own when it compiles a step, also one that is compiled later: as
    # large as the largest argument, which is a stacked weight
    tuning = max(_param_sizes(config, parallel)) * jnp.dtype(settings.dtype).itemsize
    free = int(limit * (1 - _MARGIN)) - used - logits - tuning
    # the need of a step hardly depends on the number of pages, but the compiled program does: guess, compile, correct
    guess = (free - (1 << 30)) // size
    for _ in range(2):
        if guess < 1:
            break
        need = _step_bytes(config, params, settings, buckets, max_model_len, max_rank, parallel, guess)
        fits = (free - need) // size
        if fits >= guess:
            return guess
        guess = fits
    if guess < 1:
        raise CapacityError(
            f"no memory is left for the page pool: {used / 2**30:.1f} of {limit / 2**30:.1f} GiB are used by the "
            "weights; "
            "use a smaller model or a larger GPU, or lower max_step_tokens"
        )
    return guess


def _step_bytes(config, params, settings, buckets, max_model_len, max_rank, parallel, num_pages) -> int:
    """Temporary memory of the largest step, from its compiled program."""
    forward = make_forward(
        config,
        dtype=jnp.dtype(settings.dtype),
        max_rank=max_rank,
        implementation=settings.implementation,
        loop=settings.loop,
        parallel=parallel,
    )
    layout = parallel.layout if parallel else None
    builder = BatchBuilder(config.geometry, buckets, num_pages, max_model_len, layout)
    batch = builder.padding(buckets.max_seqs, buckets.tokens[-1], decode_only=False, use_adapters=True)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)
    elements = parallel.page_elements if parallel else config.geometry.page_elements
    shape = (config.num_layers, num_pages, elements)
    where = parallel.pool if parallel else None
    state = State(pages=jax.ShapeDtypeStruct(shape, jnp.dtype(settings.dtype), sharding=where))
    compiled = jax.jit(forward, donate_argnums=1).lower(params, state, batch).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None, "the backend does not tell how much memory a program needs"
    return analysis.temp_size_in_bytes
