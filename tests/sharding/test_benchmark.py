"""benchmarks/tensor_parallel.py on CPU devices: every layout is measured, once, beside the right floor."""

import json
import re

import jax
import pytest

from benchmarks import tensor_parallel
from benchmarks.tensor_parallel_parts import Decode, adapter_bytes
from benchmarks.tensor_parallel_profile import summary
from benchmarks.tensor_parallel_subject import Subject
from benchmarks.tensor_parallel_table import table

pytestmark = pytest.mark.skipif("len(__import__('jax').devices()) < 4", reason="needs 4 devices")

SMALL = (
    "--tp 2 --model tiny-gqa --dtype float32 --layouts base,s-lora,auto --adapters 2 --seqs 2 --profile-seqs 2 "
    "--context 20 --requests 2 --lengths 2,12 --max-seqs 2 --step-tokens 8 --spend 0.01 --served-seconds 0"
).split()


def run(path, *more):
    tensor_parallel.main([*SMALL, "--json", str(path), *more])
    return json.loads(path.read_text())["parts"]


def test_every_layout_is_measured_and_nothing_twice(tmp_path):
    path = tmp_path / "out.json"
    parts = run(path)
    assert not [name for name, part in parts.items() if "error" in part], parts
    assert set(parts["ceilings"]["auto"]["2"]) == {"qkv", "o", "gu", "down"}
    assert set(parts["ceilings"]["all_reduce_seconds"]) == {"default/2", "default/8"}
    for layout in ("base", "s-lora/n2"):
        decode, served = parts[f"decode/2/{layout}"], parts[f"served/{layout}"]
        assert decode["seconds"] > 0 and decode["floor_seconds"] > 0 and served["requests_per_second"] > 0
        assert served["finished"] and served["compiles"] == 0
    assert {c["operation"] for c in parts["decode/2/s-lora/n2"]["collectives"]} == {"all-reduce", "all-gather"}
    auto = parts["decode/2/auto/n2"]
    assert auto.get("same_as") in ("s-lora", "comm-free") or auto["seconds"] > 0
    written = path.read_bytes()
    assert run(path) == parts
    assert path.read_bytes() == written, "a finished part was run again"
    with pytest.raises(SystemExit, match="other settings"):
        run(path, "--max-seqs", "4")
    result = json.loads(written)
    result["parts"]["served/base"] = dict(error="XlaRuntimeError: out of memory")
    assert "out of memory" in table([result])
    path.write_text(json.dumps(result))
    assert run(path)["served/base"]["requests_per_second"] > 0, "a part that failed is tried again"


def test_a_part_that_fails_loses_no_other(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")

    monkeypatch.setattr(tensor_parallel, "serve", fail)
    parts = run(tmp_path / "out.json", "--layouts", "base,comm-free")
    assert parts["served/base"]["error"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert parts["decode/2/comm-free/n2"]["seconds"] > 0


def test_nothing_begins_when_the_time_is_up(tmp_path):
    path = tmp_path / "out.json"
    tensor_parallel.main(["--tp", "2", "--model", "tiny-gqa", "--budget", "0", "--json", str(path)])
    assert not path.exists()


@pytest.fixture(scope="module")
def subject():
    return Subject(tensor_parallel.arguments([*SMALL, "--layouts", "base,s-lora,comm-free", "--seqs", "2"]), "tiny-gqa")


@pytest.mark.parametrize("lora", ["s-lora", "comm-free"])
def test_the_floor_counts_what_a_device_holds(subject, lora):
    held = {name: array.addressable_shards[0].data.nbytes for name, array in subject.model.params.items()}
    for layout, n in (("base", 2), (lora, 2)):
        subject.programs.setdefault(subject.key(layout, n), subject._programs(layout, n))
    base, case = Decode(subject, "base", 2, 2), Decode(subject, lora, 2, 2)
    kv = 2 * 20 * 2 * 1 * 16 * subject.config.num_layers * 4  # one kv head of 16 on each device
    assert base.floor_bytes() == sum(held.values()) - held["embed"] + kv
    own = [adapter_bytes(a, subject.config, case.parallel) for a in subject.adapters.values()]
    assert case.floor_bytes() - base.floor_bytes() == sum(own)
    batch = case.batch()
    used = batch.adapters.pages[batch.adapters.page_start[:2]]
    assert len({int(p) for p in used}) == 2
    assert batch.seg_adapter.tolist() == [0, 1]


def test_what_is_tuned_is_what_steps_compute(subject):
    """Types of the matrix products: those compiled ahead, and those of a decode step and of one with prompts."""
    product = re.compile(r"dot_general .*?, contracting_dims = (.*?) x (.*?), .*: (\(.*\) -> .*)")
    programs = subject._programs("base", 2)
    for rows, shape in zip((2, 8), subject.shapes("base", [], served=True), strict=True):
        args = (programs._params, programs._state(), programs._last(), programs.padding(shape))
        step = set(product.findall(programs._step.lower(*args).as_text()))
        tuned = product.findall(subject._products(subject.parallels["base", 2], rows).as_text())
        assert len(tuned) == 5
        wanted = tuned if rows == 2 else tuned[:4]  # with prompts there are as many logits as sequences
        assert set(wanted) <= step


def test_a_profile_by_kinds():
    events = [(0, 10, "nvjet_sm90_x"), (10, 5, "lora_shrink_mosaic_gpu_kernel"), (20, 10, "ncclDevKernel_AllReduce")]
    found = summary(events, calls=1, top=2)
    assert found["kinds_ms"] == {"matrix products": 1e-5, "collectives": 1e-5, "LoRA": 5e-6}
    assert (found["span_ms"], found["busy_ms"]) == (3e-5, 2.5e-5)
    assert len(found["kernels"]) == 2
    assert summary([], 1, 1) == {}


def test_where_there_is_no_gpu_nothing_is_tuned(subject):
    assert subject.tuning_seconds == 0 or jax.default_backend() == "gpu"
