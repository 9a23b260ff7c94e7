"""Steps that overlap: the same answers as one step after another, whatever ends, is aborted or preempted meanwhile."""

import dataclasses
import threading
import time

from engines import PROMPT, adapters_for, config, greedy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
import pytest

from slora_jax import Engine, Request, SamplingParams, jobs


class Letters:
    """A tokenizer of one letter a token, so that stop strings have something to be found in."""

    def stream(self, skip_special=True):
        return self

    def push(self, token_id):
        return chr(ord("a") + token_id % 26)

    def flush(self):
        return ""


def tiny(pages, **options):
    model, settings = config(
        pages=pages, max_seqs=4, seq_buckets=(4,), max_step_tokens=32, token_buckets=(32,), **options
    )
    return Engine(dataclasses.replace(model, tokenizer=Letters()), settings, adapters_for(model, 2))


@pytest.fixture(scope="module")
def engines():
    """With and without overlap in a pool that has little room, and without in one that has enough."""
    with tiny(200) as large:
        pages = max(a["pages"] for a in large.list_adapters()) + 8
        with tiny(pages) as on, tiny(pages, overlap=False) as off, tiny(200, overlap=False) as wide:
            yield on, off, wide
            assert on.stats()["preemptions"] > 0


one = st.fixed_dictionaries(
    dict(
        prompt=st.integers(1, 50),
        answer=st.integers(1, 30),
        adapter=st.sampled_from([None, "a0", "a1"]),
        stops=st.integers(0, 3),  # how many token ids end it, of some that are likely
        strings=st.booleans(),  # and whether their letters do, too
        kind=st.sampled_from(["greedy", "greedy", "random", "filtered", "penalised", "biased", "logprobs", "prompt"]),
        aborted=st.booleans(),
    )
)


def mix(*kinds):
    """Long ones, more than fit."""
    plain = dict(prompt=12, answer=60, adapter=None, stops=0, strings=False, aborted=True)
    return [dict(plain, kind=kind, adapter=(None, "a0")[i % 2]) for i, kind in enumerate(kinds)]


def make(index, spec, likely):
    options = dict(
        random=dict(temperature=1.0, seed=index),
        filtered=dict(temperature=0.8, top_p=0.9, seed=index),
        penalised=dict(repetition_penalty=1.3, presence_penalty=0.5),
        biased=dict(logit_bias={7: 3.0}),
        logprobs=dict(logprobs=2),
        prompt=dict(prompt_logprobs=1),
    ).get(spec["kind"], {})
    if spec["strings"]:
        options["stop"] = [Letters().push(t) * 2 for t in likely] + [Letters().push(t) for t in likely[1:2]]
    params = SamplingParams(
        max_tokens=spec["answer"], ignore_eos=True, stop_token_ids=tuple(likely[: spec["stops"]]), **options
    )
    prompt = [(index * 31 + t * 7) % 256 for t in range(spec["prompt"])]
    return Request(None, spec["adapter"], params, prompt, request_id=str(index))


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@example(specs=mix("greedy", "random", "greedy", "filtered", "greedy", "logprobs"))
@example(specs=mix("greedy", "penalised", "prompt", "greedy", "biased"))
@given(specs=st.lists(one, min_size=1, max_size=7))
def test_answers_are_those_of_one_step_after_another(specs, engines):
    on, off, wide = engines
    sample = wide.generate([make(i, dict(s, stops=0), ()) for i, s in enumerate(specs)])
    likely = [t for o in sample for t in o.token_ids[1::3]][:3]
    requests = [make(i, s, likely) for i, s in enumerate(specs)]
    want = wide.generate(requests)
    aborted = {str(i) for i, s in enumerate(specs) if s["aborted"] and i % 2}

    def abort(delta):
        if delta.request_id in aborted and delta.finish_reason is None:
            aborts.append(threading.Thread(target=on.abort, args=(delta.request_id,)))
            aborts[-1].start()

    aborts: list[threading.Thread] = []
    for engine, sink in ((on, None), (off, None), (on, abort)):
        got = engine.generate(requests, on_delta=sink)
        for thread in aborts:  # a late one would abort the next request of this name
            thread.join()
        for a, b in zip(got, want, strict=True):
            if sink and a.finish_reason == "abort":
                assert a.token_ids == b.token_ids[: len(a.token_ids)]
                continue
            assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
            assert a.completions[0].stop_reason == b.completions[0].stop_reason
            assert [x.token_id for x in a.completions[0].logprobs or ()] == [
                x.token_id for x in b.completions[0].logprobs or ()
            ]
            assert [x and x.token_id for x in a.prompt_logprobs or ()] == [
                x and x.token_id for x in b.prompt_logprobs or ()
            ]
        engine.check_integrity()
        stats = engine.stats()
        assert stats["running"] == stats["waiting"] == stats["pages"]["kv"] == stats["pages"]["adapter"] == 0


def test_the_next_step_is_dispatched_before_the_results_of_the_last_are_taken(engines, monkeypatch):
    runner, seen = engines[0]._core.runner, []
    forward, fetch = runner.forward, runner.fetch
    monkeypatch.setattr(runner, "forward", lambda batch: (seen.append("forward"), forward(batch))[1])
    monkeypatch.setattr(runner, "fetch", lambda *args: (seen.append("fetch"), fetch(*args))[1])
    engines[0].generate([Request(None, None, greedy(4), PROMPT)])
    assert seen == ["forward", "forward", "fetch", "forward", "fetch", "forward", "fetch", "fetch"]
    seen.clear()
    engines[0].generate([Request(None, None, greedy(3, presence_penalty=0.1), PROMPT)])
    assert seen == ["forward", "fetch", "forward", "fetch", "forward", "fetch"]  # each needs the tokens before it


def test_first_tokens_go_out_before_the_next_step_is_planned_and_others_after(engines, monkeypatch):
    core, seen = engines[0]._core, []
    schedule, deliver = core.scheduler.schedule, core._deliver
    monkeypatch.setattr(core.scheduler, "schedule", lambda: (seen.append("plan"), schedule())[1])

    def told(events):
        seen.extend(len(generation.seq.tokens) for generation, token, *_ in events if token is not None)
        deliver(events)

    monkeypatch.setattr(core, "_deliver", told)
    engines[0].generate([Request(None, None, greedy(3), PROMPT)])
    n = len(PROMPT)
    assert seen == ["plan", "plan", n + 1, "plan", "plan", n + 2, n + 3]


def test_an_answer_that_ended_is_told_though_taking_another_s_results_fails(engines, monkeypatch, caplog):
    advance = jobs.Generation.advance

    def fail(self, token):
        if self.job.params.max_tokens == 9:
            raise RuntimeError("the constraint is unwell")
        return advance(self, token)

    monkeypatch.setattr(jobs.Generation, "advance", fail)
    short, long = engines[0].generate([Request(None, None, greedy(n), PROMPT) for n in (1, 9)])
    assert short.finish_reason == "length" and len(short.token_ids) == 1
    assert long.finish_reason == "error" and "unwell" in long.completions[0].error


def test_an_adapter_crosses_the_bus_beside_a_step_and_behind_its_batch(engines, monkeypatch):
    engine, seen = engines[0], []
    digests, pages = [row["digest"] for row in engine.list_adapters()], engine._core.scheduler.adapters
    engine._loop.call(lambda: [pages.forget(digest) for digest in digests if digest])
    runner, tiers = engine._core.runner, engine._core.tiers
    for owner, name in ((runner, "put"), (tiers, "_send"), (tiers, "_write"), (runner, "forward")):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, call=call: (seen.append(name), call(*args))[1])
    running = engine.stream(Request(None, None, greedy(60), PROMPT, request_id="long"))
    next(running)
    engine.generate([Request(None, "a0", greedy(2), PROMPT)])
    at = seen.index("_send")
    assert seen[at - 1 : at + 5] == ["put", "_send", "forward", "_write", "put", "forward"]
    running.close()


def test_pages_are_free_when_abort_returns(engines):
    engine = engines[0]
    stream = engine.stream(Request(None, "a0", greedy(60), PROMPT, request_id="long"))
    next(stream)
    assert engine.abort("long")
    assert engine.stats()["pages"]["kv"] == 0
    assert [d.finish_reason for d in stream][-1] == "abort"


def test_a_scheduler_that_raises_ends_what_ran_and_the_engine_serves_on(engines, monkeypatch, caplog):
    engine = engines[0]
    policy, calls = engine._core.scheduler.policy, []

    def order(view):
        calls.append(view)
        if len(calls) in (1, 3):
            raise RuntimeError("the policy is unwell")
        return view.waiting

    monkeypatch.setattr(policy, "order", order)
    failed = engine.generate([Request(None, "a0", greedy(), PROMPT)])[0]  # nothing ran: it ends itself
    assert failed.finish_reason == "error" and failed.completions[0].error == "the step failed: the policy is unwell"
    stream = engine.stream(Request(None, "a0", greedy(60), PROMPT))
    next(stream)
    later = engine.generate([Request(None, "a1", greedy(3), PROMPT)])[0]  # makes the policy raise, and waits
    assert [d.finish_reason for d in stream][-1] == "error"
    assert later.finish_reason == "length"
    engine.check_integrity()
    monkeypatch.undo()
    assert engine.generate([Request(None, "a0", greedy(), PROMPT)])[0].finish_reason == "length"


def test_an_error_while_results_are_fetched_ends_what_ran(engines, monkeypatch, caplog):
    engine = engines[0]
    fetch, calls = engine._core.runner.fetch, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("the device is unwell")
        return fetch(*args)

    monkeypatch.setattr(engine._core.runner, "fetch", failing)
    request = Request(None, "a0", greedy(), PROMPT)
    failed, again = engine.generate([request])[0], engine.generate([request])[0]
    assert failed.completions[0].error == "the step failed: the device is unwell" and len(failed.token_ids) == 2
    assert again.finish_reason == "length" and again.token_ids[:2] == failed.token_ids
    engine.check_integrity()


def test_a_slow_reader_of_one_answer_holds_up_no_step(engines):
    engine = engines[0]
    hold, results = threading.Event(), {}

    def slow(delta):
        hold.wait(30)

    def work():
        results["slow"] = engine.generate([Request(None, None, greedy(5), PROMPT)], on_delta=slow)[0]

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 30
    while engine.stats()["finished_requests"] < 1 or engine.stats()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    hold.set()
    thread.join()
    assert len(results["slow"].token_ids) == 5
