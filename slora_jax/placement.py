"""How the page pool and the adapters' images lie on one device, or on those of a Parallel.

Arrays of a sharded pool have the devices' pages side by side on the last axis; everything else about a page, its id
above all, is the same on every device.
"""

from collections.abc import Callable, Iterator
import dataclasses
import logging
import weakref

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
import numpy as np

from pallas_kernels import Implementation, write_adapter
from sharding import ADAPTER_IMAGE, POOL, WHOLE
from slora_jax.adapters import Adapter, AdapterShape
from slora_jax.adapters.host_memory import map_zeros
from slora_jax.adapters.shards import shard_adapter, shard_image
from slora_jax.batch import State
from slora_jax.model_config import ModelConfig
from slora_jax.page_loads import chunk_sizes
from slora_jax.parallel import Parallel

logger = logging.getLogger(__name__)


def new_state(config: ModelConfig, num_pages: int, dtype: DTypeLike, parallel: Parallel | None = None) -> State:
    """A new, empty pool. It is committed to its devices, as it will be when adapters were written to it, so that steps
    are compiled for that once.
    """
    if parallel is None:
        pages = jnp.zeros((config.num_layers, num_pages, config.geometry.page_elements), dtype)
        return State(pages=jax.device_put(pages, image_sharding(None)))
    shape = (config.num_layers, num_pages, parallel.page_elements)
    return State(pages=jnp.zeros(shape, dtype, device=parallel.pool))


def adapter_pages(shape: AdapterShape, config: ModelConfig, parallel: Parallel | None = None) -> int:
    """Page ids that an adapter takes in the pool: as many as its largest part on any device needs."""
    if parallel is None:
        return shape.num_pages(config.geometry)
    return shard_adapter(shape, parallel.layout).num_pages


def image_sharding(parallel: Parallel | None) -> Sharding:
    """Where an image [pages, L, E] lies on the devices: every one has its own part of each page."""
    if parallel is None:
        return SingleDeviceSharding(jax.config.jax_default_device or jax.local_devices()[0])
    return NamedSharding(parallel.mesh, ADAPTER_IMAGE)


def adapter_image(
    adapter: Adapter, config: ModelConfig, dtype: np.dtype, parallel: Parallel | None = None
) -> np.ndarray:
    """The adapter's image [pages, L, E], the parts of all devices side by side on the last axis."""
    if parallel is None:
        return adapter.image(config.geometry, dtype)
    layout = parallel.layout
    parts = [shard_image(adapter, layout, d, dtype) for d in range(layout.devices)]
    image = map_zeros((*parts[0].shape[:-1], layout.devices * parts[0].shape[-1]), dtype)
    return np.concatenate(parts, axis=-1, out=image)


@dataclasses.dataclass(frozen=True)
class HostImage:
    """An adapter's image in host memory, in the pieces that are copied to the device. nbytes: of all of them.

    chunks: arrays [n, L, E] for consecutive pages, n as chunk_sizes says.
    """

    chunks: tuple[jax.Array | np.ndarray, ...]
    nbytes: int

    def between(self, start: int, stop: int) -> Iterator[tuple[int, jax.Array | np.ndarray]]:
        """Chunks of the pages `start` to `stop`, which must be where chunks end, each with its first page."""
        at = 0
        for chunk in self.chunks:
            if start <= at < stop:
                yield at, chunk
            at += chunk.shape[0]


class HostImages:
    """Makes images in host memory, in pinned memory where the backend has it: from there a device copies at the bus's
    rate, from other memory at a fraction of it. Thread-safe.

    chunk_pages: pages of the largest chunk, a power of two.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, chunk_pages: int, parallel: Parallel | None = None):
        self._config = config
        self._dtype = jnp.dtype(dtype)
        self._parallel = parallel
        self._chunk_pages = chunk_pages
        self._num_pages: weakref.WeakKeyDictionary[AdapterShape, int] = weakref.WeakKeyDictionary()
        self._device = image_sharding(parallel)
        elements = parallel.page_elements if parallel else config.geometry.page_elements
        self._page_bytes = config.num_layers * elements * self._dtype.itemsize
        device = next(iter(self._device.addressable_devices))
        assert isinstance(device, jax.Device)
        kinds = {memory.kind for memory in device.addressable_memories()}
        # what travels to other processes stays in numpy
        pinned = "pinned_host" in kinds and jax.process_count() == 1
        self._pinned = self._device.with_memory_kind("pinned_host") if pinned else None

    def num_pages(self, shape: AdapterShape) -> int:
        """Page ids that an adapter takes. Worked out once for a shape, as every request and every step asks."""
        known = self._num_pages.get(shape)
        if known is None:
            known = self._num_pages[shape] = adapter_pages(shape, self._config, self._parallel)
        return known

    def nbytes(self, shape: AdapterShape) -> int:
        """Host memory that an adapter's image takes, for all devices together."""
        return self.num_pages(shape) * self._page_bytes

    def make(self, adapter: Adapter) -> HostImage:
        """Lays the weights out and puts them in pinned memory."""
        image = adapter_image(adapter, self._config, self._dtype, self._parallel)
        parts, at = [], 0
        for size in chunk_sizes(image.shape[0], self._chunk_pages):
            parts.append(image[at : at + size])
            at += size
        return HostImage(tuple(map(self._pin, parts)), image.nbytes)

    def zeros(self, num_pages: int) -> jax.Array | np.ndarray:
        """A chunk of zeros."""
        elements = self._page_bytes // self._dtype.itemsize // self._config.num_layers
        return self._pin(np.zeros((num_pages, self._config.num_layers, elements), self._dtype))

    def to_device(self, chunk: jax.Array | np.ndarray) -> jax.Array:
        """Begins to copy a chunk to the device; returns at once. With several processes each copies its own part."""
        if jax.process_count() > 1:
            return jax.make_array_from_callback(chunk.shape, self._device, lambda index: np.asarray(chunk[index]))
        return jax.device_put(chunk, self._device)

    def _pin(self, part: np.ndarray) -> jax.Array | np.ndarray:
        if self._pinned is None:
            return part
        try:
            return jax.block_until_ready(jax.device_put(part, self._pinned))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            logger.warning(
                "pinned host memory is full, so that adapters are copied slowly: set the environment variable "
                "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB (64 if not set) above host_adapter_bytes"
            )
            self._pinned = None
            return part


def make_write(
    parallel: Parallel | None = None, implementation: Implementation = "auto"
) -> Callable[[State, jax.Array, jax.Array], State]:
    """Makes ``write(state, page_ids, images) -> state``: puts an adapter's images into its pages. To be jitted."""

    def write(state: State, page_ids: jax.Array, image: jax.Array) -> State:
        return State(pages=write_adapter(state.pages, page_ids, image, implementation=implementation))

    if parallel is None:
        return write
    state = State(pages=POOL)
    return jax.shard_map(
        write, mesh=parallel.mesh, in_specs=(state, WHOLE, ADAPTER_IMAGE), out_specs=state, check_vma=False
    )
