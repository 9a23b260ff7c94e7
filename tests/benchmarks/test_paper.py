"""``python -m benchmarks.serving.paper`` on a tiny model: points share compiled steps; figures are what they say."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest

from benchmarks.ceilings import measure_ceilings
from benchmarks.serving import paper, replay
from benchmarks.serving.idle import idle_figures
from benchmarks.serving.paper_parts import FAMILIES, PARTS
from benchmarks.serving.policies import POINTS
from benchmarks.serving.policy_report import quiet_waits
from benchmarks.serving.window import cut_off, pages_in_use, window_figures
from slora_jax.requests import Timings
from slora_jax.traces import TraceRequest
from slora_jax.twin import Record, StepLog, StepWork

SMALL = "--shape tiny-llama --lengths 4,32 --page-pool 60000000 --seqs 8 --tokens 64 --speed 20".split()


def run(path, *options: str) -> dict:
    paper.main(["--json", str(path), *SMALL, *options])
    return json.loads(path.read_text())


def test_points_share_what_was_compiled(tmp_path, capsys):
    path = tmp_path / "out.json"
    result = run(path, "--requests", "16", "--part", "load S2 n=5", "--budget", "100000")
    (point,) = result["parts"].values()
    assert point["started"]["programs"] == 2 and point["compiles"] == 0
    assert point["started"]["process_seconds_at_first_token"] > point["started"]["compile_seconds"]
    result = run(path, "--requests", "16", "--only", "mixed ranks", "--budget", "100000")
    parts = result["parts"]
    assert parts["load S2 n=5"] == point  # not measured again
    mixed = {name: part for name, part in parts.items() if "mixed" in name}
    assert len(mixed) == 3 and all(p["figures"]["finished"] == 16 for p in mixed.values())
    assert [p["slots"] for p in mixed.values()] == [0, 32, 64]
    run(path, "--requests", "16", "--part", "load S1 n=5", "--budget", "100000")
    paper.main(["--json", str(path), "--report", "--twin", "--steps"])
    text = capsys.readouterr().out
    assert "mixed ranks, 24 GiB, unified / mixed ranks, 24 GiB, 32 fixed slots" in text
    assert len(re.findall(r"^load S\d n=5 .*%.*%", text, re.M)) == 2  # each predicted from the other
    shown = re.split(r"^(.+): \d+ steps, .*$", text, flags=re.M)[1:]
    steps = dict(zip(shown[::2], shown[1::2], strict=True))
    assert set(steps) == {*parts, "load S1 n=5"}
    assert all(re.search(r"^  decode +8 ", steps[name], re.M) for name in mixed)  # the one size of decode steps
    paper.main(["--json", str(path), "--forecast", "--only", "load S2 n=100,load base"])
    expected = re.findall(r"^(load .+?)  +[\d.]+ +\d+ ", capsys.readouterr().out, re.M)
    assert expected == [n for n in PARTS if n.startswith("load S2 n=100")]  # nothing like base was measured
    paper.main(
        ["--json", str(path), "--forecast", "--ideal", "--part", "mixed ranks, 24 GiB, unified", "--slots", "2,3"]
    )
    expected = re.findall(r"^(mixed .+?)  +[\d.]+ +\d+ ", capsys.readouterr().out, re.M)
    assert expected == [f"mixed ranks, 24 GiB, unified{slots}" for slots in ("", ", 2 slots", ", 3 slots")]
    floors = {name: part.get("floor") for name, part in json.loads(path.read_text())["parts"].items()}
    assert floors["mixed ranks, 24 GiB, 32 fixed slots"] is None
    assert floors["mixed ranks, 24 GiB, unified"]["requests_per_second"] > 16


def test_parts_are_chosen_by_name_and_say_which_policy_ran(tmp_path):
    names = ["load S2 n=5, 256 running, gather", "load S2 n=5"]
    result = run(tmp_path / "out.json", "--requests", "8", "--budget", "100000", *(f"--part={name}" for name in names))
    assert list(result["parts"]) == names
    engines = [point["engine"] for point in result["parts"].values()]
    assert [e["policy"] for e in engines] == ["gather", "fcfs"] and [e["prompt_gap"] for e in engines] == [4, 0]
    assert engines[0]["policy_options"] == {"oldest": 8}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--slots", "32"], "go with --forecast"),
        (["--ideal"], "go with --forecast"),
        (["--forecast", "--slots", "4,0"], "at least 1, not 0"),
    ],
)
def test_slots_and_the_ideal_device_are_for_forecasts(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit):
        paper.main(["--json", str(tmp_path / "out.json"), *options])
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_nothing_begins_when_the_time_is_up(tmp_path, capsys):
    path = tmp_path / "out.json"
    paper.main(["--json", str(path), *SMALL, "--budget", "1"])
    assert capsys.readouterr().out.count("no time for") == len(PARTS) and not path.exists()


def test_results_of_other_settings_are_kept(tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps(dict(shape="tiny-gqa", parts={})))
    with pytest.raises(SystemExit, match="holds results of other settings"):
        run(path)


def test_parts_of_a_family_stand_together():
    families = [part.family for part in PARTS.values()]
    assert sorted(set(families), key=families.index) == [f for i, f in enumerate(families) if families[i - 1] != f]
    for part in PARTS.values():
        assert (
            max(part.setting.ranks) <= max(FAMILIES[part.family].ranks)
            and part.max_seqs <= FAMILIES[part.family].seqs[-1]
        )


def test_a_load_is_cut_off():
    trace = PARTS["load S2 n=5"].trace()
    assert 1600 < len(trace) <= 1680 and max(r.arrival for r in trace) < 28


def test_idle_is_the_time_between_kernels():
    kernels = [(1000, 2000), (5000, 9000), (1500, 3000), (108_000, 109_000), (6000, 7000)]
    epoch = 1_700_000_000_000_000_000
    figures = idle_figures([(epoch + begin, epoch + end) for begin, end in kernels])
    assert figures["seconds"] == pytest.approx(108e-6, rel=1e-9) and figures["kernels"] == 5
    assert figures["idle"] == pytest.approx(101 / 108, rel=1e-9) and figures["gaps"] == 1
    assert figures["longest_gaps_us"] == pytest.approx([99], abs=0.06)
    assert idle_figures([]) is None


def test_what_came_after_a_run_was_cut_off_is_not_known():
    request = TraceRequest(arrival=1.0, adapter=0, prompt_len=4, output_len=3)
    ended, begun, waiting = (Record(request, at, at + 1, at + 3) for at in (1.0, 4.0, 6.0))
    known = cut_off([ended, begun, waiting], 5.0)
    assert known[0] == ended
    assert (known[1].first_token, known[1].finished, known[1].aborted) == (5.0, None, False)
    assert (known[2].scheduled, known[2].first_token, known[2].aborted) == (None, None, True)


def test_pages_in_use_are_those_of_who_runs_on_average():
    samples = [dict(seconds=t, kv=kv, adapter=2, idle_kv=50, idle_adapter=9, free=1) for t, kv in ((1, 10), (3, 30))]
    assert pages_in_use(samples, 1.0, 3.0) == pytest.approx(22)
    assert pages_in_use(samples, 2.0, 3.0) == pytest.approx(27)
    assert pages_in_use(samples, 0.0, 1.0) == pytest.approx(12)  # as when it was first looked at


def test_a_window_counts_what_ended_in_it():
    records = [Record(TraceRequest(0.0, None, 10, 11), 0.0, 0.5, float(end)) for end in (1, 2, 3, 9)]
    records.append(Record(TraceRequest(0.0, None, 10, 11), aborted=True))
    steps = StepLog()
    for end in range(10):
        steps.add(end, 1.0, StepWork(decode_tokens=4, prompt_tokens=6, sequences=5))
    figures = window_figures(records, steps, 2.0, 6.0)
    assert figures["requests_per_second"] == 0.5 and figures["steps"] == 4 and figures["sequences"] == 5
    assert figures["by_tokens"] == 4 * 10 / 20 / 4


def test_ceilings_are_measured():
    ceilings = measure_ceilings("float32")
    assert 1e8 < ceilings.bytes_per_second < 1e14 and 1e8 < ceilings.operations_per_second < 1e16
    assert 1e7 < ceilings.host_bytes_per_second < 1e14 and measure_ceilings("float32") is ceilings


def test_policies_and_tenants_are_shown_side_by_side(tmp_path, capsys):
    """Parts of different lengths share what was compiled, also if the shorter ones come first."""
    path, small = tmp_path / "out.json", [o for o in SMALL if o not in ("--lengths", "4,32")]
    names = ["tenants, quiet alone", "policy early abort, cv 8, alpha 1", "policy clustering, cv 8, alpha 1"]
    paper.main(["--json", str(path), *small, "--budget", "100000", *(f"--part={name}" for name in names)])
    points = json.loads(path.read_text())["parts"]
    assert not any("error" in point for point in points.values())
    assert [p["engine"]["policy"] for p in points.values()] == ["fair", "early-abort", "cluster"]
    points |= {name: dict(error="of the device") for name in ("tenants, fair", "policy first come, cv 8, alpha 1")}
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(parts=points)))
    paper.main(["--json", str(path), "--report"])
    text = capsys.readouterr().out
    figures = points[names[1]]["figures"]
    assert f"| early abort |  |  |  |  | {figures['slo_attainment']:.3f} / {figures['satisfaction']:.2f} |" in text
    assert f"quiet tenants' {points[names[0]]['figures']['requests']} requests: p50" in text


def test_whoever_was_cut_off_waited_until_then_at_least():
    part = dataclasses.replace(PARTS["tenants, fair"], last=0.5, until=2.0)
    trace = part.trace()
    assert {r.tenant for r in trace} == {"noisy", *(f"quiet-{i}" for i in range(5))}
    assert part.smaller(7, None, 1.0).trace() == trace[:7]
    quiet = [r.arrival for r in trace if r.tenant != "noisy"]
    rows = [f"{r.arrival:.4f} {r.arrival + 0.25:.4f}" if i % 2 else f"{r.arrival:.4f} -" for i, r in enumerate(trace)]
    waits = quiet_waits(dict(requests=dict(columns=["arrival", "first_token"], rows=rows)), part)
    assert len(waits) == len(quiet) < len(trace)
    assert all(w == pytest.approx(0.25, abs=2e-4) or w > 1.4 for w in waits) and len({round(w, 2) for w in waits}) > 1


def test_points_of_a_policy_differ_in_nothing_else():
    for cv, alpha in POINTS:
        parts = [part for name, part in PARTS.items() if name.endswith(f", cv {cv}, alpha {alpha:g}")]
        assert len(parts) == (3 if alpha == 1 else 2)
        alike = {str(dataclasses.replace(part, policy="", options={})) for part in parts}
        assert len(alike) == 1 and len({part.policy for part in parts}) == len(parts)
        assert max(r.arrival for r in parts[0].trace()) < parts[0].last


def test_whoever_ran_when_all_was_cut_off_keeps_their_first_token():
    timings = Timings(arrival=5.0, scheduled=5.5, first_token=6.0)
    request, output = TraceRequest(0.5, None, 1, 9), SimpleNamespace(finish_reason="abort", timings=timings)
    record = replay._record(request, output, 5.0)
    assert (record.ttft, record.finished, record.aborted) == (0.5, None, False)
    timings.first_token = timings.scheduled = None
    assert replay._record(request, output, 5.0) == Record(request, aborted=True)
