"""S-LoRA's synthetic trace, number for number, and traces from files."""

import pytest

from slora_jax.errors import AdapterError, RequestError
from slora_jax.traces import SETTINGS, Setting, TraceRequest, burst, parse_trace, synthetic_trace


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
