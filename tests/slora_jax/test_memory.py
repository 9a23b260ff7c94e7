"""How many pages the pool gets, and what is said when there is too little memory."""

import jax
import pytest

from slora_jax import CapacityError, Engine, EngineConfig, memory
from slora_jax.adapters import random_adapter
from slora_jax.buckets import Buckets
from slora_jax.loading import random_params
from slora_jax.runner import device_memory_errors
from slora_jax.shapes import named_shape


def pages(monkeypatch, limit, used, **settings):
    monkeypatch.setattr(memory, "device_memory", lambda: (limit, used))
    config = named_shape("tiny-llama")
    params = jax.eval_shape(lambda: random_params(config, dtype="float32"))
    resolved = EngineConfig(dtype="float32", max_seqs=4, max_step_tokens=64, **settings).resolved()
    options = memory.step_options(config, resolved)
    return memory.choose_num_pages(options, params, resolved, Buckets.default(4, 64), 64)


def test_the_pool_takes_what_the_weights_and_the_largest_step_leave(monkeypatch):
    size = memory.page_bytes(named_shape("tiny-llama"), "float32")
    limit, used = 4 << 30, 1 << 30
    total = pages(monkeypatch, limit, used) * size
    assert 0.6 * (limit - used) < total < 0.97 * limit - used


def test_a_setting_overrides_the_measured_size(monkeypatch):
    size = memory.page_bytes(named_shape("tiny-llama"), "float32")
    assert pages(monkeypatch, 4 << 30, 0, page_pool_bytes=10 * size + 1) == 10


@pytest.mark.parametrize(
    ("settings", "targets", "groups"),
    [
        (dict(max_lora_rank=8), None, ("qkv", "o", "gu", "down")),
        (dict(max_lora_rank=8, lora_targets=("up_proj", "q")), None, ("qkv", "gu")),
        (dict(max_lora_rank=8, lora_targets=("q", "o")), ["q"], ("qkv", "o")),
        (dict(lora_targets=("q", "o")), ["q"], ("qkv",)),
        (dict(lora_targets=("q", "o")), None, ("qkv", "o")),
        (dict(lora_targets=("q", "o"), deterministic=True), ["q"], ("qkv", "o")),
    ],
)
def test_steps_take_the_groups_that_adapters_have_or_may_have(settings, targets, groups):
    """targets: of the adapter that is known, if there is one."""
    config = named_shape("tiny-llama")
    shapes = [random_adapter(config, 4, targets)] if targets else []
    assert memory.step_options(config, EngineConfig(**settings).resolved(), shapes).lora_groups == groups


def test_no_memory_left_is_said(monkeypatch):
    with pytest.raises(CapacityError, match=r"no memory is left for the page pool: 0\.9 of 1\.0 GiB are used"):
        pages(monkeypatch, 1 << 30, int(0.9 * (1 << 30)))


def test_a_model_larger_than_the_device_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: (8 << 30, 1 << 30))
    message = r"random:llama-2-13b needs 24\.2 GiB of device memory in bfloat16, 7\.0 GiB are free; use a smaller model"
    with pytest.raises(CapacityError, match=message):
        Engine.from_pretrained("random:llama-2-13b", EngineConfig(dtype="bfloat16", compile_cache_dir=""))


def test_running_out_of_memory_later_is_said_in_one_line():
    with pytest.raises(CapacityError, match="^not enough device memory for a page pool; set it lower$"):
        with device_memory_errors("a page pool", "set it lower"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with device_memory_errors("a page pool", "set it lower"):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
