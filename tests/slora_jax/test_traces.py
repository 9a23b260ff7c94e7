"""S-LoRA's synthetic trace, number for number, and traces from files."""

import dataclasses

import pytest

from slora_jax.errors import AdapterError, RequestError
from slora_jax.traces import (
    SETTINGS,
    Setting,
    TraceRequest,
    burst,
    chat_trace,
    merge,
    parse_trace,
    prompt_tokens,
    synthetic_trace,
    with_prefix,
)


@pytest.mark.parametrize(
    ("rate", "seconds", "cv", "count", "inputs", "outputs", "last"),
    [
        (2, 300, 1, 600, 153_447, 155_474, 301.0),
        (2, 300, 2, 600, 153_447, 155_474, 284.7),
        (2, 300, 4, 600, 153_447, 155_474, 353.8),
        (2, 300, 6, 600, 153_447, 155_474, 343.2),
        (2, 300, 8, 600, 153_447, 155_474, 432.5),
        (10, 300, 1, 3000, 796_559, 758_010, 284.9),
        (6, 300, 1, 1800, 466_980, 469_301, 293.7),
        (6, 300, 8, 1800, 466_980, 469_301, 290.7),
        (10, 120, 1, 1200, 314_805, 315_809, 125.0),
    ],
)
def test_checksums_of_the_synthetic_trace(rate, seconds, cv, count, inputs, outputs, last):
    trace = synthetic_trace(adapters=200, rate=rate, seconds=seconds, cv=cv)
    assert len(trace) == count
    assert (sum(r.prompt_len for r in trace), sum(r.output_len for r in trace)) == (inputs, outputs)
    assert trace[-1].arrival == pytest.approx(last, abs=0.05)
    assert [r.arrival for r in trace] == sorted(r.arrival for r in trace)


@pytest.mark.parametrize(("alpha", "top"), [(1.0, 0.013), (0.6, 0.048), (0.3, 0.225), (0.1, 0.57)])
def test_popularity_of_adapters(alpha, top):
    trace = synthetic_trace(adapters=200, rate=2, seconds=300, alpha=alpha)
    counts = [[r.adapter for r in trace].count(a) for a in {r.adapter for r in trace}]
    assert max(counts) / 600 == pytest.approx(top, abs=0.005)
    if alpha == 1.0:
        assert len(counts) == 187
        assert [r.prompt_len for r in trace[:3]] == [12, 473, 99] and [r.output_len for r in trace[:3]] == [
            410,
            43,
            292,
        ]


def test_the_burst_that_others_were_measured_with():
    trace = burst(synthetic_trace(adapters=200, rate=10, requests=1000))
    assert (len(trace), sum(r.prompt_len for r in trace), sum(r.output_len for r in trace)) == (1000, 266_036, 257_916)


def test_conversations_are_as_long_as_those_of_the_paper():
    trace = chat_trace(rate=2, requests=20_000)
    assert sum(r.prompt_len for r in trace) / len(trace) == pytest.approx(85, rel=0.02)
    assert sum(r.output_len for r in trace) / len(trace) == pytest.approx(165, rel=0.02)
    assert max(max(r.prompt_len, r.output_len) for r in trace) < 512
    assert len({r.adapter for r in trace}) == 26
    assert chat_trace(rate=2, requests=50) == chat_trace(rate=2, seconds=25)


def test_prompts_share_their_adapters_prefix_and_nothing_else():
    trace = with_prefix(synthetic_trace(adapters=3, rate=1, requests=12, lengths=(4, 9)), 40)
    trace[5] = dataclasses.replace(trace[5], prefix_len=50, prompt_len=60)
    prompts = prompt_tokens(trace, 32_000, seed=1)
    assert [len(p) for p in prompts] == [r.prompt_len for r in trace]
    assert all(3 <= t < 32_000 for p in prompts for t in p)
    for i, a in enumerate(trace):
        for j, b in enumerate(trace[:i]):
            same = a.adapter == b.adapter
            assert (prompts[i][:40] == prompts[j][:40]) == same
            assert prompts[i][50:54] != prompts[j][50:54] or len(prompts[i]) < 54
    quiet, noisy = (synthetic_trace(adapters=1, rate=r, seconds=9) for r in (1, 5))
    both = merge(quiet, noisy)
    assert len(both) == 54 and [r.arrival for r in both] == sorted(r.arrival for r in [*quiet, *noisy])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(rate=1, seconds=1, requests=1), "either its seconds or its requests"),
        (dict(rate=1), "either its seconds or its requests"),
        (dict(rate=0.1, seconds=1), "less than one request"),
        (dict(rate=1, requests=0), "must be positive"),
        (dict(rate=1, requests=1, alpha=0), "alpha and cv of a trace must be positive"),
        (dict(rate=1, requests=1, lengths=(5, 5)), "lengths of a trace must go up"),
        (dict(rate=1, requests=1, adapters=-1), "0 or more adapters, not -1"),
    ],
)
def test_bad_options_of_a_trace_are_named(options, words):
    with pytest.raises(RequestError, match=words):
        synthetic_trace(**dict(adapters=2) | options)


def test_base_model_burst_and_settings():
    trace = burst(synthetic_trace(adapters=0, rate=2, seconds=5))
    assert len(trace) == 10 and all(r.adapter is None and r.arrival == 0 for r in trace)
    assert SETTINGS["S2"].ranks == (64, 32, 16, 8)
    with pytest.raises(AdapterError, match="ranks must be at least 1, not 0"):
        Setting("llama-7b", (8, 0))


def test_a_trace_from_json_lines():
    lines = [
        '{"arrival": 2, "adapter": null, "prompt_len": 3, "output_len": 4}',
        "",
        '{"arrival": 1.5, "adapter": 7, "prompt_len": 1, "output_len": 1, "tenant": "a", "priority": 2}',
    ]
    assert parse_trace(lines) == [TraceRequest(1.5, 7, 1, 1, "a", 2), TraceRequest(2, None, 3, 4)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "line 1 of the trace: Expecting value"),
        ("[]", "line 1 of the trace: not an object with the fields adapter, arrival"),
        (
            '{"arrival": 1, "adapter": null, "prompt_len": 0, "output_len": 4}',
            "prompt_len must be an integer of at least 1",
        ),
        ('{"arrival": -1, "adapter": null, "prompt_len": 1, "output_len": 4}', "arrival must be a number of seconds"),
        ('{"arrival": 1, "adapter": "x", "prompt_len": 1, "output_len": 4}', "adapter must be an integer"),
        ('{"arrival": 1}', "line 1 of the trace: .*missing"),
        ("", "the trace is empty"),
    ],
)
def test_a_bad_trace_is_named(line, words):
    with pytest.raises(RequestError, match=words):
        parse_trace([line])
