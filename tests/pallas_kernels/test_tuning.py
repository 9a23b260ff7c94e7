import dataclasses

import pytest

from pallas_kernels import tuning
from pallas_kernels.lora.arg_specs import LLAMA2_7B, LLAMA31_8B
from pallas_kernels.lora.config import LoraConfig, default_config, shape_key


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuning.json")
    tuning.measured.cache_clear()
    yield
    tuning.measured.cache_clear()


def test_a_measured_config_is_used_where_it_was_measured(table):
    heuristic = default_config(LLAMA2_7B, 1)
    better = dataclasses.replace(heuristic, range_tiles=16)
    tuning.keep("lora_short", shape_key(LLAMA2_7B), better)
    assert default_config(LLAMA2_7B, 1) == better
    assert default_config(LLAMA2_7B, 2048).block_tokens == 64
    assert default_config(LLAMA31_8B, 1) == heuristic


def test_entries_are_added_to_those_that_are_there(table):
    tuning.keep("lora_short", "a", LoraConfig())
    tuning.keep("lora_long", "b", LoraConfig(block_tokens=64))
    assert tuning.measured("lora_short", "a") == dataclasses.asdict(LoraConfig())
    assert tuning.measured("lora_long", "b")["block_tokens"] == 64
    assert tuning.measured("lora_long", "a") is None
