"""Memory for adapters that goes back to the system."""

import weakref

import numpy as np

from slora_jax.adapters import Adapter, random_adapter
from slora_jax.adapters.host_memory import map_zeros
from slora_jax.loading import load_model


def test_zeros_that_can_be_written():
    array = map_zeros((100_000,))
    assert array.dtype == np.uint8 and array.shape == (100_000,) and not array.any()
    assert array.ctypes.data % 4096 == 0
    array[...] = 7
    assert array.view(np.int16).reshape(-1, 2).sum() == 25_000 * 2 * 0x0707
    assert map_zeros((2, 0), np.float32).shape == (2, 0)


def _owner(array):
    """What holds the memory of an array that may be a view of a view."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def test_memory_goes_with_its_last_view():
    array = map_zeros((1 << 20,))
    memory = weakref.ref(_owner(array))
    view = array[4096:].view(np.float32).reshape(2, -1)
    del array
    view[...] = 1.0
    assert memory() is not None and view.sum() == view.size
    del view
    assert memory() is None


def test_adapters_lie_in_memory_of_their_own():
    config = load_model("random:tiny-llama").config
    adapter = random_adapter(config, 8, ["q", "o"], seed=0)
    image = adapter.image(config.geometry, np.float32)
    assert isinstance(adapter, Adapter)
    assert type(_owner(image)) is type(_owner(adapter.weights.buffer)) is type(_owner(map_zeros((1,))))
