"""How many pages the pool gets."""

from collections.abc import Collection
import math
from pathlib import Path

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import GROUPS
from pallas_kernels.geometry import MODULES
from slora_jax.adapters import AdapterShape
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.engine_config import ResolvedConfig
from slora_jax.errors import CapacityError
from slora_jax.model_config import ModelConfig, param_specs
from slora_jax.parallel import Parallel, local_config
from slora_jax.program_shapes import StepOptions, StepShape
from slora_jax.programs import Programs
from slora_jax.step import Params

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
    options: StepOptions, params: Params, settings: ResolvedConfig, buckets: Buckets, max_model_len: int
) -> int:
    """Pages that fit: as page_pool_bytes says, or all memory that the weights and the steps leave free.

    The number of pages is part of a compiled step, while what a step needs beside the pool hardly depends on it. So the
    largest step is compiled for a guess, and once more if it needs more than the guess left it; an engine that compiles
    all steps ahead checks them all (see fitting_pages). The number is rounded down by less than 1 %, so that memory
    that differs a little from start to start does not make another program of every step.

    settings must be resolved. Raises CapacityError if not even one page fits.
    """
    size = page_bytes(options.config, settings.dtype, options.parallel)
    if settings.page_pool_bytes is not None or device_memory() is None:
        budget = settings.page_pool_bytes or _CPU_POOL_BYTES
        if budget < size:
            raise CapacityError(
                f"page_pool_bytes {budget} is less than one page of this model ({size} bytes); set it higher"
            )
        return budget // size
    guess = fitting_pages(options, settings, buckets, 1 << 30)
    for _ in range(2):
        if guess < 1:
            break
        need = _step_bytes(options, params, settings, buckets, max_model_len, guess)
        fits = fitting_pages(options, settings, buckets, need)
        if fits >= guess:
            return guess
        guess = fits
    if guess < 1:
        memory = device_memory()
        assert memory is not None
        limit, used = memory
        raise CapacityError(
            f"no memory is left for the page pool: {used / 2**30:.1f} of {limit / 2**30:.1f} GiB are used by the "
            "weights; "
            "use a smaller model or a larger GPU, or lower max_step_tokens"
        )
    return guess


def fitting_pages(options: StepOptions, settings: ResolvedConfig, buckets: Buckets, temp_bytes: int) -> int:
    """Pages that fit beside the weights and programs that need `temp_bytes`, or 0. Only where the device tells."""
    memory = device_memory()
    assert memory is not None
    limit, used = memory
    logits = 2 * buckets.wide_rows * options.config.vocab_size * 4  # float32, of two steps
    free = int(limit * (1 - _MARGIN)) - used - logits - temp_bytes
    if not settings.warm_up:
        # XLA times its matrix products on buffers of its own when it compiles a step, here with the pool in place: as
        # large as the largest argument, which is a stacked weight
        free -= max(_param_sizes(options.config, options.parallel)) * options.dtype.itemsize
    pages = max(0, free // page_bytes(options.config, options.dtype, options.parallel))
    return pages - pages % (1 << max(0, pages.bit_length() - 8))


def step_options(
    config: ModelConfig,
    settings: ResolvedConfig,
    shapes: Collection[AdapterShape] = (),
    parallel: Parallel | None = None,
) -> StepOptions:
    """What the compiled steps of an engine have in common.

    shapes: of the adapters that are known. They bound the rank, and groups of projections that none of them targets get
    no LoRA launches. Where there are none, or settings.max_lora_rank announces others, steps take every group that
    settings.lora_targets allows; in deterministic mode as well, whose programs never change.
    """
    max_rank = settings.max_lora_rank or max((shape.max_rank for shape in shapes), default=8)
    announced = settings.max_lora_rank is not None or settings.deterministic or not shapes
    modules = settings.lora_targets or MODULES
    allowed = frozenset(group for group, members in GROUPS.items() if any(MODULES[i] in modules for i in members))
    targeted = allowed if announced else frozenset().union(*(shape.groups for shape in shapes))
    return StepOptions(
        config=config,
        dtype=jnp.dtype(settings.dtype),
        max_rank=max(8, 1 << (max_rank - 1).bit_length()),
        lora_groups=tuple(group for group in GROUPS if group in targeted),
        implementation=settings.implementation,
        loop=settings.loop,
        parallel=parallel,
    )


def steps_dir(settings: ResolvedConfig) -> Path | None:
    """Where compiled steps are kept between runs."""
    return Path(settings.compile_cache_dir) / "steps" if settings.compile_cache_dir else None


def _step_bytes(
    options: StepOptions, params: Params, settings: ResolvedConfig, buckets: Buckets, max_model_len: int, num_pages: int
) -> int:
    """Temporary memory of the largest step, from its compiled program."""
    layout = options.parallel.layout if options.parallel else None
    builder = BatchBuilder(options.config.geometry, buckets, num_pages, max_model_len, layout)
    programs = Programs(options, params, builder, steps_dir(settings))
    shape = StepShape(buckets.max_seqs, buckets.tokens[-1], buckets.max_seqs, False, True)
    programs.compile(shape)
    return programs.temp_bytes(shape)
