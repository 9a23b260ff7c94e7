"""Memory for adapters that goes back to the system."""

import mmap
import weakref

import ml_dtypes
import numpy as np
import pytest

from slora_jax.adapters import host_memory, random_adapter
from slora_jax.adapters.host_memory import map_zeros
from slora_jax.shapes import named_shape

LARGE = (1 << 20,)


def owner(array):
    """What holds the memory of an array that may be a view of a view."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


@pytest.mark.parametrize("shape", [LARGE, (0, 3), (7,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ml_dtypes.bfloat16])
def test_zeros_that_can_be_written(shape, dtype):
    array = map_zeros(shape, dtype)
    assert array.dtype == dtype and array.shape == shape and not array.any()
    assert isinstance(owner(array), mmap.mmap) == (shape == LARGE)
    array[...] = 1
    assert array.all()


def test_memory_goes_with_its_last_view():
    array = map_zeros(LARGE)
    memory = weakref.ref(owner(array))
    view = array[4096:].view(np.float32).reshape(2, -1)
    del array
    view[...] = 1.0
    assert memory() is not None and view.all()
    del view
    assert memory() is None


def test_where_there_are_too_many_mappings(monkeypatch):
    def full(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    array = map_zeros(LARGE)
    assert array.shape == LARGE and not array.any() and type(owner(array)) is np.ndarray


def test_adapters_lie_in_it(monkeypatch):
    monkeypatch.setattr(host_memory, "_LEAST_BYTES", 1)
    config = named_shape("tiny-llama")
    adapter = random_adapter(config, 8, ["q", "o"])
    for array in (adapter.weights.buffer, adapter.image(config.geometry, np.float32)):
        assert isinstance(owner(array), mmap.mmap)
