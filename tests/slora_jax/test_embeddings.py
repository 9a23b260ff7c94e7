"""Embeddings: final hidden states of prompts, against a float64 forward pass, among requests that generate."""

import asyncio
import functools
import threading

from engines import PROMPT, adapters_for, config, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from oracles import llama_hidden
import pytest

from slora_jax import (
    AdapterError,
    CapacityError,
    EmbeddingRequest,
    Engine,
    Request,
    RequestError,
    SloraError,
)


@pytest.fixture(scope="module")
def adapters():
    return adapters_for(config()[0])


@pytest.fixture(scope="module")
def engine(adapters):
    model, options = config()
    with Engine(model, options, adapters) as engine:
        yield engine


@functools.cache
def _reference(tokens, name):
    model, _ = config()
    return llama_hidden(model.config, model.params, tokens, adapters_for(model).get(name))[-1]


def reference(tokens, name, normalize=True):
    vector = _reference(tuple(tokens), name)
    return vector / np.linalg.norm(vector) if normalize else vector


def tokens_of(length, seed=0):
    return np.random.default_rng([length, seed]).integers(0, 256, length).tolist()


def test_equal_to_float64_for_base_and_adapters_of_every_length(engine):
    """130 tokens take three chunks; one token is a step of its own kind."""
    requests = [
        EmbeddingRequest(None, name, tokens_of(length), normalize)
        for name in (None, "a0", "a1")
        for length, normalize in ((1, True), (17, False), (33, True), (130, True))
    ]
    for request, output in zip(requests, engine.embed(requests), strict=True):
        ref = reference(request.prompt_token_ids, request.adapter, request.normalize)
        np.testing.assert_allclose(output.embedding, ref, atol=2e-5 * np.abs(ref).max(), rtol=0)
        assert output.embedding.dtype == np.float32 and output.error is None
        assert output.prompt_token_ids == request.prompt_token_ids and output.adapter == request.adapter
        assert (output.adapter_digest is None) == (request.adapter is None)
    engine.check_integrity()


def test_a_request_that_generates_beside_it_gets_the_same_answer(engine):
    requests = [Request(None, name, greedy(12, logprobs=3), PROMPT) for name in (None, "a0", "a1")]
    alone = engine.generate(requests)
    counted = engine.stats()["generated_tokens"]
    ready, mixed = threading.Event(), []
    thread = threading.Thread(target=lambda: mixed.extend(engine.generate(requests, on_delta=lambda _: ready.set())))
    thread.start()
    ready.wait()
    while thread.is_alive():
        engine.embed([EmbeddingRequest(None, name, tokens_of(30)) for name in ("a2", None)])
    thread.join()
    assert [o.token_ids for o in mixed] == [o.token_ids for o in alone]
    for a, b in zip(alone, mixed, strict=True):
        for x, y in zip(a.completions[0].logprobs, b.completions[0].logprobs, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
    assert engine.stats()["generated_tokens"] == counted + 36  # an embedding is no answer


@settings(max_examples=10)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 16, 33, 90]), st.sampled_from([None, "a0", "a3"]), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_neighbours_preemption_and_prefixes_change_nothing(tight, adapters, mix):
    """In a small pool, where prompts share their beginnings and adapters take turns."""
    embed = [EmbeddingRequest(None, name, tokens_of(90)[:n]) for n, name, wanted in mix if wanted]
    other = [Request(None, name, greedy(20), tokens_of(90)[:n]) for n, name, wanted in mix if not wanted]
    thread = threading.Thread(target=tight.generate, args=(other,))
    thread.start()
    outputs = tight.embed(embed)
    thread.join()
    for request, output in zip(embed, outputs, strict=True):
        ref = reference(request.prompt_token_ids, request.adapter)
        np.testing.assert_allclose(output.embedding, ref, atol=2e-5)
    tight.check_integrity()
    pages = tight.stats()["pages"]
    assert pages["kv"] == pages["adapter"] == 0


@pytest.fixture(scope="module")
def tight(adapters):
    model, options = config(pages=max(a.num_pages(config()[0].config.geometry) for a in adapters.values()) + 12)
    with Engine(model, options, adapters) as engine:
        yield engine
        stats = engine.stats()
        assert stats["prefix_cache"]["hit_tokens"] and stats["adapter_loads"] > 2


def test_deterministic_vectors_are_the_same_bits_in_any_company(adapters):
    model, options = config(deterministic=True, seq_buckets=None, token_buckets=None)
    request = EmbeddingRequest(None, "a1", tokens_of(70))
    answer = Request(None, "a1", greedy(6, logprobs=2), PROMPT)
    with Engine(model, options, adapters) as engine:
        alone, answered = engine.embed([request])[0], engine.generate([answer])[0]
        others = [EmbeddingRequest(None, name, tokens_of(40, i)) for i, name in enumerate((None, "a0", "a1", "a3"))]
        mixed = []
        thread = threading.Thread(target=lambda: mixed.extend(engine.generate([answer] * 3)))
        thread.start()
        crowded = engine.embed([*others, request, *others])[4]
        thread.join()
    assert crowded.embedding.tobytes() == alone.embedding.tobytes()
    assert all(o.completions[0].logprobs == answered.completions[0].logprobs for o in mixed)


def test_steps_are_compiled_only_where_somebody_embeds():
    model, options = config(warm_up="greedy")
    with Engine(model, options) as engine:
        programs = engine._core.runner.programs
        assert not any(shape.hidden for shape in programs.compiled_steps())
        engine.generate([Request(None, None, greedy(2), PROMPT)])
        assert engine.stats()["compiles"] == 0
        engine.embed([EmbeddingRequest(None, None, PROMPT)])
        assert engine.stats()["compiles"] == 1
    model, options = config(warm_up="greedy", embeddings=True)
    with Engine(model, options) as engine:
        assert (
            sum(shape.hidden for shape in engine._core.runner.programs.compiled_steps()) == 2
        )  # with adapters, without
        engine.embed([EmbeddingRequest(None, None, tokens_of(n)) for n in (1, 7, 100)])
        assert engine.stats()["compiles"] == 0


def test_a_prompt_may_fill_the_model_and_no_more():
    model, options = config(max_model_len=48)
    with Engine(model, options) as engine:
        output = engine.embed([EmbeddingRequest(None, None, tokens_of(48))])[0]
        np.testing.assert_allclose(output.embedding, reference(tokens_of(48), None), atol=2e-5)
        with pytest.raises(RequestError, match="49 tokens and the model takes 48; shorten it"):
            engine.embed([EmbeddingRequest(None, None, tokens_of(49))])


def test_bad_requests_are_refused_before_anything_is_queued(engine):
    steps = engine.stats()["steps"]
    good = EmbeddingRequest(None, None, PROMPT)
    for bad, error in (
        (EmbeddingRequest(None, None, []), RequestError),
        (EmbeddingRequest(None, None, [256]), RequestError),
        (EmbeddingRequest("text", None, PROMPT), RequestError),
        (EmbeddingRequest(None, "nobody", PROMPT), AdapterError),
        ("the tiny model has no tokenizer", RequestError),
    ):
        with pytest.raises(error):
            engine.embed([good, bad])
    assert engine.stats()["steps"] == steps
    model, options = config(pages=4)
    with Engine(model, options) as small, pytest.raises(CapacityError, match="may need 7 pages"):
        small.embed([EmbeddingRequest(None, None, tokens_of(100))])


def test_asyncio_and_a_closed_engine(adapters):
    model, options = config()
    engine = Engine(model, options, adapters)
    request = EmbeddingRequest(None, "a0", PROMPT)

    async def both():
        return await asyncio.gather(
            engine.aembed([request, request]), engine.agenerate(Request(None, "a0", greedy(3), PROMPT))
        )

    vectors, output = asyncio.run(both())
    np.testing.assert_allclose(vectors[0].embedding, reference(PROMPT, "a0"), atol=2e-5)
    assert len(vectors) == 2 and len(output.token_ids) == 3
    engine.close()
    with pytest.raises(SloraError, match="closed"):
        engine.embed([request])


def test_logits_that_are_not_finite_end_with_the_error():
    model, options = config()
    with Engine(model, options) as engine:
        params = dict(engine._core.runner.params)
        params["final_norm"] = params["final_norm"] * np.float32("nan")
        engine._core.runner.params = params
        output = engine.embed([EmbeddingRequest(None, None, PROMPT)])[0]
        assert output.embedding is None and "not finite" in output.error
