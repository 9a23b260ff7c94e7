"""The twin: cost model and figures by hand; the scheduler under load: starvation, fairness, thrash, early abort."""

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving import policies
from benchmarks.serving.policies import a100_40, others_p99, slow
import slora_jax
from slora_jax.buckets import Buckets
from slora_jax.cli import main
from slora_jax.errors import CapacityError, SloraError
from slora_jax.shapes import named_shape
from slora_jax.traces import SETTINGS, TraceRequest, burst, synthetic_trace
from slora_jax.twin import (
    CostModel,
    Record,
    Simulation,
    StepLog,
    StepWork,
    calibrate,
    fit_cost,
    ideal_cost,
    simulate,
    summarise,
)
from slora_jax.twin.metrics import fairness

CONFIG = named_shape("llama-7b")
SLOW = CostModel(
    name="slow", step=0.02, weights=0.08, token=2e-4, decode_context=1e-6, adapter_byte=4e-12, load_byte=1e-10
)


def run(trace, **options):
    options = dict(config=CONFIG, setting=SETTINGS["S2"], cost=SLOW, max_seqs=8, page_pool_bytes=4 << 30) | options
    return simulate(Simulation(**options), trace)


def test_the_ideal_cost_counts_bytes_and_operations():
    cost = ideal_cost(CONFIG)
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 65 * 4096 + 32000 * 4096
    assert cost.weights == pytest.approx(2 * weights / 4.3e12)
    assert cost.seconds(StepWork(decode_tokens=1)) == cost.weights
    tokens = 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) / 790e12
    work = StepWork(
        decode_tokens=24, prompt_tokens=1000, decode_context=10_000, prompt_context=500, adapter_bytes=1 << 30
    )
    want = 1024 * tokens + 10_000 * 2**19 / 4.3e12 + 500 * 4 * 32 * 4096 / 790e12 + 2**30 / 4.3e12
    assert cost.seconds(work) == pytest.approx(want)
    assert cost.seconds(dataclasses.replace(work, load_bytes=1 << 20)) == pytest.approx(want)  # beside the step
    assert cost.seconds(dataclasses.replace(work, load_bytes=1 << 36)) == pytest.approx(2**36 / 43e9)


def test_adapters_have_the_sizes_of_the_paper():
    simulation = Simulation(config=CONFIG, setting=SETTINGS["S2"], cost=SLOW)
    assert [simulation.adapter_bytes(i) >> 20 for i in range(4)] == [128, 64, 32, 16]
    assert [simulation.adapter(i).num_pages for i in range(4)] == [16, 8, 4, 2]


def test_steps_that_overlap_are_planned_one_ahead():
    """Who comes while a step runs finds the next one planned, as in an engine."""
    cost = CostModel(name="a second a step", step=1.0)
    trace = [TraceRequest(0.0, None, 4, 6), TraceRequest(0.5, None, 4, 2)]
    alone, ahead = (run(trace, cost=cost, overlap=overlap) for overlap in (False, True))
    assert [r.first_token for r in alone.records] == [1.0, 2.0]
    assert [r.first_token for r in ahead.records] == [1.0, 3.0]
    assert [r.finished for r in alone.records] == [6.0, 3.0]
    assert [r.finished for r in ahead.records] == [6.0, 4.0]
    assert alone.counters["steps"] == ahead.counters["steps"] == 6
    late = [TraceRequest(0.0, None, 4, 1), TraceRequest(9.5, None, 4, 1)]
    assert [r.first_token for r in run(late, cost=cost, overlap=True).records] == [1.0, 10.5]  # nothing was planned


def test_a_cost_model_survives_its_file(tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(SLOW.to_json())
    assert CostModel.from_json(path) == SLOW
    for text, words in (
        ("{", "cannot be read"),
        ("[]", "must be an object with a name"),
        ('{"name": "x", "speed": 1}', "any of name, step"),
        ('{"name": "x", "token": "fast"}', "token must be a number of seconds, not 'fast'"),
        ('{"name": "x", "token": -1}', "token must be a number of seconds, not -1"),
    ):
        path.write_text(text)
        with pytest.raises(SloraError, match=words):
            CostModel.from_json(path)


def test_figures_by_hand():
    made = [TraceRequest(float(i), i % 2, 10, 11, "t") for i in range(4)]
    records = [
        Record(made[0], scheduled=0.5, first_token=1.0, finished=2.0),
        Record(made[1], scheduled=1.5, first_token=4.0, finished=6.0, preemptions=1),
        Record(made[2], scheduled=2.0, first_token=10.0, finished=12.0),
        Record(made[3], aborted=True),
    ]
    got = summarise(records)
    assert (got["requests"], got["finished"], got["aborted"], got["preemptions"]) == (4, 3, 1, 1)
    assert got["requests_per_second"] == 3 / 12 and got["output_tokens_per_second"] == 33 / 12
    assert got["tokens_per_second"] == 63 / 12
    assert got["ttft"] == dict(mean=4.0, p50=3.0, p90=pytest.approx(7.0), p99=pytest.approx(7.9))
    assert got["tpot"]["mean"] == pytest.approx((0.1 + 0.2 + 0.2) / 3)
    assert got["latency"]["p50"] == 5.0
    assert got["slo_attainment"] == 0.5
    assert got["satisfaction"] == pytest.approx((35 / 36 + 27 / 36) / 4)
    assert got["tenants"] == {"t": got["ttft"]}
    assert got["adapter_fairness"] == pytest.approx(fairness(records[:3], lambda r: r.request.adapter))
    assert got["adapter_fairness"] == pytest.approx((6 + 5) ** 2 / (2 * (36 + 25)))
    nothing = summarise(records[3:])
    assert nothing["ttft"] is None and nothing["adapter_fairness"] is None and nothing["requests_per_second"] == 0


def test_every_token_is_computed_once_in_a_large_pool():
    trace = synthetic_trace(adapters=20, rate=2, seconds=10, lengths=(8, 128))
    result = run(trace, page_pool_bytes=8 << 30)
    assert all(r.finished is not None and r.first_token is not None for r in result.records)
    assert all(r.request.arrival <= r.scheduled < r.first_token <= r.finished for r in result.records)
    # a chunk of one prompt token counts as a decode token, and the last token of an answer is never fed back
    computed = sum(r.prompt_len + r.output_len - 1 for r in trace)
    assert result.counters["prompt_tokens"] + result.counters["decode_tokens"] == computed
    assert result.counters["loads"] == len({r.adapter for r in trace})
    assert result.pages and all(sum(r.values()) - r["seconds"] == pytest.approx(1024) for r in result.pages)
    assert [r.finished for r in run(trace, page_pool_bytes=8 << 30).records] == [r.finished for r in result.records]


@pytest.mark.parametrize("policy", ["fcfs", "gather"])
def test_adapters_in_a_full_pool_are_seldom_copied_for_nothing(policy):
    """1.9 and 1.6 times a request while nobody left the pages that requests need beside an adapter on its way."""
    trace = synthetic_trace(adapters=60, rate=4, seconds=20, lengths=(64, 256))
    pool = dict(page_pool_bytes=2 << 30, max_seqs=32)
    result = run(trace, policy=policy, adapter_chunk_bytes=16 << 20, adapter_step_bytes=64 << 20, **pool)
    assert all(r.finished is not None for r in result.records)
    assert result.counters["loads"] <= 1.2 * len(trace)


def test_a_large_request_among_small_ones_does_not_starve():
    small = synthetic_trace(adapters=4, rate=3, seconds=40, lengths=(32, 64), seed=3)
    large = TraceRequest(5.0, None, 900, 9)
    trace = sorted([*small, large], key=lambda r: r.arrival)
    result = run(trace, page_pool_bytes=70 * (8 << 20))
    assert summarise(result.records)["ttft"]["p50"] > 1  # more arrives than is served, so the pool is always full
    (mine,) = (r for r in result.records if r.request == large)
    before = [r for r in result.records if r.request.arrival > 5.0 and r.scheduled < mine.scheduled]
    assert 0 < len(before) <= 64  # it is overtaken so often at most, though smaller ones would always fit


def test_a_pool_far_too_small_makes_progress_without_thrash():
    trace = burst(synthetic_trace(adapters=40, rate=4, seconds=8, lengths=(8, 256)))
    for caching in (False, True):
        result = run(trace, page_pool_bytes=50 * (8 << 20), prefix_caching=caching)
        figures = summarise(result.records)
        assert figures["finished"] == len(trace)
        assert result.counters["loads"] <= len(trace) + figures["preemptions"]
        computed = result.counters["prompt_tokens"] + result.counters["decode_tokens"]
        assert computed <= 1.6 * sum(r.prompt_len + r.output_len for r in trace)


@pytest.mark.parametrize(("tenants", "rate", "seconds"), [(1, 0.3, 60), (5, 0.1, 60)])
def test_a_noisy_tenant_harms_only_itself_under_fairness(tenants, rate, seconds):
    quiet, mixed = policies.noisy(tenants, rate, seconds)
    alone, fcfs = others_p99(simulate(slow(), quiet)), simulate(slow(), mixed)
    paper = simulate(slow(policy="fair", policy_options={"preempt": False, "burst": 0.0}), mixed)
    fair = simulate(slow(policy="fair"), mixed)
    assert others_p99(fair) <= 1.5 * alone
    assert others_p99(fair) < 0.5 * others_p99(paper) < 0.5 * others_p99(fcfs)
    figures = summarise(fair.records)
    assert figures["finished"] == len(mixed) and figures["preemptions"] <= len(quiet)
    assert figures["requests_per_second"] > 0.97 * summarise(fcfs.records)["requests_per_second"]


def _attainment(simulation, trace):
    return summarise(simulate(simulation, trace).records)["slo_attainment"]


# all points of S-LoRA's figures are in benchmarks/serving/policies.py
@pytest.mark.parametrize(("cv", "alpha"), [(1, 1.0), (4, 1.0), (8, 1.0), (1, 0.1)])
def test_early_abort_attains_more_than_first_come_first_served(cv, alpha):
    trace = synthetic_trace(adapters=50, rate=3, seconds=40, cv=cv, alpha=alpha, lengths=(8, 64))
    fcfs, ours = (_attainment(slow(policy=p), trace) for p in ("fcfs", "early-abort"))
    assert ours > fcfs + 0.1


@pytest.mark.parametrize(("cv", "rate"), [(1, 2), (8, 1)])
def test_early_abort_attains_no_less_where_little_is_late(cv, rate):
    trace = synthetic_trace(adapters=50, rate=rate, seconds=60, cv=cv, lengths=(8, 64))
    fcfs, ours = (_attainment(slow(policy=p), trace) for p in ("fcfs", "early-abort"))
    assert ours >= fcfs > 0.9


def test_clustering_attains_more_than_first_come_first_served():
    trace = synthetic_trace(adapters=32, rate=3.5, seconds=25, cv=4)
    fcfs, cluster = (simulate(a100_40(policy=policy), trace) for policy in ("fcfs", "cluster"))
    attained = [summarise(result.records)["slo_attainment"] for result in (fcfs, cluster)]
    assert attained[1] > attained[0]
    assert cluster.counters["loads"] < fcfs.counters["loads"]


def test_gathering_serves_more_than_first_come_first_served_and_keeps_nobody_waiting():
    """More arrives than is served for the whole of the trace, and adapters come to their pages a few at a time."""
    trace = synthetic_trace(adapters=60, rate=4, seconds=60, lengths=(8, 64))
    options = dict(setting=SETTINGS["S2"], cost=dataclasses.replace(SLOW, adapter_byte=1e-10), max_seqs=16)
    options |= dict(page_pool_bytes=2 << 30, adapter_chunk_bytes=16 << 20, adapter_step_bytes=128 << 20)
    fcfs, gather = (run(trace, policy=policy, **options) for policy in ("fcfs", "gather"))
    rates = [summarise(result.records)["requests_per_second"] for result in (fcfs, gather)]
    assert rates[1] > 1.05 * rates[0] and gather.counters["loads"] < fcfs.counters["loads"]
    started = sorted(gather.records, key=lambda r: r.scheduled)
    place = {id(r): i for i, r in enumerate(started)}
    for i, record in enumerate(gather.records):  # who came before it, and 4 starts for each one that waited then
        waiting = sum(r.scheduled > record.request.arrival for r in gather.records[:i])
        assert place[id(record)] <= i - waiting + 4 * (waiting + 1)


def test_fewer_steps_have_prompts_where_they_are_grouped():
    trace = burst(synthetic_trace(adapters=4, rate=4, seconds=20, lengths=(8, 64)))
    plain, grouped = (run(trace, max_seqs=16, prompt_gap=gap, log_steps=True) for gap in (0, 3))
    counts = [sum(w.prompt_tokens > 0 for w in result.steps.work) for result in (plain, grouped)]
    assert counts[1] < 0.7 * counts[0]
    assert summarise(grouped.records)["finished"] == len(trace)


def _noisy_steps(result, deviation):
    """The steps of a run as a device of uneven pace would have taken them."""
    rng = np.random.default_rng(0)
    log = StepLog()
    for end, seconds, work in zip(result.steps.ends, result.steps.seconds, result.steps.work, strict=True):
        log.add(end, seconds * rng.lognormal(0.0, deviation), work)
    return log


def test_a_cost_model_is_found_again_in_the_steps_it_made():
    buckets = Buckets.default(8, 2048)
    trace = synthetic_trace(adapters=20, rate=2, seconds=20, lengths=(8, 256))
    true = dataclasses.replace(SLOW, token=1e-3, prompt_step=0.01, sequence=1e-4, prompt_context=1e-8)
    made = run(trace, cost=true, log_steps=True, buckets=buckets)
    fitted, error = fit_cost(made.steps)
    assert error < 1e-3
    for name in ("weights", "token", "adapter_byte", "load_byte", "decode_context", "sequence"):
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=0.05), name
    assert fitted.step + fitted.weights == pytest.approx(true.step + true.weights, rel=0.01)


@pytest.mark.parametrize("deviation", [0.0, 0.1])
def test_the_calibrated_twin_predicts_other_workloads(tmp_path, deviation, capsys):
    """Calibrated on one trace, it is right within 10 % on another: more adapters, another rate, another policy."""
    buckets = Buckets.default(8, 2048)
    first = run(synthetic_trace(adapters=20, rate=2, seconds=30, lengths=(8, 128)), log_steps=True, buckets=buckets)
    limits = dict(max_seqs=8, max_step_tokens=2048, page_pool_bytes=4 << 30, item_bytes=2)
    result = dict(
        points=[dict(steps=_noisy_steps(first, deviation).to_json())],
        setting=dataclasses.asdict(SETTINGS["S2"]),
        engine=limits | dataclasses.asdict(buckets),
    )
    result["engine"] |= dict(seq_buckets=buckets.seqs, token_buckets=buckets.tokens)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    measured = calibrate(path)
    assert measured.error <= deviation + 1e-4
    trace = synthetic_trace(adapters=200, rate=1.2, seconds=30, lengths=(8, 128), seed=7)
    options = dict(buckets=buckets, policy="fair", policy_options={"by": "adapter"})
    real, predicted = (run(trace, cost=cost, **options) for cost in (SLOW, measured.cost))
    want, got = (summarise(r.records) for r in (real, predicted))
    assert got["requests_per_second"] == pytest.approx(want["requests_per_second"], rel=0.1)
    for name in ("ttft", "tpot", "latency"):
        for percentile in ("mean", "p50", "p99"):
            assert got[name][percentile] == pytest.approx(want[name][percentile], rel=0.1), (name, percentile)
    for kind in ("kv", "adapter"):
        used = [np.mean([row[kind] for row in r.pages]) for r in (predicted, real)]
        assert used[0] == pytest.approx(used[1], rel=0.1), kind
    argv = ["simulate", "--calibrate", str(path), "--adapters", "20", "--rate", "2", "--seconds", "30"]
    assert main([*argv, "--lengths", "8,128", "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["requests_per_second"] == pytest.approx(summarise(first.records)["requests_per_second"], rel=0.1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("{}", "no result of slora-jax bench with steps: 'points' is missing"),
        ('{"points": [{"steps": {"columns": ["a"], "rows": []}}]}', "these are no steps"),
        ('{"points": [], "engine": {"seq_buckets": [1], "token_buckets": [1]}}', "0 steps are too few"),
    ],
)
def test_a_file_that_says_nothing_of_the_device_is_refused(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SloraError, match=words):
        calibrate(path)


def test_a_request_that_can_never_run_is_named():
    with pytest.raises(CapacityError, match="request 0 of the trace can never run: 70 pages needed, the pool has 32"):
        run([TraceRequest(0.0, 0, 800, 65)], page_pool_bytes=32 * (8 << 20))


def test_the_command_prints_a_table_and_json(capsys, tmp_path):
    trace, cost, out = (tmp_path / name for name in ("trace.jsonl", "cost.json", "out.json"))
    rows = [dict(arrival=i / 4, adapter=i % 3 or None, prompt_len=20, output_len=5) for i in range(8)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    cost.write_text(SLOW.to_json())
    argv = ["simulate", "--trace", trace, "--cost", cost, "--shape", "llama-3.1-8b", "--rank", 16, "--target", "down"]
    assert main([str(a) for a in (*argv, "--policy", "cluster", "--policy-option", "adapters=2", "--json", out)]) == 0
    table = capsys.readouterr().out
    for words in (
        "8 finished, 0 given up",
        "cost model 'slow'",
        "requests/s by bytes and operations",
        "idle_kv",
    ):
        assert words in table
    figures = json.loads(out.read_text())
    assert figures["finished"] == 8 and figures["cost_model"] == "slow" and figures["pages"]
    assert figures["floor_requests_per_second"] >= figures["requests_per_second"]
    assert main(["simulate", "--adapters", "0", "--rate", "2", "--seconds", "3", "--burst", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] == 6


def test_host_only_modules_import_no_jax():
    root = Path(slora_jax.__file__).parent
    host_only = [root / f"{name}.py" for name in ("page_pool", "prefix_cache", "scheduler", "sequence", "traces")]
    for path in [*host_only, *root.glob("policies/*.py"), *root.glob("twin/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "jax" for name in names), path
