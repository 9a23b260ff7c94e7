"""Deterministic mode: the same bits alone, in a full batch, after preemption, after a reload, on other pages."""

from engines import adapters_for, config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from slora_jax import AdapterError, Engine, EngineConfig, Request, SamplingParams, SloraError
from slora_jax.adapters import random_adapter
from slora_jax.page_pool import PagePool
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import Sequence

KINDS = dict(
    greedy=dict(),
    random=dict(temperature=0.9, top_p=0.95, seed=5),
    penalised=dict(repetition_penalty=1.2),
    biased=dict(logit_bias={9: 2.0}, temperature=1.0, seed=6),
    prompt=dict(prompt_logprobs=3),
)


@pytest.fixture(scope="module")
def engine():
    """Little room: requests preempt each other, and adapters evict each other."""
    model, settings = config(
        max_seqs=4, max_step_tokens=40, seq_buckets=None, token_buckets=None, deterministic=True, dtype="float32"
    )
    adapters = adapters_for(model, 3)
    pages = max(a.num_pages(model.config.geometry) for a in adapters.values()) + 12
    size = settings.page_pool_bytes // 200
    settings = EngineConfig(**{**vars(settings), "page_pool_bytes": pages * size})
    with Engine(model, settings, adapters) as engine:
        yield engine
        stats = engine.stats()
        assert stats["preemptions"] > 0 and stats["adapter_loads"] > 3 and stats["prefix_cache"]["hit_tokens"] > 0


def request(prompt, answer, adapter, kind, text):
    tokens = [(text * 31 + t * 7) % 256 for t in range(prompt)]
    options = dict(logprobs=4) | KINDS[kind]
    return Request(None, adapter, SamplingParams(max_tokens=answer, ignore_eos=True, **options), tokens)


def bits(output):
    """All that an answer says, to the last bit."""
    completion = output.completions[0]
    lists = [*(completion.logprobs or ()), *(p for p in output.prompt_logprobs or () if p)]
    logprobs = [(p.token_id, np.float32(p.logprob).tobytes(), sorted(p.top.items())) for p in lists]
    return completion.token_ids, completion.finish_reason, logprobs


one = st.tuples(
    st.sampled_from([1, 2, 17, 33, 49, 60]) | st.integers(1, 60),
    st.integers(1, 40),
    st.sampled_from([None, "a0", "a1", "a2"]),
    st.sampled_from(list(KINDS)),
    st.integers(0, 1),  # so that prompts share their beginnings
)


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@example(specs=[(12, 60, (None, "a0")[i % 2], kind, i % 2) for i, kind in enumerate((*KINDS, "greedy"))])
@example(specs=[(n, 20, "a1", "greedy", 0) for n in (49, 33, 50, 17, 64)])
@given(specs=st.lists(one, min_size=2, max_size=7))
def test_an_answer_has_the_same_bits_alone_and_among_others(specs, engine):
    requests = [request(*spec) for spec in specs]
    alone = [bits(engine.generate([r])[0]) for r in requests]
    for _ in range(2):  # the second time, prefixes are there
        assert [bits(o) for o in engine.generate(requests)] == alone
    engine.check_integrity()


def test_an_answer_has_the_same_bits_after_its_adapter_was_loaded_again_to_other_pages(engine):
    wanted = request(20, 30, "a0", "greedy", 0)
    first = bits(engine.generate([wanted])[0])
    where = engine.page_map()
    digest = next(a["digest"] for a in engine.list_adapters() if a["name"] == "a0")
    holder = engine.stream(request(30, 40, None, "greedy", 5))  # takes pages, so that others are left
    next(holder)
    engine.generate([request(40, 20, "a1", "greedy", 1), request(40, 20, "a2", "greedy", 2)])
    again = bits(engine.generate([wanted])[0])
    moved = [p for p, held in enumerate(engine.page_map()) if held == digest]
    assert again == first and moved != [p for p, held in enumerate(where) if held == digest]
    holder.close()


def test_what_would_change_the_shapes_is_refused(engine):
    with pytest.raises(AdapterError, match="has rank 64, max_lora_rank is 32"):
        engine.add_adapter("larger", random_adapter(engine.model.config, 64, ("q",)))
    with pytest.raises(SloraError, match="one size each; leave seq_buckets and token_buckets out"):
        EngineConfig(max_seqs=8, seq_buckets=(4, 8), deterministic=True).resolved()
    with pytest.raises(SloraError, match="at least 4, not 2"):
        EngineConfig(max_seqs=1, max_step_tokens=2, deterministic=True).resolved()


@settings(max_examples=60)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=8),
    num_pages=st.integers(6, 24),
    budget=st.integers(4, 40),
)
def test_each_token_is_always_computed_by_the_same_kind_of_step(prompts, num_pages, budget):
    scheduler = Scheduler(
        PagePool(num_pages), max_seqs=4, max_step_tokens=budget, deterministic=True, prefix_page_cost=0.01
    )
    for i, (prompt, answer) in enumerate(prompts):
        tokens = [i % 2] * prompt
        scheduler.add(Sequence(seq_id=i, tokens=tokens, prompt_len=prompt, max_tokens=answer))
    steps = 0
    while scheduler.has_work():
        plan = scheduler.schedule()
        assert plan.chunks
        for c in plan.chunks:
            assert plan.decode_only == (c.start >= c.seq.prompt_len)
            assert c.length == 1 if plan.decode_only else c.start + c.length <= c.seq.prompt_len
            # a single token of a prompt only where it is the whole prompt
            assert c.length > 1 or plan.decode_only or c.seq.prompt_len == 1
        scheduler.complete(plan)
        for c in plan.chunks:
            if c.samples:
                c.seq.push(3)
                if c.seq.output_len == c.seq.max_tokens:
                    scheduler.remove(c.seq)
        scheduler.pool.check_integrity()
        steps += 1
        assert steps < 5000, "the requests do not finish"
