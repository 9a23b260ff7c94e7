"""Adapters that come, change and go, in the watched directory and through the API."""

import asyncio
import dataclasses
import json
import os
import shutil

from adapter_calls import answer, listed, load, scan
import pytest

from slora_jax.adapters import random_adapter, save_adapter
from slora_jax.server import paths


def test_a_directory_is_watched(serving, adapters, make_adapter):
    async def main():
        async with serving() as (client, service):
            one, two = await answer(client, "one"), await answer(client, "two")
            make_adapter(adapters / "three", 0.5)
            await scan(service, 1)
            assert await answer(client, "three") == "404"  # somebody may still be writing it
            await scan(service, 1)
            assert await answer(client, "three") == two  # the same contents
            make_adapter(adapters / "one", 0.5)
            shutil.rmtree(adapters / "two")
            await scan(service)
            assert await answer(client, "one") == two != one
            assert await answer(client, "two") == "404"
            assert set(await listed(client)) == {"one", "three"}

    asyncio.run(main())


@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_that_goes_away_during_a_scan_keeps_its_adapters(serving, adapters, monkeypatch, replaced):
    elsewhere = adapters.with_name("elsewhere")
    fingerprint = paths.fingerprint

    def away(path):
        if not elsewhere.exists():
            os.rename(adapters, elsewhere)
            if replaced:
                os.mkdir(adapters)  # where a volume was mounted
        return fingerprint(path)

    async def main():
        async with serving() as (client, service):
            monkeypatch.setattr(paths, "fingerprint", away)
            await scan(service, 1)
            assert elsewhere.exists()
            assert await answer(client, "one") != "404"

    asyncio.run(main())


def test_the_watcher_runs_by_itself(serving, adapters, make_adapter):
    async def main():
        async with serving(scan_seconds=0.02) as (client, _):
            make_adapter(adapters / "three")
            while await answer(client, "three") == "404":
                await asyncio.sleep(0.02)
            os.rename(adapters, adapters.with_name("elsewhere"))  # a volume that is away for a moment
            await asyncio.sleep(0.1)
            assert await answer(client, "three") != "404"

    asyncio.run(main())


def test_bad_adapters_are_told_and_hurt_nobody(serving, adapters, make_adapter, tmp_path):
    weights = (adapters / "one" / "adapter_model.safetensors").read_bytes()
    make_adapter(adapters / "cut")
    (adapters / "cut" / "adapter_model.safetensors").write_bytes(weights[:-100])
    make_adapter(adapters / "noise")
    (adapters / "noise" / "adapter_model.safetensors").write_bytes(os.urandom(5000))
    make_adapter(adapters / "config")
    (adapters / "config" / "adapter_config.json").write_bytes(b"{")
    make_adapter(adapters / "half")
    (adapters / "half" / "adapter_model.safetensors").unlink()
    make_adapter(adapters / "bad name")
    make_adapter(adapters / "tiny")  # the base model's own name
    make_adapter(tmp_path / "outside")
    (adapters / "linked").symlink_to(tmp_path / "outside")
    (adapters / "file").symlink_to(adapters / "one")  # within the directory is fine
    make_adapter(adapters / "piped")
    (adapters / "piped" / "adapter_model.safetensors").unlink()
    os.mkfifo(adapters / "piped" / "adapter_model.safetensors")
    (adapters / "not-an-adapter").mkdir()
    bad = {"cut", "noise", "config", "half", "bad name", "tiny", "linked", "piped"}

    async def main():
        async with serving() as (client, service):
            entries = await listed(client)
            assert set(entries) == {"one", "two", "file"} | bad
            for name, entry in entries.items():
                assert (entry["error"] is not None) == (name in bad), entry
                assert str(tmp_path) not in (entry["error"] or "")
            models = [m["id"] for m in (await client.get("/v1/models")).json()["data"]]
            assert models == ["tiny", "file", "one", "two"]
            assert await answer(client, "cut") == "404"
            good = await answer(client, "one")
            assert good == await answer(client, "file")
            make_adapter(adapters / "cut")
            (adapters / "one" / "adapter_model.safetensors").write_bytes(weights[:-100])
            await scan(service)
            assert await answer(client, "cut") == good
            entries = await listed(client)
            assert entries["cut"]["error"] is None
            assert await answer(client, "one") == good  # what was good is served on, and the error is told
            assert entries["one"]["error"] and entries["one"]["digest"] == entries["cut"]["digest"]

    asyncio.run(main())


def test_an_adapter_for_other_modules_than_announced_fails_alone(
    serving, engine, adapters, make_adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, "settings", dataclasses.replace(engine.settings, lora_targets=("v",)))
    save_adapter(random_adapter(engine.model.config, 4, ["v"]), adapters / "only-v")
    make_adapter(tmp_path / "more" / "late")

    async def main():
        async with serving(load_root=tmp_path / "more") as (client, _):
            entries = await listed(client)
            assert entries["only-v"]["error"] is None and await answer(client, "only-v") != "404"
            for name in ("one", "two"):
                assert entries[name]["error"].startswith(f"adapter '{name}' targets q, lora_targets is v; ")
                assert await answer(client, name) == "404"
            refused = await load(client, "late", "late")
            assert refused.status_code == 400
            assert "adapter 'late' targets q, lora_targets is v" in refused.json()["error"]["message"]

    asyncio.run(main())


def test_loading_and_unloading_as_vllms_clients_do(serving, tmp_path, make_adapter):
    root = tmp_path / "root"
    make_adapter(root / "team" / "a", 0.7)
    make_adapter(root / "b", 0.9)

    async def main():
        async with serving(load_root=root) as (client, _):
            first = await load(client, "x", "team/a")
            assert (first.status_code, first.text) == (200, "Success: LoRA adapter 'x' added successfully.")
            a = await answer(client, "x")
            again = await load(client, "x", "b")
            assert again.status_code == 400 and "has already been loaded" in again.json()["error"]["message"]
            assert await answer(client, "x") == a
            assert (await load(client, "x", "b", load_inplace=True)).status_code == 200
            assert await answer(client, "x") != a
            assert (await load(client, "one", "b", load_inplace=True)).status_code == 400  # that one is watched
            gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
            assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'x' removed successfully.")
            assert await answer(client, "x") == "404"
            twice = await client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
            assert twice.status_code == 404 and twice.json()["error"]["param"] == "lora_name"
            missing = await client.post("/v1/load_lora_adapter", json={"lora_name": "x"})
            assert missing.status_code == 400 and missing.json()["error"]["param"] == "lora_path"

    asyncio.run(main())


def test_the_rate_of_loading_is_bounded(serving, tmp_path, make_adapter):
    make_adapter(tmp_path / "root" / "a")

    async def main():
        async with serving(load_root=tmp_path / "root", max_loads_per_minute=2) as (client, _):
            got = [await load(client, f"x{i}", "a") for i in range(3)]
            assert [response.status_code for response in got] == [200, 200, 429]
            assert 1 <= int(got[2].headers["retry-after"]) <= 30
            assert await answer(client, "x1") != "404" == await answer(client, "x2")

    asyncio.run(main())


def test_pinning_and_prefetching(serving):
    async def main():
        async with serving() as (client, service):
            for call, word in (("pin", "pinned"), ("unpin", "unpinned"), ("prefetch", "prefetched")):
                done = await client.post(f"/v1/{call}_lora_adapter", json={"lora_name": "one"})
                assert (done.status_code, done.text) == (200, f"Success: LoRA adapter 'one' {word}.")
                assert (await listed(client))["one"]["tier"] in ("host", "device")
                assert ("one" in {a["name"] for a in service.engine.list_adapters() if a["pinned"]}) == (call == "pin")
                gone = await client.post(f"/v1/{call}_lora_adapter", json={"lora_name": "nobody"})
                assert gone.status_code == 404 and gone.json()["error"]["param"] == "lora_name"

    asyncio.run(main())


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../adapters/one", "b/../../adapters/one", "{tmp}/adapters/one", "/etc", "b\x00", "..\\adapters"]
    + ["out", "out/one", "files", ".hidden", "nothing", "org/model", "b" * 2000, "loop", "~", "file:///etc"],
)
def test_no_path_leads_out_of_the_root(serving, tmp_path, make_adapter, path):
    root = tmp_path / "root"
    make_adapter(root / "b")
    make_adapter(root / ".hidden")
    (root / "out").symlink_to(tmp_path / "adapters")
    (root / "loop").symlink_to(root / "loop")
    (root / "files").mkdir()
    for file in (tmp_path / "adapters" / "one").iterdir():
        (root / "files" / file.name).symlink_to(file)

    async def main():
        async with serving(load_root=root) as (client, _):
            response = await load(client, "x", path.replace("{tmp}", str(tmp_path)))
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == "lora_path"
            assert str(tmp_path) not in response.text
            assert set(await listed(client)) == {"one", "two"}

    asyncio.run(main())


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "/x", ".x", "a b", "x\n", "tiny", "é", "a" * 201, "a//b", "a/"])
def test_no_odd_name_is_registered(serving, tmp_path, make_adapter, name):
    make_adapter(tmp_path / "root" / "b")

    async def main():
        async with serving(load_root=tmp_path / "root") as (client, _):
            response = await load(client, name, "b")
            assert response.status_code == 400 and response.json()["error"]["param"] == "lora_name", response.text

    asyncio.run(main())


def test_clients_name_paths_only_where_the_operator_allows_it(serving):
    async def main():
        async with serving() as (client, _):
            response = await load(client, "x", "one")
        assert response.status_code == 403 and response.json()["error"]["code"] == "loading_not_allowed"

    asyncio.run(main())


def test_the_number_of_adapters_is_bounded(serving, tmp_path, make_adapter):
    make_adapter(tmp_path / "root" / "b")

    async def main():
        async with serving(load_root=tmp_path / "root", max_adapters=2) as (client, _):
            response = await load(client, "x", "b")
        assert response.status_code == 400 and "the most that are allowed" in response.text

    asyncio.run(main())


def test_an_adapter_that_is_unloaded_ends_its_answers_as_they_began(serving, engine):
    async def main():
        async with serving() as (client, _):
            body = dict(max_tokens=300, ignore_eos=True)
            alone = await answer(client, "one", **body)
            running = asyncio.create_task(answer(client, "one", **body))
            while not any(r["state"] == "running" for r in await asyncio.to_thread(engine.list_requests)):
                await asyncio.sleep(0.001)
            await client.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
            assert await answer(client, "one") == "404"
            assert await running == alone
            assert "one" not in await listed(client)

    asyncio.run(main())
    pages = engine.stats()["pages"]
    assert pages["kv"] == pages["adapter"] == 0


def test_found_adapters_are_checked_now_and_read_when_they_are_asked_for(serving, engine, adapters, make_adapter):
    """Nobody's weights are in memory before; NaN is told when it is met, and nothing tells where the files lie."""
    make_adapter(adapters / "nan", float("nan"))
    make_adapter(adapters / "cut", 0.7)

    async def main():
        async with serving() as (client, service):
            before = engine.stats()["adapter_tiers"]["disk"]["reads"]
            entries = await listed(client)
            assert {entry["tier"] for entry in entries.values()} == {"disk"}
            assert all(entry["error"] is None and entry["digest"] is None for entry in entries.values())
            assert engine.stats()["adapter_tiers"]["disk"]["reads"] == before
            chat = {"model": "one", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}
            chunks = (await client.post("/v1/chat/completions", json=chat)).text.split("data: ")[1:-1]
            digest = (await listed(client))["one"]["digest"]
            assert digest and {json.loads(chunk)["system_fingerprint"] for chunk in chunks} == {digest}
            failed = await client.post("/v1/completions", json={"model": "nan", "prompt": "a"})
            told = failed.json()["error"]["message"]
            assert failed.status_code == 500 and "'nan'" in told and str(adapters) not in told, told
            weights = (adapters / "cut" / "adapter_model.safetensors").read_bytes()
            (adapters / "cut" / "adapter_model.safetensors").write_bytes(weights[:-4])
            failed = await client.post("/v1/embeddings", json={"model": "cut", "input": "a"})
            assert failed.status_code == 500 and str(adapters) not in failed.text
            entries = await listed(client)
            assert entries["nan"]["error"] and entries["cut"]["error"] and str(adapters) not in json.dumps(entries)
            assert entries["one"]["tier"] != "disk" and entries["two"]["tier"] == "disk"
            make_adapter(adapters / "nan", 0.5)
            await scan(service)
            assert await answer(client, "nan") == await answer(client, "two")
            assert (await listed(client))["nan"]["error"] is None

    asyncio.run(main())


def test_an_adapter_that_is_loaded_by_call_is_read_whole(serving, engine, tmp_path, make_adapter):
    make_adapter(tmp_path / "root" / "nan", float("nan"))
    make_adapter(tmp_path / "root" / "good", 0.5)

    async def main():
        async with serving(load_root=tmp_path / "root") as (client, _):
            refused = await load(client, "x", "nan")
            assert refused.status_code == 400 and str(tmp_path) not in refused.text, refused.text
            assert "x" not in await listed(client)
            assert (await load(client, "x", "good")).status_code == 200
            entry = (await listed(client))["x"]
            assert entry["digest"] and entry["tier"] == "disk"  # of its weights nothing is kept
            assert await answer(client, "x") == await answer(client, "two")

    asyncio.run(main())


def test_many_adapters_are_added_at_once_and_counted(serving, engine, adapters, make_adapter):
    for i in range(30):
        make_adapter(adapters / f"many-{i}", 1 + i / 8)

    async def main():
        async with serving(max_adapters=20) as (client, service):
            entries = await listed(client)
            assert len(entries) == 32 and service.adapters.num_served == 20 == len(service.adapters.names())
            assert sum("20 adapters are registered" in (e["error"] or "") for e in entries.values()) == 12
            served = service.adapters.names()
            for name in served[:5]:
                shutil.rmtree(adapters / name)
            await scan(service)
            assert service.adapters.num_served == 15 == engine.stats()["adapters"]
            shown = await asyncio.to_thread(service.adapters.describe, 4)
            assert len(shown) == 4 and all(entry["error"] for entry in shown)

    asyncio.run(main())
