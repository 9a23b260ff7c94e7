"""What the device can do at best, as measured: bytes copied, operations of a matrix product, bytes from host memory."""

from collections.abc import Callable
import functools
import time
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np

from slora_jax.memory import device_memory
from slora_jax.twin import Ceilings

_HOST_CHUNK = 16 << 20  # bytes: how the engine copies adapters
_HOST_COPIES = 16


def seconds_per_call(call: Callable[[], Any], spend: float) -> float:
    """Seconds of a call that is dispatched many times before it is waited for: the best of three rounds."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(3, int(spend / 3 / max(time.perf_counter() - start, 1e-6)))
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds)


def copy_bandwidth(spend: float) -> float:
    """Bytes/s that one device reads and writes in the faster of a copy and of a negation, over a large array."""
    memory = device_memory()
    x = jnp.ones(min(1 << 30, memory[0] // 16) if memory else 1 << 22, jnp.bfloat16)
    return max(
        2 * x.nbytes / seconds_per_call(functools.partial(jax.jit(way), x), spend) for way in (jnp.copy, jnp.negative)
    )


def matmul_rate(dtype: Any, spend: float) -> float:
    """Operations/s of a square matrix product of random numbers, 8192 a side where there is a GPU."""
    n = 8192 if jax.default_backend() == "gpu" else 512
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
    return 2 * n**3 / seconds_per_call(functools.partial(jax.jit(jnp.dot), a, b), spend)


def host_bandwidth(spend: float) -> float:
    """Bytes/s from host memory, pinned where the backend has that, to the device."""
    device = jax.local_devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    there = SingleDeviceSharding(device)
    chunk: Any = np.ones(_HOST_CHUNK, np.uint8)
    if "pinned_host" in kinds:
        chunk = jax.block_until_ready(jax.device_put(chunk, there.with_memory_kind("pinned_host")))

    def copies() -> Any:
        # every one is waited for: waiting for the last of many gave 187 GB/s over a link of 64
        return jax.block_until_ready([jax.device_put(chunk, there, may_alias=False) for _ in range(_HOST_COPIES)])

    return _HOST_COPIES * _HOST_CHUNK / seconds_per_call(copies, spend)


@functools.cache
def measure_ceilings(dtype: str) -> Ceilings:
    """Ceilings of the first device, in a few seconds. To be called while some of its memory is free."""
    spend = 0.3 if jax.default_backend() == "gpu" else 0.01
    return Ceilings(
        bytes_per_second=copy_bandwidth(spend),
        operations_per_second=matmul_rate(jnp.dtype(dtype), spend),
        host_bytes_per_second=host_bandwidth(spend),
    )
