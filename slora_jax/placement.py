"""How the page pool and the adapters' images lie on one device, or on those of a Parallel.

Arrays of a sharded pool have the devices' pages side by side on the last axis; everything else about a page, its id
above all, is the same on every device.
"""

from collections.abc import Callable, Sequence

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
import numpy as np

from pallas_kernels import write_adapter
from sharding import ADAPTER_IMAGE, POOL, WHOLE
from slora_jax.adapters import Adapter
from slora_jax.adapters.shards import shard_adapter, shard_image
from slora_jax.batch import State
from slora_jax.model_config import ModelConfig
from slora_jax.parallel import Parallel


def new_state(config: ModelConfig, num_pages: int, dtype: DTypeLike, parallel: Parallel | None = None) -> State:
    """A new, empty pool."""
    if parallel is None:
        return State(pages=jnp.zeros((config.num_layers, num_pages, config.geometry.page_elements), dtype))
    shape = (config.num_layers, num_pages, parallel.page_elements)
    return State(pages=jnp.zeros(shape, dtype, device=parallel.pool))


def adapter_pages(adapter: Adapter, config: ModelConfig, parallel: Parallel | None = None) -> int:
    """Page ids that an adapter takes in the pool: as many as its largest part on any device needs."""
    if parallel is None:
        return adapter.num_pages(config.geometry)
    return shard_adapter(adapter, parallel.layout).num_pages


def adapter_images(
    adapter: Adapter, config: ModelConfig, dtype: np.dtype, parallel: Parallel | None = None
) -> list[np.ndarray]:
    """The adapter's image [pages, L, E] for every device of this process, in the order of the mesh."""
    if parallel is None:
        return [adapter.image(config.geometry, dtype)]
    return [shard_image(adapter, parallel.layout, d, dtype) for d in range(parallel.layout.devices)]


def join_images(images: Sequence[np.ndarray], parallel: Parallel | None = None) -> np.ndarray | jax.Array:
    """Images as the argument of `make_write`; every device gets its own only."""
    if parallel is None:
        return images[0]
    width = images[0].shape[-1]
    shape = (*images[0].shape[:-1], width * len(images))
    sharding = NamedSharding(parallel.mesh, ADAPTER_IMAGE)

    def own(where: tuple[slice, ...] | None) -> np.ndarray:
        assert where is not None
        return images[(where[-1].start or 0) // width]

    return jax.make_array_from_callback(shape, sharding, own)


def make_write(parallel: Parallel | None = None) -> Callable[[State, jax.Array, jax.Array], State]:
    """Makes ``write(state, page_ids, images) -> state``: puts an adapter's images into its pages. To be jitted."""

    def write(state: State, page_ids: jax.Array, image: jax.Array) -> State:
        return State(pages=write_adapter(state.pages, page_ids, image))

    if parallel is None:
        return write
    state = State(pages=POOL)
    return jax.shard_map(
        write, mesh=parallel.mesh, in_specs=(state, WHOLE, ADAPTER_IMAGE), out_specs=state, check_vma=False
    )
