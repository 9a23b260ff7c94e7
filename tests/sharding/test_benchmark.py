"""benchmarks/tensor_parallel.py on CPU devices: every layout is measured, once, beside the right floor."""

import json

import jax
import pytest

from benchmarks import tensor_parallel
from benchmarks.tensor_parallel_parts import DecodeCase, clones
from pallas_kernels import MODULES
from slora_jax.loading import random_params
from slora_jax.parallel import make_parallel, param_shards
from slora_jax.shapes import named_shape
from slora_jax.traces import Setting

pytestmark = pytest.mark.skipif("len(__import__('jax').devices()) < 4", reason="needs 4 devices")


def run(path, *more):
    tensor_parallel.main(
        f"--tp 2 --models tiny-gqa --dtype float32 --layouts base,s-lora,auto --adapters 2 --seqs 2 --profile-seqs 2 "
        f"--context 20 --requests 2 --lengths 2,6 --max-seqs 2 --step-tokens 8 --spend 0.01 --compile-seconds 0 "
        f"--served-seconds 0 --json {path}".split()
        + list(more)
    )
    return json.loads(path.read_text())["parts"]


def test_every_layout_is_measured_and_nothing_twice(tmp_path):
    path = tmp_path / "out.json"
    parts = run(path)
    assert not [name for name, part in parts.items() if "error" in part], parts
    chosen = parts["tiny-gqa/ceilings"]["auto"]["2"]
    assert set(chosen) == {"qkv", "o", "gu", "down"}
    for layout in ("base", "s-lora/n2"):
        decode, served = parts[f"tiny-gqa/decode/2/{layout}"], parts[f"tiny-gqa/served/{layout}"]
        assert decode["seconds"] > 0 and decode["floor_seconds"] > 0 and served["requests_per_second"] > 0
    operations = {c["operation"] for c in parts["tiny-gqa/decode/2/s-lora/n2"]["collectives"]}
    assert operations == {"all-reduce", "all-gather"}
    auto = parts["tiny-gqa/decode/2/auto/n2"]
    assert auto.get("same_as") in ("s-lora", "comm-free") or auto["seconds"] > 0
    written = path.read_bytes()
    assert run(path) == parts
    assert path.read_bytes() == written, "a finished part was run again"
    with pytest.raises(SystemExit, match="other settings"):
        run(path, "--max-seqs", "4")


def test_nothing_begins_when_the_time_is_up(tmp_path):
    path = tmp_path / "out.json"
    tensor_parallel.main(["--tp", "2", "--models", "tiny-gqa", "--budget", "0", "--json", str(path)])
    assert not path.exists()


@pytest.mark.parametrize("lora", ["s-lora", "comm-free"])
def test_the_floor_counts_what_a_device_holds(lora):
    config = named_shape("tiny-gqa")
    parallel = make_parallel(config, 2, lora)
    params = random_params(config, dtype="float32", shardings=param_shards(config, parallel))
    case = DecodeCase(
        config=config,
        parallel=parallel,
        seqs=3,
        context=20,
        num_pages=90,
        max_rank=16,
        dtype="float32",
        use_adapters=True,
        implementation="xla",
        loop="scan",
    )
    held = {name: array.addressable_shards[0].data.nbytes for name, array in params.items()}
    kv = 3 * 20 * 2 * 1 * 16 * config.num_layers * 4  # one kv head of 16 on each device
    assert case.floor_bytes([]) == sum(held.values()) - held["embed"] + kv
    adapters = list(clones(config, Setting("tiny-gqa", (8,), MODULES), 4, "float32").values())
    one = case.floor_bytes(adapters[:1]) - case.floor_bytes([])
    assert case.floor_bytes(adapters) - case.floor_bytes([]) == 3 * one, "three sequences use three of four adapters"
    batch = case.batch(adapters[:3])
    used = batch.adapters.pages[batch.adapters.page_start[:3]]
    assert len({int(p) for p in used}) == 3
    assert batch.seg_adapter.tolist() == [0, 1, 2]
    assert jax.tree.leaves(batch.sampling), "the step must sample"
