"""Adapters from disk through host memory to pages: nobody waits for another's, nothing stale is served."""

import threading
import time

import numpy as np
import pytest
from tier_engines import ADAPTERS, MODEL, PAGE, PAGES, PROMPT, RANKS, ask, config, settle

from slora_jax import AdapterError, CapacityError, Engine, SamplingParams, SloraError
from slora_jax.adapters import random_adapter, save_adapter


@pytest.fixture(scope="module")
def answers():
    """Tokens of every adapter, and of none (-1), for PROMPT."""
    names = {f"a{i}": a for i, a in enumerate(ADAPTERS)}
    with Engine(MODEL, config(), names) as engine:
        outputs = engine.generate([ask(None), *(ask(name) for name in names)])
    tokens = {i - 1: o.token_ids for i, o in enumerate(outputs)}
    assert len({tuple(t) for t in tokens.values()}) == len(tokens)
    return tokens


@pytest.fixture
def directory(tmp_path):
    for i, adapter in enumerate(ADAPTERS):
        save_adapter(adapter, tmp_path / f"a{i}")
    return tmp_path


def tiers(engine):
    return {row["name"]: row["tier"] for row in engine.list_adapters()}


class Gate:
    """Holds an engine's reads of some directories until it is opened."""

    def __init__(self, engine, monkeypatch, *names):
        self.open = threading.Event()
        self.entered = threading.Event()
        reader = engine._reader
        read = reader.read

        def slow(files):
            if any(files.path.endswith(name) for name in names):
                self.entered.set()
                assert self.open.wait(30)
            return read(files)

        monkeypatch.setattr(reader, "read", slow)


def test_a_directory_of_adapters_is_read_when_it_is_asked_for(directory, answers):
    (directory / "broken").mkdir()
    (directory / "broken" / "adapter_config.json").write_text("{}")
    (directory / "no adapter").mkdir()
    (directory / ".hidden").mkdir()
    (directory / "a file").write_text("x")
    with Engine(MODEL, config()) as engine:
        added = engine.add_adapter_directory(directory)
        assert added.added == ["a0", "a1", "a2", "a3"] and added.seconds > 0
        assert list(added.refused) == ["broken"] and added.refused["broken"].startswith("adapter 'broken': ")
        assert set(tiers(engine).values()) == {"disk"}
        assert all(row["digest"] is None and row["hits"] == 0 for row in engine.list_adapters())
        outputs = engine.generate([ask(None), *(ask(f"a{i}") for i in (2, 0, 2))])
        assert [o.token_ids for o in outputs] == [answers[i] for i in (-1, 2, 0, 2)]
        assert [o.adapter_digest for o in outputs[1:]] == [ADAPTERS[i].digest for i in (2, 0, 2)]
        rows = {row["name"]: row for row in engine.list_adapters()}
        assert {name: row["tier"] for name, row in rows.items()} == dict(a0="pages", a1="disk", a2="pages", a3="disk")
        assert (rows["a2"]["hits"], rows["a2"]["digest"], rows["a2"]["rank"]) == (2, ADAPTERS[2].digest, RANKS[2])
        assert rows["a1"]["last_used"] is None and rows["a2"]["last_used"] <= time.time()
        stats = engine.stats()["adapter_tiers"]
        assert (stats["pages"]["loads"], stats["pages"]["hits"], stats["pages"]["misses"]) == (2, 1, 2)
        assert stats["disk"]["reads"] == stats["host"]["loads"] == stats["host"]["adapters"] == 2
        assert stats["host"]["bytes"] == (PAGES[0] + PAGES[2]) * PAGE and stats["disk"]["load_seconds"] > 0
        engine.check_integrity()


def test_the_same_answers_from_a_directory_given_at_the_start(directory, answers, caplog):
    (directory / "broken").mkdir()
    (directory / "broken" / "adapter_config.json").write_text("{}")
    with Engine.from_pretrained("random:tiny-gqa", config(max_lora_rank=None), directory) as engine:
        assert "not added: adapter 'broken': " in caplog.text
        outputs = engine.generate([ask(f"a{i}") for i in range(4)])
        assert [o.token_ids for o in outputs] == [answers[i] for i in range(4)]
    with pytest.raises(AdapterError, match="no adapter in it; give a directory whose"):
        Engine.from_pretrained("random:tiny-gqa", config(), directory / "a0")


def test_what_the_settings_refuse_is_left_out_of_a_directory_by_its_own_name(directory, caplog):
    save_adapter(random_adapter(MODEL.config, 8, ["down"]), directory / "b0")
    save_adapter(random_adapter(MODEL.config, 8, ["down"], seed=1), directory / "b1")
    wrong = {name: f"adapter '{name}' targets down, lora_targets is q, v" for name in ("b0", "b1")}
    for index in range(4):
        save_adapter(random_adapter(MODEL.config, RANKS[index], ["q", "v"]), directory / f"a{index}")
    settings = config(lora_targets=("q", "v"), max_lora_rank=12)
    with Engine.from_pretrained("random:tiny-gqa", settings, directory) as engine:
        assert [row["name"] for row in engine.list_adapters()] == ["a0", "a1", "a2"]
        for reason in (*wrong.values(), "adapter 'a3' has rank 32, max_lora_rank is 12"):
            assert f"not added: {reason}" in caplog.text
    with Engine(MODEL, settings) as engine:
        added = engine.add_adapter_directory(directory)
        assert added.added == ["a0", "a1", "a2"] and set(added.refused) == {"a3", "b0", "b1"}
        for name, reason in wrong.items():
            assert added.refused[name].startswith(reason)


def test_what_cannot_be_held_is_refused_and_the_others_are_added(directory):
    with Engine(MODEL, config(pages=PAGES[2] + 1)) as engine:
        added = engine.add_adapter_directory(directory)
        assert added.added == ["a0", "a1", "a2"] and "and the pool has" in added.refused["a3"]
    with Engine(MODEL, config(host_adapter_bytes=PAGES[2] * PAGE)) as engine:
        with pytest.raises(CapacityError, match="adapter 'x' needs .* bytes of host memory, host_adapter_bytes is"):
            engine.add_adapter("x", ADAPTERS[3])
        assert engine.add_adapter("x", directory / "a2", lazy=True) is None
    with Engine(MODEL, config(max_lora_rank=8)) as engine:
        with pytest.raises(AdapterError, match="has rank 32, max_lora_rank is 8"):
            engine.add_adapter("x", directory / "a3", lazy=True)
        with pytest.raises(AdapterError, match="adapter 'x': lazy is for directories"):
            engine.add_adapter("x", ADAPTERS[0], lazy=True)
        with pytest.raises(AdapterError, match="cannot be read|no such directory"):
            engine.add_adapter_directory(directory / "nowhere")
    with pytest.raises(SloraError, match="host_adapter_bytes must be at least 1"):
        config(host_adapter_bytes=0)


def test_a_slow_disk_holds_up_only_those_who_need_it(directory, answers, monkeypatch):
    with Engine(MODEL, config()) as engine:
        engine.add_adapter_directory(directory)
        gate = Gate(engine, monkeypatch, "a1")
        slow = engine.stream(ask("a1"))
        assert gate.entered.wait(30)
        others = engine.generate([ask(name) for name in ("a0", None, "a2")])
        assert [o.token_ids for o in others] == [answers[i] for i in (0, -1, 2)]
        assert engine.list_requests()[0]["state"] == "waiting"
        gate.open.set()
        deltas = list(slow)
        assert deltas[-1].output.token_ids == answers[1]
        assert deltas[-1].output.adapter_digest == ADAPTERS[1].digest


def test_the_same_contents_under_two_names_share_pages_once_read(directory, answers):
    save_adapter(ADAPTERS[1], directory / "copy")
    with Engine(MODEL, config()) as engine:
        engine.add_adapter_directory(directory)
        outputs = engine.generate([ask(name) for name in ("a1", "copy", "a1")])
        assert [o.token_ids for o in outputs] == [answers[1]] * 3
        stats = engine.stats()
        assert stats["pages"]["idle_adapter"] == PAGES[1] and stats["adapter_tiers"]["host"]["adapters"] == 1
        engine.remove_adapter("a1")
        assert tiers(engine)["copy"] == "pages"
        engine.remove_adapter("copy")
        assert engine.stats()["pages"]["free"] == 200 and engine.stats()["adapter_tiers"]["host"]["bytes"] == 0


def test_an_adapter_that_cannot_be_read_fails_alone(directory, answers):
    with Engine(MODEL, config()) as engine:
        path = directory / "a1" / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-4:] = np.float32(np.nan).tobytes()
        path.write_bytes(data)
        engine.add_adapter_directory(directory)  # the header is right
        (directory / "a3" / "adapter_model.safetensors").unlink()
        outputs = engine.generate([ask(f"a{i}") for i in (0, 1, 2, 3, 1)])
        assert [o.finish_reason for o in outputs] == ["length", "error", "length", "error", "error"]
        assert [outputs[i].token_ids for i in (0, 2)] == [answers[0], answers[2]]
        errors = [outputs[i].completions[0].error for i in (1, 3)]
        assert errors[0].startswith("adapter 'a1': ") and "holds NaN" in errors[0]
        assert errors[1].startswith("adapter 'a3': ") and "no adapter_model.safetensors in it" in errors[1]
        assert outputs[1].adapter_digest is None
        assert engine.stats()["adapter_tiers"]["disk"]["failures"] >= 2
        engine.add_adapter("a1", save_adapter(ADAPTERS[1], directory / "a1"), lazy=True)
        assert engine.generate([ask("a1")])[0].token_ids == answers[1]
        engine.check_integrity()


def test_files_that_change_after_they_were_added_are_not_served(directory, answers):
    with Engine(MODEL, config()) as engine:
        engine.add_adapter_directory(directory)
        assert engine.generate([ask("a0")])[0].token_ids == answers[0]
        save_adapter(ADAPTERS[2], directory / "a0")
        save_adapter(ADAPTERS[2], directory / "a1")
        outputs = engine.generate([ask("a0"), ask("a1")])
        assert outputs[0].token_ids == answers[0]  # in pages, under the digest of what was read
        assert "have changed since the adapter was added; add it again" in outputs[1].completions[0].error
        engine.add_adapter_directory(directory)
        assert [o.token_ids for o in engine.generate([ask("a0"), ask("a1")])] == [answers[2]] * 2
        assert engine.stats()["pages"]["idle_adapter"] == PAGES[2]


def test_a_name_that_is_replaced_while_its_files_are_read(directory, answers, monkeypatch):
    with Engine(MODEL, config()) as engine:
        engine.add_adapter_directory(directory)
        gate = Gate(engine, monkeypatch, "a1")
        old = engine.stream(ask("a1"))
        assert gate.entered.wait(30)
        engine.add_adapter("a1", ADAPTERS[2])
        assert engine.generate([ask("a1")])[0].token_ids == answers[2]
        gate.open.set()
        assert list(old)[-1].output.token_ids == answers[1]
        settle(lambda: engine.stats()["pages"]["idle_adapter"] == PAGES[2])
        assert engine.stats()["adapter_tiers"]["host"]["adapters"] == 1


def test_a_request_that_leaves_while_its_adapter_is_read(directory, monkeypatch):
    with Engine(MODEL, config()) as engine:
        engine.add_adapter_directory(directory)
        gate = Gate(engine, monkeypatch, "a1")
        stream = engine.stream(ask("a1"))
        assert gate.entered.wait(30)
        stream.close()
        engine.abort(engine.list_requests()[0]["request_id"])
        assert engine.list_requests() == []
        engine.remove_adapter("a1")
        gate.open.set()
        settle(lambda: engine.stats()["adapter_tiers"]["disk"]["reads"] == 1)
        assert engine.stats()["adapter_tiers"]["host"]["bytes"] == 0
        assert engine.stats()["pages"]["free"] == 200


def test_prefetching_brings_an_adapter_to_pages_before_anybody_asks(directory, answers):
    with Engine(MODEL, config()) as engine:
        engine.add_adapter_directory(directory)
        engine.prefetch_adapter("a1").result(30)
        settle(lambda: tiers(engine)["a1"] == "pages")
        engine.prefetch_adapter("a1").result(30)
        assert engine.generate([ask("a1")])[0].token_ids == answers[1]
        assert engine.stats()["adapter_tiers"]["pages"] | dict(evictions=0) == dict(
            hits=1, misses=0, loads=1, evictions=0, adapters=1
        )
        (directory / "a2" / "adapter_config.json").unlink()
        with pytest.raises(AdapterError, match=r"no adapter_config.json in it"):
            engine.prefetch_adapter("a2").result(30)
        with pytest.raises(AdapterError, match="'nobody' is unknown"):
            engine.prefetch_adapter("nobody")


def test_closing_the_engine_answers_who_waits_for_a_prefetch(directory, monkeypatch):
    with Engine(MODEL, config()) as engine:
        engine.add_adapter_directory(directory)
        gate = Gate(engine, monkeypatch, "a1")
        future = engine.prefetch_adapter("a1")
        assert gate.entered.wait(30) and not future.done()
        threading.Timer(0.2, gate.open.set).start()
    with pytest.raises(SloraError, match="the engine is closed"):
        future.result(30)


def test_a_pinned_adapter_stays_while_others_come_and_go(directory, answers):
    room = PAGES[0] + PAGES[1] + PAGES[2] + 3
    budget = (PAGES[0] + PAGES[2]) * PAGE
    with Engine(MODEL, config(pages=room, host_adapter_bytes=budget)) as engine:
        for name in ("a0", "a1", "a2"):
            engine.add_adapter(name, directory / name, lazy=True)
        engine.pin_adapter("a0")
        settle(lambda: tiers(engine)["a0"] == "pages")
        for _ in range(2):
            for i in (1, 2):
                assert engine.generate([ask(f"a{i}", PROMPT * 5)])[0].finish_reason == "length"
        assert tiers(engine)["a0"] == "pages" and engine.stats()["adapter_tiers"]["host"]["evictions"] > 0
        assert [row["pinned"] for row in engine.list_adapters()] == [True, False, False]
        with pytest.raises(CapacityError, match="adapter 'a1' cannot be pinned: .* set it higher or unpin others"):
            engine.pin_adapter("a1")
        reads = engine.stats()["adapter_tiers"]["disk"]["reads"]
        assert engine.generate([ask("a0")])[0].token_ids == answers[0]
        assert engine.stats()["adapter_tiers"]["disk"]["reads"] == reads
        engine.unpin_adapter("a0")
        assert not any(row["pinned"] for row in engine.list_adapters())
        engine.pin_adapter("a1")
        engine.remove_adapter("a1")
        assert engine.stats()["adapter_tiers"]["host"]["bytes"] <= budget
        engine.check_integrity()
    with Engine(MODEL, config()) as engine:
        engine.add_adapter("a0", directory / "a0", lazy=True)
        (directory / "a0" / "adapter_config.json").unlink()
        with pytest.raises(AdapterError, match="adapter 'a0': .*no adapter_config.json in it"):
            engine.pin_adapter("a0")
        assert not engine.list_adapters()[0]["pinned"]


def test_an_adapter_is_copied_in_parts_while_others_run(answers):
    with Engine(MODEL, config(adapter_chunk_bytes=PAGE, adapter_step_bytes=2 * PAGE)) as engine:
        engine.add_adapter("large", ADAPTERS[3])
        running = engine.stream(ask(None, params=SamplingParams(max_tokens=400, ignore_eos=True)))
        next(running)
        before = engine.stats()["steps"]
        assert engine.generate([ask("large")])[0].token_ids == answers[3]
        assert engine.stats()["steps"] - before >= PAGES[3] // 2
        running.close()
