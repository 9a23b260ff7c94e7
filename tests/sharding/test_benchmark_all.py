"""The driver of tensor-parallel measurements, with processes that only talk."""

import json
import sys

import pytest

from benchmarks import tensor_parallel_all
from benchmarks.tensor_parallel_all import Job, main, measurements

TALK = """
import os, pathlib, sys, time
name, how, path, *more = sys.argv[1:]
if more == ["--compile-only"]:
    print("tuned", flush=True)
    sys.exit("no room for it" if how == "dies" else 0)
assert more[0] == "--budget" and float(more[1]) > 0, more
with open(path, "a") as log:
    log.write(f"{name} begins {os.environ.get('NCCL_LAUNCH_MODE', '')}\\n")
if how == "hangs" and "NCCL_LAUNCH_MODE" not in os.environ:
    time.sleep(60)
time.sleep(0.3)
with open(path, "a") as log:
    log.write(f"{name} ends\\n")
"""


@pytest.fixture
def drive(tmp_path, monkeypatch):
    def run(jobs, *more):
        def made(args):
            command = lambda name, how: [sys.executable, "-c", TALK, name, how, str(tmp_path / "order")]  # noqa: E731
            first = ("--compile-only",)
            return [Job(name, command(name, how), gpus, args.work, {}, first) for name, how, gpus in jobs]

        monkeypatch.setattr(tensor_parallel_all, "measurements", made)
        common = ["--gpus", "4", "--no-tests", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
        main([*common, "--least", "0.1", *more])
        notes = json.loads((tmp_path / "out" / "tensor_parallel.json").read_text())["notes"]
        order = tmp_path / "order"
        return order.read_text().splitlines() if order.exists() else [], notes

    return run


def test_one_after_another_on_the_same_gpus(drive):
    order, notes = drive(
        [("all", "", (0, 1, 2, 3)), ("one", "dies", (0,)), ("left", "", (0, 1)), ("right", "", (2, 3))]
    )
    assert [line.split()[:2] for line in order[:2]] == [["all", "begins"], ["all", "ends"]]
    assert {line.split()[0] for line in order[2:4]} == {"left", "right"}, "both pairs at once"
    assert set(notes) == {"one"} and "no room for it" in notes["one"]


def test_one_that_hangs_is_started_again(drive):
    order, notes = drive([("slow", "hangs", (0, 1))], "--stall", "1", "--budget", "80")
    assert [line.split() for line in order] == [["slow", "begins"], ["slow", "begins", "GROUP"], ["slow", "ends"]]
    assert "said nothing for 1 s" in notes["slow"]


def test_nothing_outlives_the_budget(drive):
    order, notes = drive([("slow", "hangs", (0,))], "--budget", "2")
    assert order == ["slow begins "]
    assert "was running when the time was up" in notes["slow"]


def test_models_that_do_not_fit_are_not_tried(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(tensor_parallel_all, "run", lambda args: found.extend(measurements(args)) or {})
    before = dict(runs=[dict(model="llama-30b-m", tp=2, device_kind="NVIDIA H200", parts={})])
    (tmp_path / "before.json").write_text(json.dumps(before))
    places = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--resume", str(tmp_path / "before.json")]
    main(["--gpus", "4", *places])
    assert json.loads((tmp_path / "out" / "tensor_parallel.json").read_text())["runs"] == before["runs"]
    assert [(job.name, job.gpus) for job in found] == [
        ("llama-70b-m_tp4", (0, 1, 2, 3)),
        ("llama-30b-m_tp4", (0, 1, 2, 3)),
        ("llama-3.1-70b_tp4", (0, 1, 2, 3)),
        ("llama-70b-m_tp2", (2, 3)),
        ("llama-30b-m_tp2", (0, 1)),
        ("llama-3.1-70b_tp2", (0, 1)),
        ("llama-30b-m_tp1", (3,)),
    ]
