"""``slora-jax bench`` on a tiny model: every workload runs, and what it says of a run is what happened."""

import functools
import importlib
import importlib.util
import json

from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
import numpy as np
import pytest

from benchmarks.serving.baselines import one_hot, ragged_dot
from benchmarks.serving.baselines.split_pool import SplitPool, adapter_owner, pool_of_slots, seat_by_slot
from benchmarks.serving.probe import draw
from benchmarks.serving.session import Session
from slora_jax.cli import main
from slora_jax.cli.parser import parse_arguments
from slora_jax.errors import SloraError
from slora_jax.shapes import named_shape
from slora_jax.traces import Setting, TraceRequest, burst, synthetic_trace
from slora_jax.twin import Simulation, StepLog, ideal_cost, simulate

# one size of everything, so that the programs are compiled once for the whole file
MODEL = (
    "--shape tiny-llama --rank 16 --rank 8 --page-pool 2M --max-seqs 2 --max-step-tokens 64 --max-model-len 64 --quiet"
)
TRACE = "--adapters 3 --requests 6 --lengths 4,12 --rate 1000"


def bench(capsys, line: str) -> str:
    assert main(["bench", *line.split()]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_sweep_from_the_command_line_to_its_calibration(capsys, tmp_path):
    out, plots = tmp_path / "out.json", tmp_path / "plots"
    draws = importlib.util.find_spec("matplotlib") is not None
    drawing = f"--plots {plots}" if draws else ""
    table = bench(capsys, f"{MODEL} {TRACE} --rate 500,1000 --requests 30 --json {out} {drawing}")
    for words in (
        "== n 3, alpha 1.0, cv 1.0, rate 500.0",
        "30 finished",
        "by bytes and operations",
        "2 running at most",
    ):
        assert words in table
    result = json.loads(out.read_text())
    assert result["environment"]["versions"]["jax"] and result["system"] == "slora-jax"
    assert "share one buffer" in result["adapters"] and result["setting"]["ranks"] == [16, 8]
    assert [p["rate"] for p in result["points"]] == [500, 1000]
    for point in result["points"]:
        trace = synthetic_trace(adapters=3, rate=point["rate"], requests=30, lengths=(4, 12))
        assert point["figures"]["finished"] == 30 and point["compiles"] == 0 and 0 < point["of_floor"] < 1
        assert point["counters"]["loads"] == 3  # each point starts cold
        assert point["counters"]["prompt_tokens"] == sum(r.prompt_len for r in trace)
        assert point["counters"]["generated_tokens"] == sum(r.output_len for r in trace)
        steps = StepLog.from_json(point["steps"])
        assert len(steps) == point["counters"]["steps"] and sum(w.load_bytes > 0 for w in steps.work) <= 3
        computed = sum(w.decode_tokens + w.prompt_tokens for w in steps.work)
        assert computed == sum(r.prompt_len + r.output_len - 1 for r in trace)
        assert len(point["requests"]["rows"]) == 30 and point["pages"] and len(point["page_map"]) == len(point["pages"])
        assert {w.padded_tokens for w in steps.work} <= {1, 2, 64}
    if draws:
        names = {path.name for path in plots.iterdir()}
        assert names == {"throughput-rate.png", "latency-rate.png", "pages-0.png", "pages-1.png"}
    argv = f"simulate --calibrate {out} --adapters 3 --requests 30 --rate 500 --lengths 4,12".split()
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert "30 finished" in table and "cost model 'measured, out.json'" in table and "of the mean step" in table


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        ("overhead", ["== batch 2, distinct 2", "decode_tokens_per_second_of_base"]),
        ("churn", ["== case churn, n 3", "bystander_tpot"]),
        ("noisy --policy fair", ["== case beside a noisy tenant, policy fair", "p99_of_alone"]),
        ("prefixes --prefix 32", ["== case shared, prefix 32", "prefixes 0.0% of prompt tokens"]),
        ("replace", ["wrong_digest   0", "wrong_tokens   0"]),
    ],
)
def test_the_other_workloads(capsys, workload, words):
    table = bench(capsys, f"{workload} {MODEL} {TRACE}")
    for text in words:
        assert text in table
    if workload.startswith("prefixes"):  # three of six find the 32 shared tokens of theirs
        assert table.count("prefixes 0.0% of prompt tokens") == 1


@pytest.mark.parametrize("system", ["no-adapters", "fixed-slots", "ragged-dot", "one-hot"])
def test_systems_to_compare_with(capsys, tmp_path, system):
    out = tmp_path / "out.json"
    bench(capsys, f"{MODEL} {TRACE} --system {system} --slots 2 --json {out}")
    result = json.loads(out.read_text())
    (point,) = result["points"]
    assert result["system"] == system and result["note"] and point["figures"]["finished"] == 6
    assert point["counters"]["loads"] >= (0 if system == "no-adapters" else 3)  # three adapters take turns in two slots


@pytest.mark.parametrize("delta", [ragged_dot.delta, one_hot.delta])
def test_other_ways_to_compute_lora_are_right(delta):
    rng = np.random.default_rng(0)
    slot = np.array([2, -1, 0, 2, 1, -1, 0])
    x, a, b = (rng.standard_normal(s, np.float32) for s in ((7, 12), (3, 12, 4), (3, 4, 10)))
    want = [x[t] @ a[s] @ b[s] if s >= 0 else np.zeros(10) for t, s in enumerate(slot)]
    np.testing.assert_allclose(delta(jnp.array(x), jnp.array(a), jnp.array(b), jnp.array(slot)), want, atol=1e-4)


@pytest.mark.parametrize("system", ["merged", "fixed_slots", "ragged_dot", "one_hot"])
def test_systems_answer_as_the_engine_does(system):
    args = parse_arguments(["bench", *MODEL.split(), "--slots", "2"])
    ranks = (8,) if system == "merged" else (16, 16)
    setting = Setting("tiny-llama", ranks)
    baseline = importlib.import_module(f"benchmarks.serving.baselines.{system}")
    answers = []
    for open_session in (functools.partial(Session, args, setting), baseline.open_session(args, setting)):
        with open_session(adapters=len(ranks), longest=40) as session:
            trace = [TraceRequest(0.0, i % len(ranks), 9, 12) for i in range(4)]
            _, run = session.measure(trace, {}, floor=False)
            answers.append([o.token_ids for o in run.outputs])
    assert answers[0] == answers[1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_serves_the_same_trace(capsys, tmp_path):
    for name in ("torch", "peft"):
        pytest.importorskip(name)
    out = tmp_path / "out.json"
    bench(capsys, f"{MODEL} {TRACE} --system peft --json {out}")
    result = json.loads(out.read_text())
    assert result["points"][0]["figures"]["finished"] == 6
    assert result["points"][0]["figures"]["ttft"]["p50"] > 0


def test_systems_are_compared_in_one_result(capfd, tmp_path):
    out = tmp_path / "out.json"
    bench_line = f"{MODEL} {TRACE} --compare no-adapters,merged --json {out}"
    assert main(["bench", *bench_line.split()]) == 0
    result, table = json.loads(out.read_text()), capfd.readouterr().out
    assert result["compared"]["no-adapters"]["points"][0]["figures"]["finished"] == 6
    assert "exit status 2" in result["compared"]["merged"]["error"]  # three adapters cannot be merged
    assert "merged         failed: exit status 2" in table and "of slora-jax)" in table


def test_only_one_adapter_can_be_merged(capsys):
    assert main(["bench", *MODEL.split(), *TRACE.split(), "--system", "merged"]) == 2
    assert "serves exactly one adapter, not 3; use --adapters 1" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "retire", "release"]), st.integers(0, 6)), max_size=60))
def test_adapters_take_slots_and_nothing_else(actions):
    pool = SplitPool(40, slots=3, slot_pages=4)
    for action, i in actions:
        owner, seq = adapter_owner(f"a{i}"), ("seq", i)
        if action == "take":
            if pool.holds(owner):
                if pool.is_idle(owner):
                    pool.revive(owner)
            elif pool.has_slot(f"a{i}"):
                assert len(pool.allocate(owner, 3)) == 3
            if not pool.holds(seq) and pool.available >= 5:
                pool.allocate(seq, 5)
        elif pool.holds(owner) and not (action == "retire" and pool.is_idle(owner)):
            getattr(pool, action)(owner)
        elif pool.holds(seq):
            pool.release(seq)
        pool.check_integrity()
        held = [set(pool.pages(o)) for o in [adapter_owner(f"a{i}") for i in range(7)] if pool.holds(o)]
        assert len(held) <= 3 and len(set().union(*held)) == sum(map(len, held))
        assert all(page < 12 for pages in held for page in pages)
        assert pool.available <= 28


def test_the_twin_has_slots_too():
    """No step holds more adapters than there are slots, and whoever waits for one is served in the end."""
    setting = Setting("tiny-llama", (16,))
    config = named_shape(setting.shape)
    simulation = Simulation(
        config=config, setting=setting, cost=ideal_cost(config), page_pool_bytes=60 << 20, log_steps=True
    )
    trace = burst(synthetic_trace(adapters=12, rate=10.0, requests=40, lengths=(4, 32), seed=1))
    most = {}
    for slots in (0, 2, 4):
        memory = dict(make_pool=pool_of_slots(slots, simulation.adapter(0).num_pages), prepare=seat_by_slot)
        result = simulate(simulation, trace, **(memory if slots else {}))
        assert all(record.finished is not None for record in result.records)
        most[slots] = max(work.adapter_bytes for work in result.steps.work) / simulation.adapter_bytes(0)
    assert most[2] == 2 and most[4] == 4 and most[0] > 4
    with pytest.raises(SloraError, match="use fewer --slots"):
        simulate(simulation, trace, make_pool=pool_of_slots(1 << 20, 2))


def test_the_floor_needs_no_engine(capsys):
    table = bench(capsys, f"{MODEL} --adapters 0,3 --rate 1000 --requests 6 --twin")
    assert table.count("requests/s, first token p99") == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--slots 0", "slots must be at least 1"),
        ("--max-seqs 8 --max-step-tokens 4", "max_step_tokens 4 is less than max_seqs 8"),
        ("--json no/such/dir/x.json", "its directory does not exist"),
        ("noisy --twin", "--twin goes with the workload trace only"),
        ("churn --system merged", "measured under the workload trace only"),
        ("--policy best", "policy must be one of"),
        ("--shape nothing", "no model shape is called 'nothing'"),
        ("--seconds 1 --requests 5", "give either --seconds or --requests"),
        ("--rate 0", "must be positive"),
        ("--slo 0", "slo must be positive"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(capsys, line, words):
    assert main(["bench", "--quiet", *line.split()]) == 2
    assert words in capsys.readouterr().err


def _session(**options):
    options = dict(adapters=3, longest=40) | options
    args = parse_arguments(["bench", *MODEL.split()])
    return Session(args, Setting("tiny-llama", (16, 8)), **options)


def test_the_twin_does_the_same_steps_and_a_compilation_is_no_measurement():
    trace = burst(synthetic_trace(adapters=3, rate=10, requests=20, lengths=(4, 20)))
    with _session() as session:
        _, run = session.measure(trace, {})
        config = named_shape("tiny-llama")
        buckets = session.engine._core.runner.builder.buckets
        twin = simulate(
            Simulation(
                config=config,
                setting=session.setting,
                cost=ideal_cost(config),
                buckets=buckets,
                log_steps=True,
                **session.limits(),
            ),
            trace,
        )
        for name in ("prompt_tokens", "decode_tokens", "adapter_bytes", "decode_context"):
            measured, simulated = (sum(getattr(w, name) for w in log.work) for log in (run.steps, twin.steps))
            assert simulated == pytest.approx(measured, rel=0.1), name
        assert sum(w.load_bytes for w in twin.steps.work) == sum(w.load_bytes for w in run.steps.work)
        assert len(twin.steps) == pytest.approx(len(run.steps), rel=0.1)
        assert [r.preemptions for r in twin.records] == [r.preemptions for r in run.records]
        session.engine._core.runner.require_adapters(64, frozenset())  # steps for a higher rank are other programs
        with pytest.raises(SloraError, match="compiled during the measurement"):
            session.measure([TraceRequest(0.0, None, 5, 5)], {})


def test_a_page_map_shows_what_most_of_a_group_holds():
    assert draw([None, "kv", "digest"]) == ".ka"
    assert draw((["kv"] * 3 + [None]) * 256) == "k" * 256
