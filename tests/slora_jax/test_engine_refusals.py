"""What an engine refuses, gives up or outlives: bad requests and settings, small pools, errors, quotas."""

import time

from engines import PROMPT, adapters_for, config, greedy
import pytest

from slora_jax import (
    AdapterError,
    CapacityError,
    Engine,
    EngineConfig,
    Quota,
    Request,
    RequestError,
    SloraError,
)
from slora_jax.adapters import random_adapter


@pytest.fixture(scope="module")
def engine():
    model, settings = config()
    with Engine(model, settings, adapters_for(model)) as engine:
        yield engine


@pytest.mark.parametrize(
    "request_, error, words",
    [
        (Request(None, None, greedy(), []), RequestError, "the prompt is empty"),
        (Request(None, None, greedy(), [256]), RequestError, "token id 256 is outside the model's vocabulary of 256"),
        (Request(None, None, greedy(), [-1]), RequestError, "token id -1"),
        (Request("hello"), RequestError, "has no tokenizer; give prompt_token_ids"),
        (Request(), RequestError, "exactly one of prompt, prompt_token_ids and messages"),
        (Request("hello", prompt_token_ids=[1]), RequestError, "exactly one of"),
        (Request(None, "nobody", greedy(), [1]), AdapterError, "adapter 'nobody' is unknown: known: a0, a1, a2, a3"),
        (Request(None, None, greedy(), [1] * 512), RequestError, "the prompt has 512 tokens and the model takes 512"),
        (Request(None, None, greedy(stop="x"), [1]), RequestError, "stop strings cannot be found"),
        (Request(None, None, greedy(logit_bias={999: 1.0}), [1]), RequestError, "token id 999"),
    ],
)
def test_a_bad_request_is_named_and_nothing_is_queued(engine, request_, error, words):
    with pytest.raises(error, match=words) as caught:
        engine.generate([Request(None, None, greedy(), PROMPT), request_])
    assert "\n" not in str(caught.value)
    assert engine.stats()["waiting"] == engine.stats()["running"] == 0
    assert len(engine.generate([Request(None, None, greedy(2), PROMPT)])[0].token_ids) == 2


def test_a_pool_too_small_is_named():
    model, settings = config(pages=3)
    with Engine(model, settings) as engine:
        with pytest.raises(CapacityError, match=r"may need 4 pages .* the pool has 3; lower max_tokens"):
            engine.generate([Request(None, None, greedy(20), [1] * 40)])
        with pytest.raises(CapacityError, match="adapter 'big' needs .* pages and the pool has 3"):
            engine.add_adapter("big", random_adapter(model.config, 64))
        assert engine.longest() == 49  # 48 tokens in pages and one that is never fed back
        assert len(engine.generate([Request(None, None, greedy(9), [1] * 40)])[0].token_ids) == 9
    with pytest.raises(CapacityError, match="less than one page of this model"):
        Engine(model, EngineConfig(page_pool_bytes=100, compile_cache_dir="", dtype="float32"))


def test_settings_are_checked():
    with pytest.raises(SloraError, match="max_seqs must be at least 1, not 0"):
        EngineConfig(max_seqs=0)
    with pytest.raises(SloraError, match="dtype must be one of 'bfloat16', 'float32', not 'int8'"):
        EngineConfig(dtype="int8")
    with pytest.raises(SloraError, match=r"seq_buckets must increase from at least 1 to 8, not \(4, 2, 8\)"):
        EngineConfig(max_seqs=8, seq_buckets=(4, 2, 8)).resolved()
    with pytest.raises(SloraError, match=r"token_buckets must increase from at least 1 to 64, not \(16,\)"):
        EngineConfig(max_seqs=8, max_step_tokens=64, token_buckets=(16,)).resolved()
    with pytest.raises(SloraError, match="max_lora_rank must be at most 512"):
        EngineConfig(max_lora_rank=1024)
    with pytest.raises(SloraError, match="lora_targets names 'mlp'; modules are q, k, v, o, gate, up, down"):
        EngineConfig(lora_targets=("q", "mlp"))
    with pytest.raises(SloraError, match="lora_targets names no module; name some of q, k, v, o, gate, up, down"):
        EngineConfig(lora_targets=())


def test_an_adapter_that_overflows_fails_alone(engine):
    huge = random_adapter(engine.model.config, 8, seed=1, scale=1e30)
    engine.add_adapter("huge", huge)
    bad, good = engine.generate([Request(None, name, greedy(3), PROMPT) for name in ("huge", None)])
    assert bad.finish_reason == "error" and "not finite" in bad.completions[0].error
    assert good.finish_reason == "length"
    engine.remove_adapter("huge")


def test_an_error_of_the_device_ends_what_ran_and_nothing_else(engine, monkeypatch, caplog):
    runner = engine._core.runner
    forward, calls = runner.forward, []

    def failing(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("the device is unwell")
        return forward(batch)

    monkeypatch.setattr(runner, "forward", failing)
    failed = engine.generate([Request(None, "a0", greedy(), PROMPT)])[0]
    assert failed.finish_reason == "error" and failed.completions[0].error == "the step failed: the device is unwell"
    again = engine.generate([Request(None, "a0", greedy(), PROMPT)])[0]
    assert again.finish_reason == "length"
    engine.check_integrity()


def test_a_closed_engine_says_so():
    model, settings = config()
    engine = Engine(model, settings)
    stream = engine.stream(Request(None, None, greedy(200), PROMPT))
    next(stream)
    engine.close()
    assert [d.finish_reason for d in stream][-1] == "abort"
    with pytest.raises(SloraError, match="the engine is closed"):
        engine.generate([Request(None, None, greedy(), PROMPT)])


def test_a_request_given_up_by_the_policy_says_why(monkeypatch):
    model, settings = config(
        max_seqs=1, seq_buckets=(1,), policy="early-abort", policy_options=dict(ttft=0.2, slack=0.1)
    )
    with Engine(model, settings) as engine:
        engine.generate([Request(None, None, greedy(1), PROMPT)])  # compiles; too late itself, or not
        monkeypatch.setattr(engine._core.runner, "forward", _slowly(engine._core.runner.forward, 0.02))
        outputs = engine.generate([Request(None, None, greedy(30), PROMPT, tenant="a", priority=p) for p in (0, 1)])
        late, kept = sorted(outputs, key=lambda o: o.finish_reason or "")
        assert kept.finish_reason == "length"
        assert (late.finish_reason, late.token_ids) == ("abort", [])
        assert late.completions[0].error.startswith("given up: its first token cannot come within the target of 0.2 s")
        assert engine.stats()["dropped"] >= 1 and engine.stats()["waiting"] == 0


def _slowly(function, seconds):
    def slow(*args):
        time.sleep(seconds)
        return function(*args)

    return slow


def test_quotas_hold_requests_back_and_refuse_what_can_never_fit(engine):
    model, settings = config(
        adapter_quota=Quota(tokens_per_second=200.0), adapter_quotas={"a1": Quota(max_running=1, max_pages=400)}
    )
    with Engine(model, settings, adapters_for(model)) as limited:
        requests = [Request(None, name, greedy(), PROMPT) for name in ("a0", "a1", "a1", "a0", None)]
        got = limited.generate(requests)
        assert [o.token_ids for o in got] == [o.token_ids for o in engine.generate(requests)]
        assert got[2].timings.first_token >= got[1].timings.finished
    model, settings = config(adapter_quota=Quota(max_pages=1))
    with Engine(model, settings, adapters_for(model)) as limited:
        with pytest.raises(CapacityError, match="the quota of its adapter is 1; lower max_tokens or raise"):
            limited.generate([Request(None, "a0", greedy(), PROMPT)])
