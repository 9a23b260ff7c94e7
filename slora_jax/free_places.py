"""Keeps free places of the device's memory for what every step allocates and gives back.

A step's temporary memory that lies elsewhere than last time makes XLA enter every kernel of its CUDA graph anew, 1 to 4
ms of the host's time for 300 kernels on an H200 (see slora_jax/staging.py). XLA's allocator (tsl::BFCAllocator) takes
the smallest free block in which a buffer fits, cuts off what it needs, and joins free blocks that touch. So free blocks
of just the sizes that steps ask for, kept apart by small ones that stay in use, are taken again and again by the same.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np

GUARD_BYTES = 1 << 20
"""Of what keeps free blocks apart, and the least that gets a place of its own. Smaller buffers share places."""

_SHARED = 8  # of GUARD_BYTES, for smaller buffers
_ALIGNMENT = 256
_TRIES = 256  # blocks of GUARD_BYTES that older gaps may swallow


def _address(array: jax.Array) -> int:
    return array.addressable_shards[0].data.unsafe_buffer_pointer()


def places(wanted: Mapping[int, int], budget: int) -> list[int]:
    """Sizes of free blocks to make, the largest first. wanted: bytes -> how many buffers of them are alive at a time.
    The largest are left out where all together would exceed the budget.
    """
    sizes = [GUARD_BYTES] * _SHARED
    for size in sorted(size for size in wanted if size > GUARD_BYTES):
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        more = [rounded] * wanted[size]
        if sum(sizes) + sum(more) + GUARD_BYTES * (len(sizes) + len(more)) > budget:
            break
        sizes += more
    return sizes[::-1]


def keep_free(wanted: Mapping[int, int], budget: int, put: Callable[[np.ndarray], jax.Array]) -> list[jax.Array]:
    """Makes free blocks and returns what keeps them apart, which must be held as long as they are wanted. Where memory
    runs out, because no gap is large enough, there are fewer.

    put: brings an array to the device, or a copy of it to each.
    """

    def allocate(size: int) -> jax.Array:
        return jax.block_until_ready(put(np.empty(size, np.uint8)))

    blocks, guards, strays = [], [], []
    try:
        for size in places(wanted, budget):
            block = allocate(size)
            blocks.append(block)
            for _ in range(_TRIES):
                guard = allocate(GUARD_BYTES)
                if _address(guard) == _address(block) + size:
                    guards.append(guard)
                    break
                strays.append(guard)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    for array in blocks + strays:
        array.delete()
    return guards
