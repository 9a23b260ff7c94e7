"""The adapters' benchmarks run on a tiny model and write what they measured."""

import json

import pytest

from benchmarks import adapter_loading, adapter_memory, register_adapters, soak, soak_twin
from slora_jax import prefix_cache
from slora_jax.adapter_rows import AdapterRows


def test_adapter_loading(tmp_path):
    out = tmp_path / "loading.json"
    arguments = "--shape tiny-gqa --dtype float32 --rank 8 --adapters 2 --running 2 --context 8".split()
    arguments += "--max-tokens 400 --max-step-tokens 64 --seconds 0.15 --rounds 1 --repeats 2".split()
    arguments += ["--page-pool-bytes", "4000000"]
    arguments += ["--json", str(out)]
    result = adapter_loading.main(arguments)
    assert result["rates"]["copy_bytes_per_second"] > 0 and result["rates"]["make_bytes_per_second"] > 0
    first = result["first_token"]
    assert first["cold_seconds"] > 0 and first["allowed_seconds"] == 2 * first["adapter_bytes"] / 43e9
    assert result["steps"]["steps_quiet"] > 0 and result["steps"]["adapters_loaded"] > 0
    assert json.loads(out.read_text())["rank"] == 8


def test_soak(tmp_path):
    arguments = ["--minutes", "0.1", "--rate", "60", "--max-seqs", "8", "--max-step-tokens", "64"]
    result = soak.main([*arguments, "--json", str(tmp_path / "soak.json")])
    assert result["wrong"] == {} and result["leaked_pages"] == result["host_bytes_left"] == 0
    assert result["finished"] > 0 and result["actions"]["add"] > 0


@pytest.mark.parametrize(
    ("memory", "growth", "drift"),
    [
        ([9, 8], 0.0, 0.0),
        ([50, 100, 100, 100, 100, 100], 0.0, 0.0),
        ([50, 100, 100, 100, 100, 100, 100, 100, 150], 0.5, 0.0),  # an adapter is being read at the last look
        ([50, 50, 50, 100, 100, 100, 125, 125, 125], 0.25, 0.25),
        ([50, 50, 50, 100, 100, 100, 125, 125, 100], 0.0, 0.25),
    ],
)
def test_how_memory_grows(memory, growth, drift):
    assert soak._growth(memory) == (growth, drift)


def test_soak_on_the_twin(tmp_path):
    out = tmp_path / "soak.json"
    result = soak_twin.main(["--minutes", "0.5", "--json", str(out)])
    assert result["leaked_pages"] == 0 and json.loads(out.read_text())["finished"] == result["finished"] > 100
    assert min(result[what] for what in ("preemptions", "cancelled", "failed_as_they_must", "adapter_evictions")) > 0


def test_the_twin_notices_pages_of_another_adapter(monkeypatch):
    def blind(seq, count):
        return [repr(seq.tokens[: 16 * i + 16]).encode() for i in range(count)]

    monkeypatch.setattr(prefix_cache, "page_keys", blind)
    with pytest.raises(AssertionError, match="own past|solo run"):
        soak_twin.main(["--minutes", "0.5"])


def test_the_twin_notices_adapters_that_came_back_to_other_pages(monkeypatch):
    look_up = AdapterRows.place

    def trusting(self, digests, pool, adapters):
        if (table := self.current(pool)) is not None and self._row.keys() >= set(digests):
            return self._row, table
        return look_up(self, digests, pool, adapters)

    monkeypatch.setattr(AdapterRows, "place", trusting)
    with pytest.raises(AssertionError, match="not the adapter's weights"):
        soak_twin.main(["--minutes", "0.5"])


def test_register_adapters(tmp_path):
    register_adapters.make_directories(tmp_path, 20, "tiny-gqa", 4, ["q", "v"])
    registry, seconds, _ = register_adapters.register(tmp_path, "tiny-gqa")
    assert len(registry) == 20 and seconds > 0
    assert registry.get("adapter-19").digest is None
    assert len(registry.shapes()) == 1


def test_memory_while_adapters_come_and_go(tmp_path):
    result = adapter_memory.main(
        ["--shape", "tiny-gqa", "--ranks", "8,16", "--reads", "20", "--keep", "1000", "--json", str(tmp_path / "out")]
    )
    assert len(result["heap_bytes"]) == len(result["process_bytes"]) == 2
    assert all(0 < heap < process for heap, process in zip(result["heap_bytes"], result["process_bytes"], strict=True))
    assert json.loads((tmp_path / "out").read_text())["reads"] == 20
