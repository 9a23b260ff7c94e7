"""Adapters that come to an engine and go: same and new contents, removal, ranks and modules beyond those before."""

import time

from engines import PROMPT, adapters_for, config, greedy
from oracles import llama_logits
import pytest

from slora_jax import AdapterError, Engine, Request
from slora_jax.adapters import random_adapter


def test_the_same_contents_under_two_names_share_pages():
    model, settings = config()
    a = adapters_for(model)["a0"]
    copy = random_adapter(model.config, a.ranks, seed=0, scale=0.5)
    assert copy is not a and copy.digest == a.digest
    with Engine(model, settings, {"first": a, "second": copy}) as engine:
        engine.generate([Request(None, name, greedy(), PROMPT) for name in ("first", "second")])
        stats = engine.stats()
        assert stats["adapter_loads"] == 1
        assert stats["pages"]["idle_adapter"] == a.num_pages(model.config.geometry)
        engine.remove_adapter("first")
        assert engine.stats()["pages"]["idle_adapter"] == a.num_pages(model.config.geometry)
        engine.remove_adapter("second")
        assert engine.stats()["pages"] == dict(kv=0, idle_kv=0, adapter=0, idle_adapter=0, free=200)


def test_new_contents_under_an_old_name_never_meet_the_old():
    model, settings = config()
    adapters = adapters_for(model)
    with Engine(model, settings, {"x": adapters["a0"], "y": adapters["a1"]}) as engine:
        old, new = (engine.generate([Request(None, n, greedy(30), PROMPT)])[0].token_ids for n in "xy")
        assert old != new
        stream = engine.stream(Request(None, "x", greedy(30), PROMPT))
        tokens = list(next(stream).token_ids)
        digest = engine.add_adapter("x", adapters["a1"])
        assert digest == adapters["a1"].digest
        after = engine.generate([Request(None, "x", greedy(30), PROMPT)])[0]
        tokens += [t for delta in stream for t in delta.token_ids]
        assert tokens == old  # it began with the old contents and ends with them
        assert after.token_ids == new and after.adapter_digest == digest
        assert engine.stats()["pages"]["idle_adapter"] == adapters["a1"].num_pages(model.config.geometry)


def test_remove_waits_for_running_requests():
    model, settings = config()
    with Engine(model, settings, adapters_for(model)) as engine:
        stream = engine.stream(Request(None, "a0", greedy(100), PROMPT))
        next(stream)
        with pytest.raises(TimeoutError, match="requests still use adapter 'a0'"):
            engine.remove_adapter("a0", timeout=0)
        with pytest.raises(AdapterError, match="'a0' is unknown"):
            engine.generate([Request(None, "a0", greedy(), PROMPT)])
        assert sum(len(d.token_ids) for d in stream) == 99
        deadline = time.monotonic() + 10
        while engine.stats()["pages"]["idle_adapter"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats()["pages"]["free"] == 200


def test_an_adapter_of_a_higher_rank_than_all_before():
    model, settings = config(max_lora_rank=None)
    with Engine(model, settings, {"small": random_adapter(model.config, 4)}) as engine:
        engine.generate([Request(None, "small", greedy(2), PROMPT)])
        large = random_adapter(model.config, 40, seed=1)
        engine.add_adapter("large", large)
        got = engine.generate([Request(None, "large", greedy(1), PROMPT)])[0]
        assert got.token_ids[0] == llama_logits(model.config, model.params, PROMPT, large)[-1].argmax()


def test_an_adapter_that_targets_what_none_before_did():
    model, settings = config(max_lora_rank=None)
    with Engine(model, settings, {"q": random_adapter(model.config, 4, ["q"])}) as engine:
        engine.generate([Request(None, "q", greedy(2), PROMPT)])
        other = random_adapter(model.config, 4, ["down", "gate"], seed=1)
        engine.add_adapter("other", other)
        for name, adapter in (("other", other), (None, None)):
            got = engine.generate([Request(None, name, greedy(1), PROMPT)])[0]
            assert got.token_ids[0] == llama_logits(model.config, model.params, PROMPT, adapter)[-1].argmax()


def test_adapters_target_only_what_was_announced():
    model, settings = config(lora_targets=("v_proj", "q"))
    assert settings.lora_targets == settings.resolved().lora_targets == ("q", "v")
    adapter, other = (random_adapter(model.config, 4, targets, scale=0.5) for targets in (["q", "v"], ["k", "q", "up"]))
    message = "adapter 'other' targets k, up, lora_targets is q, v; name there all that adapters may target"
    with pytest.raises(AdapterError, match=f"^{message}$"):
        Engine(model, settings, {"other": other})
    with Engine(model, settings) as engine:
        programs = engine._core.runner.programs
        assert programs.options.lora_groups == ("qkv",)
        engine.add_adapter("qv", adapter)
        with pytest.raises(AdapterError, match=f"^{message}$"):
            engine.add_adapter("other", other)
        assert [a["name"] for a in engine.list_adapters()] == ["qv"] and engine._core.runner.programs is programs
        got = engine.generate([Request(None, "qv", greedy(1), PROMPT)])[0]
        assert got.token_ids[0] == llama_logits(model.config, model.params, PROMPT, adapter)[-1].argmax()
