"""What an engine's settings ask for: how many devices, and which layout its adapters get there."""

from collections.abc import Collection

import jax
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike
import numpy as np

from pallas_kernels.geometry import ceil_div
from sharding import CostModel, LoraLayout, Room, choose_layout, join, make_mesh
from slora_jax.adapters import AdapterShape
from slora_jax.engine_config import ResolvedConfig
from slora_jax.errors import SloraError
from slora_jax.memory import device_memory, step_options, weight_bytes
from slora_jax.model_config import ModelConfig
from slora_jax.parallel import Parallel, make_parallel

_SPARE_BYTES = 3 << 30  # of a device, for steps' temporaries and fragmentation
_MOST_CONTEXT = 512
"""Tokens that a sequence is taken to have, or 3/8 of the longest if that is less: the mean over its life, where
prompts and answers are of any length up to half of it.
"""


def choose_parallel(
    config: ModelConfig, settings: ResolvedConfig, num_adapters: int, shapes: Collection[AdapterShape]
) -> Parallel | None:
    """What an engine's settings ask for; None for one device. lora_layout "auto" takes the layouts under which most
    tokens come a second, in decode steps of half of the most sequences, or as many of these as have room, in which the
    adapters known at start (or, if there are none, as many as sequences) are used at random.

    Raises SloraError if there are not enough devices, or if a device's part of a page is no whole number of tiles.
    """
    if settings.tensor_parallel == 1 and jax.process_count() == 1:
        return None
    try:
        mesh = make_mesh(settings.tensor_parallel)
        if {device.process_index for device in mesh.devices.flat} != set(range(jax.process_count())):
            raise ValueError(
                f"it leaves a process without a device; there are {jax.device_count()} devices in "
                f"{jax.process_count()} processes"
            )
        if settings.lora_layout != "auto":
            return make_parallel(config, mesh, settings.lora_layout)
        if jax.process_count() > 1:
            join().meet()
        ranks = [shape.max_rank for shape in shapes] or [settings.max_lora_rank or 16]
        lora = auto_layout(
            config,
            mesh,
            dtype=settings.dtype,
            max_seqs=settings.max_seqs,
            max_model_len=min(settings.max_model_len or config.max_position, config.max_position),
            adapters=num_adapters or settings.max_seqs,
            rank=ceil_div(sum(ranks), len(ranks)),
            groups=step_options(config, settings, shapes).lora_groups,
            pool_bytes=settings.page_pool_bytes,
            model=CostModel.measure(mesh),
        )
        if jax.process_count() > 1:  # each has measured for itself
            first = multihost_utils.broadcast_one_to_all(np.array([layout == "s-lora" for layout in lora]))
            lora = tuple("s-lora" if scattered else "comm-free" for scattered in first)
        return make_parallel(config, mesh, lora)
    except ValueError as error:
        raise SloraError(f"tensor_parallel {settings.tensor_parallel} is not possible: {error}") from None


def auto_layout(
    config: ModelConfig,
    mesh: Mesh,
    *,
    dtype: DTypeLike,
    max_seqs: int,
    max_model_len: int,
    adapters: int,
    rank: int,
    groups: Collection[str],
    pool_bytes: int | None,
    model: CostModel,
) -> tuple[LoraLayout, ...]:
    """The layout of each of GROUPS that "auto" stands for.

    rank: of the adapters, on average, on every module of `groups`. pool_bytes: of a device's page pool; None: what the
    weights leave of its memory.
    """
    parallel = make_parallel(config, mesh)
    weights, memory = weight_bytes(config, dtype, parallel), device_memory()
    if pool_bytes is None and memory is not None:
        pool_bytes = max(0, memory[0] - weights - _SPARE_BYTES)
    room = None
    if pool_bytes is not None:
        share = 2 / jnp.dtype(dtype).itemsize  # Room counts in 2 bytes, as CostModel does
        context = min(max_model_len * 3 // 8, _MOST_CONTEXT)
        room = Room(bytes=pool_bytes * share, context=context, weights=weights * share)
    return choose_layout(
        config.geometry,
        devices=parallel.layout.devices,
        tokens=max(1, max_seqs // 2),  # most steps have fewer than the most
        adapters=adapters,
        rank=rank,
        model=model,
        groups=groups,
        room=room,
    )
