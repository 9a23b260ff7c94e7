"""What is over goes at once, without Python looking for cycles: adapters are large, and it seldom looks."""

from collections.abc import Iterator
import dataclasses
import gc
import weakref

from engines import PROMPT, adapters_for, config, greedy
import numpy as np
import pytest
from running_server import wait_until

from slora_jax import AdapterError, Engine, Request
from slora_jax.adapters import random_adapter, save_adapter
from slora_jax.adapters.host_memory import map_zeros
from slora_jax.jobs import Job


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model, settings = config()
    with Engine(model, settings, adapters_for(model, 1)) as engine:
        engine.generate([Request(None, None, greedy(2), PROMPT)])
        yield engine


@pytest.fixture
def no_search_for_cycles(engine):
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def jobs_are_gone(no_search_for_cycles):
    """Says so. Threads that wait for work still have what they did last at hand. Other tests left what they left."""

    def count() -> int:
        return sum(type(o) is Job for o in gc.get_objects())

    before = count()
    return lambda: count() <= before + 1


@pytest.mark.parametrize("adapter, params", [("a0", greedy(3)), (None, dataclasses.replace(greedy(3), n=2))])
def test_a_request_that_ended(engine, jobs_are_gone, adapter, params):
    for _ in range(3):
        engine.generate([Request(None, adapter, params, PROMPT)])
    wait_until(jobs_are_gone)


def test_a_request_that_was_left(engine, jobs_are_gone):
    for _ in range(3):
        stream = engine.stream(Request(None, "a0", greedy(60), PROMPT))
        next(stream)
        stream.close()
        del stream
    wait_until(jobs_are_gone)


@pytest.mark.parametrize("lazy", [False, True])
def test_files_that_could_not_be_read(engine, no_search_for_cycles, monkeypatch, tmp_path, lazy):
    path = save_adapter(random_adapter(engine.model.config, 8, seed=5), tmp_path / "bad")
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    read = []

    def remembered(*args):
        array = map_zeros(*args)
        read.append(weakref.ref(array))
        return array

    monkeypatch.setattr("slora_jax.adapters.safetensors_file.map_zeros", remembered)
    if lazy:
        engine.add_adapter("bad", path, lazy=True)
        (output,) = engine.generate([Request(None, "bad", greedy(3), PROMPT)])
        assert "holds NaN" in output.completions[0].error
        engine.remove_adapter("bad")
    else:
        with pytest.raises(AdapterError, match="holds NaN"):
            engine.add_adapter("bad", path)
    assert read
    wait_until(lambda: not any(ref() is not None for ref in read))
