"""Which of the two adapter layouts a group of projections gets.

S-LoRA's layout costs one small collective a group, layer and step; the communication-free one costs reading A (of qkv
and gu) or B (of o and down) whole on every device, once for each adapter of the step, and the room to keep it there.
"""

from collections.abc import Callable, Collection
import dataclasses
import itertools
import time
from typing import Any, Literal

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
import numpy as np

from pallas_kernels.geometry import GROUPS, Geometry
from sharding.layout import ROW_GROUPS, LoraLayout
from sharding.mesh import AXIS, WHOLE, partition

_MEMORY_SHARE = 0.62
_BASE_SHARE = 0.88  # of the memory's rate, that copies and the base model's products reach
_CHAIN = 64  # collectives in a row, so that the call itself does not count


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostModel:
    """What a device and its links can do. The defaults are an H200's: data sheet rates, times a usual 0.8 of the
    links and the 0.62 that LoRA's kernels reach of the memory.

    latency, gather_latency: of a small all-reduce and all-gather, in seconds; see measure. rows, gather_rows: seconds
    around each, of small kernels that turn what the LoRA kernels exchange into a row a token and back, and of an
    all-gather that stands outside the command buffers, as measured on two and four H200s with llama-70b-m
    (docs/performance.md, Several GPUs). link_rate: bytes/s that a device sends. memory_rate: bytes/s that LoRA reads.
    """

    latency: float = 10e-6
    gather_latency: float = 10e-6
    rows: float = 8e-6
    gather_rows: float = 40e-6
    link_rate: float = 0.8 * 450e9
    memory_rate: float = _MEMORY_SHARE * 4.8e12

    @classmethod
    def measure(cls, mesh: Mesh) -> "CostModel":
        """For the devices of a mesh: latencies are measured, a kind that is not known otherwise counts as an H200."""
        rate = 3.35e12 if "H100" in mesh.devices.flat[0].device_kind else 4.8e12
        latency, gather = measure_latency(mesh), collective_timer(mesh, operation="all-gather")()
        return cls(latency=latency, gather_latency=gather, memory_rate=_MEMORY_SHARE * rate)

    def extra_seconds(
        self,
        layout: LoraLayout,
        group: str,
        geometry: Geometry,
        *,
        devices: int,
        tokens: int,
        adapters: float,
        rank: int,
    ) -> float:
        """Time a step of one layer loses to a group's layout, against cutting the adapter in N with nothing to send.

        tokens, adapters: in the step. rank: of every module. Weights are counted in 2 bytes, ``x A`` in 4.
        """
        modules = GROUPS[group]
        row = group in ROW_GROUPS
        others = (devices - 1) / devices
        if layout == "s-lora":
            sent = others * tokens * rank * len(modules) * 4 * (2 if row else 1)
            latency = self.latency + self.rows if row else self.gather_latency + self.gather_rows
            return (latency if devices > 1 else 0.0) + sent / self.link_rate
        width = geometry.out_sizes[modules[0]] if row else geometry.in_sizes[modules[0]]
        return others * adapters * rank * len(modules) * width * 2 / self.memory_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """What bounds the number of sequences that run on a device, everything counted in 2 bytes.

    bytes: for keys and values and adapters. context: tokens of a sequence, typically. weights: bytes of the base model
    that a step reads.
    """

    bytes: float
    context: int
    weights: float


def choose_layout(
    geometry: Geometry,
    *,
    devices: int,
    tokens: int,
    adapters: int,
    rank: int,
    model: CostModel,
    groups: Collection[str] = tuple(GROUPS),
    room: Room | None = None,
) -> tuple[LoraLayout, ...]:
    """The layouts under which most tokens come a second, in the order of GROUPS, of decode steps of `tokens` tokens,
    each with one of `adapters` adapters at random.

    rank: of every module of `groups`; other groups have no adapters. room: where memory may let fewer sequences run,
    because a layout keeps more of each adapter on every device; None: all of them do.
    """
    weights = room.weights if room else 0.0
    per_token = 4 * geometry.num_kv_heads * geometry.head_dim * geometry.num_layers / devices
    kv = room.context * per_token if room else 0.0  # of a sequence

    def distinct(running: int) -> float:
        return adapters * (1 - (1 - 1 / max(adapters, 1)) ** running)

    def rate(layouts: tuple[LoraLayout, ...]) -> float:
        chosen = [(layout, group) for layout, group in zip(layouts, GROUPS, strict=True) if group in groups]
        held = sum(_adapter_bytes(layout, group, geometry, devices=devices, rank=rank) for layout, group in chosen)
        running = tokens
        while room and running > 1 and running * kv + distinct(running) * held > room.bytes:
            running -= 1
        options: dict[str, Any] = dict(devices=devices, tokens=running, adapters=distinct(running), rank=rank)
        seconds = (weights + running * kv) / (model.memory_rate / _MEMORY_SHARE * _BASE_SHARE)
        for layout, group in chosen:
            seconds += geometry.num_layers * model.extra_seconds(layout, group, geometry, **options)
        return running / seconds if seconds else float("inf")

    each: list[tuple[LoraLayout, ...]] = [("comm-free", "s-lora") if g in groups else ("comm-free",) for g in GROUPS]
    return max(itertools.product(*each), key=rate)


def _adapter_bytes(layout: LoraLayout, group: str, geometry: Geometry, *, devices: int, rank: int) -> float:
    """Of a group's part of an adapter on each device, in 2 bytes."""
    modules = GROUPS[group]
    whole = geometry.out_sizes if group in ROW_GROUPS else geometry.in_sizes
    cut = sum(geometry.in_sizes[m] + geometry.out_sizes[m] for m in modules) / devices
    more = sum(whole[m] for m in modules) * (devices - 1) / devices if layout == "comm-free" else 0.0
    return 2.0 * geometry.num_layers * rank * (cut + more)


def measure_latency(mesh: Mesh, shape: tuple[int, ...] = (256,), dtype: DTypeLike = jnp.float32) -> float:
    """Seconds of one all-reduce over the mesh, in a program that has many in a row: the fastest of a few runs.

    shape, dtype: of the array that every device adds up; the default is as small as a collective gets.
    """
    return collective_timer(mesh, shape, dtype)()


def collective_timer(
    mesh: Mesh,
    shape: tuple[int, ...] = (256,),
    dtype: DTypeLike = jnp.float32,
    *,
    operation: Literal["all-reduce", "all-gather"] = "all-reduce",
    compiler_options: dict[str, bool | str] | None = None,
) -> Callable[[], float]:
    """A compiled measure_latency. shape: of what every device gives. compiler_options: of XLA."""
    devices = mesh.shape[AXIS]

    def chain(x, scale):
        for _ in range(_CHAIN):
            # by a factor that only the device knows, or XLA would see that the next sum has equal terms
            if operation == "all-reduce":
                x = lax.psum(x, AXIS) * scale[0]
            else:
                x = lax.all_gather(x, AXIS).sum(axis=0) * scale[0]
        return x

    specs = (WHOLE, partition("device"))
    run = jax.jit(
        jax.shard_map(chain, mesh=mesh, in_specs=specs, out_specs=WHOLE, check_vma=False),
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
        compiler_options=compiler_options,
    )
    args = (np.ones(shape, dtype), np.full(devices, 1 / devices, dtype))
    compiled = run.lower(*args).compile()

    def measure() -> float:
        places = [NamedSharding(mesh, spec) for spec in specs]
        placed = [jax.make_array_from_callback(x.shape, p, x.__getitem__) for x, p in zip(args, places, strict=True)]
        jax.block_until_ready(compiled(*placed))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*placed))
            times.append(time.perf_counter() - start)
        return min(times) / _CHAIN

    return measure
