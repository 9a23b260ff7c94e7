"""The engine on tiny random models: against a float64 forward pass, in tiny pools, with adapters that come and go."""

import asyncio
import threading
import time

from engines import PROMPT, adapters_for, config, greedy
from hypothesis import example, given, settings
from hypothesis import strategies as st
import jax
import numpy as np
from oracles import llama_logits
import pytest

from slora_jax import Adapter, AdapterError, Engine, Request, SamplingParams


@pytest.fixture(scope="module")
def engine():
    model, settings = config()
    with Engine(model, settings, adapters_for(model)) as engine:
        yield engine


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gqa", "tiny-qwen2", "tiny-qwen3", "tiny-tied"])
def test_log_probabilities_equal_float64_for_base_and_adapters(name):
    model, settings = config(name)
    adapters = adapters_for(model, 2)
    prompt = [t % model.config.vocab_size for t in PROMPT]
    with Engine(model, settings, adapters) as engine:
        params = greedy(3, logprobs=20, prompt_logprobs=0)
        outputs = engine.generate([Request(None, a, params, prompt) for a in (None, "a0", "a1")])
    for output, adapter in zip(outputs, (None, *adapters.values()), strict=True):
        tokens = [*prompt, *output.token_ids]
        logits = llama_logits(model.config, model.params, tokens[:-1], adapter)
        ref = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for i, entry in enumerate(output.prompt_logprobs):
            assert (entry is None) == (i == 0)
            if entry:
                assert entry.token_id == prompt[i] and entry.logprob == pytest.approx(ref[i - 1, prompt[i]], abs=1e-4)
        for i, entry in enumerate(output.completions[0].logprobs):
            row = ref[len(prompt) - 1 + i]
            assert output.token_ids[i] == row.argmax()
            assert entry.top[entry.token_id] == entry.logprob
            for token, logprob in entry.top.items():
                assert logprob == pytest.approx(row[token], abs=1e-4)


def test_one_mixed_batch_gives_the_tokens_of_one_at_a_time(engine):
    rng = np.random.default_rng(3)
    requests = [
        Request(None, name, greedy(), rng.integers(0, 256, n).tolist())
        for name, n in zip([None, "a0", "a1", "a2", "a3", None, "a0", "a2"], [3, 40, 1, 17, 16, 65, 9, 30], strict=True)
    ]
    together = engine.generate(requests)
    alone = [engine.generate([r])[0] for r in requests]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert [o.finish_reason for o in together] == ["length"] * len(requests)
    engine.check_integrity()


def test_a_base_request_in_a_mixed_batch_gets_exactly_the_base_model(engine):
    params = greedy(6, logprobs=20)
    base = Request(None, None, params, PROMPT)
    alone = engine.generate([base, base])[0]
    mixed = engine.generate([base, Request(None, "a1", params, PROMPT)])[0]
    assert alone.completions[0].logprobs == mixed.completions[0].logprobs


@settings(max_examples=12, deadline=None)
@example(requests=[(1, 60, None), (1, 60, "a0"), (1, 60, None), (1, 60, "a0"), (1, 60, None), (1, 60, "a0")])
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 24), st.sampled_from([None, "a0", "a1", "a2", "a3"])),
        min_size=1,
        max_size=8,
    )
)
def test_a_tiny_pool_preempts_and_gives_the_same_tokens(requests, engine, tiny_pool_engine):
    batch = [
        Request(None, name, greedy(m), [(i * 31 + t * 7) % 256 for t in range(n)])
        for i, (n, m, name) in enumerate(requests)
    ]
    large, small = engine.generate(batch), tiny_pool_engine.generate(batch)
    assert [o.token_ids for o in small] == [o.token_ids for o in large]
    tiny_pool_engine.check_integrity()
    assert tiny_pool_engine.stats()["pages"]["kv"] == 0


@pytest.fixture(scope="module")
def tiny_pool_engine(engine):
    largest = max(a["pages"] for a in engine.list_adapters())
    model, settings = config(pages=largest + 7)
    with Engine(model, settings, adapters_for(model)) as small:
        yield small
        assert small.stats()["preemptions"] > 0


def test_sampled_answers_repeat_with_their_seed_whatever_else_runs(engine):
    params = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.9, seed=42, ignore_eos=True, n=2)
    request = Request(None, "a0", params, PROMPT)
    alone = engine.generate([request])[0]
    among = engine.generate([Request(None, "a1", greedy(), PROMPT), request, Request(None, None, greedy(), PROMPT)])[1]
    assert [c.token_ids for c in alone.completions] == [c.token_ids for c in among.completions]
    assert alone.completions[0].token_ids != alone.completions[1].token_ids


def test_stop_token_ids_and_eos():
    model, settings = config()
    with Engine(model, settings) as engine:
        tokens = engine.generate([Request(None, None, greedy(), PROMPT)])[0].token_ids
        stop = engine.generate([Request(None, None, greedy(stop_token_ids=(tokens[2],)), PROMPT)])[0]
    assert stop.token_ids == tokens[: tokens.index(tokens[2]) + 1]
    assert (stop.finish_reason, stop.completions[0].stop_reason) == ("stop", tokens[2])


def test_streaming_gives_the_pieces_of_the_whole(engine):
    request = Request(None, "a2", greedy(), PROMPT)
    deltas = list(engine.stream(request))
    assert [t for d in deltas for t in d.token_ids] == engine.generate([request])[0].token_ids
    assert [d.finish_reason for d in deltas] == [None] * 7 + ["length"]
    assert deltas[-1].output.timings.ttft <= deltas[-1].output.timings.latency


def test_a_callback_that_raises_stops_nobody(engine, caplog):
    def fail(delta):
        raise RuntimeError("the caller is unwell")

    request = Request(None, "a0", greedy(), PROMPT)
    wanted = engine.generate([request])[0].token_ids
    assert engine.generate([request], on_delta=fail)[0].token_ids == wanted
    assert "the caller is unwell" in caplog.text
    assert engine.generate([request])[0].token_ids == wanted


def test_closing_a_stream_early_frees_its_pages(engine):
    stream = engine.stream(Request(None, "a2", greedy(400), PROMPT))
    next(stream)
    stream.close()
    stats = engine.stats()
    assert stats["running"] == 0 and stats["pages"]["kv"] == 0


def test_asyncio(engine):
    async def main():
        requests = [Request(None, name, greedy(), PROMPT) for name in (None, "a0", "a1")]
        together = await asyncio.gather(*(engine.agenerate(r) for r in requests))
        task = asyncio.create_task(engine.agenerate(Request(None, None, greedy(400), PROMPT)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return [o.token_ids for o in together], [o.token_ids for o in engine.generate(requests)]

    together, again = asyncio.run(main())
    assert together == again
    assert engine.stats()["running"] == 0


def test_deltas_carry_the_log_probabilities_of_their_tokens(engine):
    output = None
    logprobs = []
    for delta in engine.stream(Request(None, "a1", greedy(4, logprobs=2), PROMPT)):
        assert len(delta.logprobs) == len(delta.token_ids)
        logprobs += delta.logprobs
        output = delta.output
    assert logprobs == output.completions[0].logprobs
    assert next(engine.stream(Request(None, "a1", greedy(4), PROMPT))).logprobs is None


def test_requests_started_together_and_closed_together(engine):
    async def main():
        requests = [Request(None, name, greedy(400), PROMPT, request_id=str(name)) for name in (None, "a0")]
        deltas = await engine.astart(requests)
        async for _ in deltas:
            listed = {r["request_id"]: r for r in await asyncio.to_thread(engine.list_requests)}
            if listed["a0"]["state"] == "running":
                break
        deltas.close()
        assert listed["a0"] | dict(generated_tokens=0) == dict(
            request_id="a0", adapter="a0", state="running", prompt_tokens=7, generated_tokens=0
        )
        assert [delta async for delta in deltas] == []
        with pytest.raises(AdapterError):
            await engine.astart([requests[0], Request(None, "nobody", greedy(), PROMPT)])
        short = await engine.astart([Request(None, name, greedy(3), PROMPT) for name in (None, "a0")])
        seen = [index async for index, _ in short]
        assert sorted(seen) == [0, 0, 0, 1, 1, 1]
        return [o.token_ids for o in short.outputs]

    tokens = asyncio.run(main())
    assert tokens == [o.token_ids for o in engine.generate([Request(None, n, greedy(3), PROMPT) for n in (None, "a0")])]
    assert engine.list_requests() == [] and engine.stats()["pages"]["kv"] == 0


def test_a_start_that_is_cancelled_leaves_nothing(engine, monkeypatch):
    forward, hold, held = engine._core.runner.forward, threading.Event(), threading.Event()

    def slow(batch):
        held.set()
        hold.wait(10)
        return forward(batch)

    async def main():
        task = asyncio.create_task(engine.astart([Request(None, None, greedy(400), PROMPT)]))
        while not engine._loop._calls.qsize():  # queued behind the step that hangs
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(engine._core.runner, "forward", slow)
    stream = engine.stream(Request(None, None, greedy(2), PROMPT))
    assert held.wait(10)
    asyncio.run(main())
    hold.set()
    assert sum(len(d.token_ids) for d in stream) == 2
    assert engine.list_requests() == []


def test_abort_ends_a_request_and_only_that(engine):
    results = {}

    def work(name):
        results[name] = engine.generate([Request(None, None, greedy(300), PROMPT, request_id=name)])[0]

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    while engine.stats()["running"] < 2:
        time.sleep(0.001)
    assert engine.abort("one") and not engine.abort("nobody")
    for thread in threads:
        thread.join()
    assert results["one"].finish_reason == "abort" and len(results["one"].token_ids) < 300
    assert results["two"].finish_reason == "length" and len(results["two"].token_ids) == 300


def test_adapters_as_arrays_straight_from_a_trainer(engine):
    model = engine.model
    cfg = model.config
    key = jax.random.key(0)
    arrays = {
        "q": {
            "a": jax.random.normal(key, (cfg.num_layers, 4, cfg.hidden_size)) * 0.1,
            "b": jax.random.normal(key, (cfg.num_layers, cfg.q_size, 4)) * 0.1,
        }
    }
    adapter = Adapter.from_arrays(arrays, cfg, lora_alpha=8)
    engine.add_adapter("trained", adapter)
    got = engine.generate([Request(None, "trained", greedy(2, logprobs=0), PROMPT)])[0]
    logits = llama_logits(cfg, model.params, PROMPT, adapter)[-1]
    assert got.token_ids[0] == logits.argmax()
    engine.remove_adapter("trained")


def test_prefix_caching_changes_no_answer():
    shared = [(7 * t) % 256 for t in range(70)]
    requests = [
        Request(None, name, greedy(6, logprobs=5), shared[:n] + [i])
        for i, (n, name) in enumerate(
            [(70, None), (70, "a0"), (40, None), (64, "a1"), (70, "a0"), (48, None), (3, None)]
        )
    ]
    answers = {}
    for caching in (False, True):
        model, settings = config(prefix_caching=caching)
        with Engine(model, settings, adapters_for(model)) as engine:
            engine.generate(requests[:4])
            answers[caching] = engine.generate(requests)
            stats = engine.stats()
            engine.check_integrity()
            if caching:
                assert stats["prefix_cache"]["hit_tokens"] >= 4 * 64 and 0 < stats["prefix_cache"]["hit_rate"] < 1
                assert stats["pages"]["idle_kv"] > 0 and stats["pages"]["kv"] == 0
                engine.remove_adapter("a0")
                engine.check_integrity()
                assert engine.stats()["pages"]["idle_kv"] < stats["pages"]["idle_kv"]
            else:
                assert stats["prefix_cache"]["hit_tokens"] == stats["pages"]["idle_kv"] == 0
    for plain, cached in zip(answers[False], answers[True], strict=True):
        assert plain.token_ids == cached.token_ids
        for a, b in zip(plain.completions[0].logprobs, cached.completions[0].logprobs, strict=True):
            assert a.top.keys() == b.top.keys()
            assert [*a.top.values()] == pytest.approx([*b.top.values()], abs=1e-5)
