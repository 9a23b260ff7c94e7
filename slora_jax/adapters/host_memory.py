"""Memory for adapters' weights and images, which come and go by the dozen of megabytes on several threads.

malloc would keep some of it for each of the threads: the process grew while what it held did not. A mapping of its own
goes back to the system when its array goes.
"""

import math
import mmap

import numpy as np
from numpy.typing import DTypeLike

_LEAST_BYTES = 1 << 20
"""Of a mapping: Linux allows a process 65,530 of them if not told otherwise."""


def map_zeros(shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> np.ndarray:
    """An array of zeros, writeable. A large one has memory of its own, as long as the system gives it."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes < _LEAST_BYTES:
        return np.zeros(shape, dtype)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # too many mappings; if memory is out, numpy says so
        return np.zeros(shape, dtype)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
