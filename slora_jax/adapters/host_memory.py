"""Memory for adapters' weights and images, which come and go by the dozen of megabytes on several threads.

malloc would keep some of it for each of the threads: the process grew while what it held did not. A mapping of its own
goes back to the system when its array goes.
"""

import math
import mmap

import numpy as np
from numpy.typing import DTypeLike


def map_zeros(shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> np.ndarray:
    """An array of zeros, writeable, at the beginning of a page of memory."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not nbytes:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
