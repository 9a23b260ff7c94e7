"""The registry file: what was loaded and unloaded over HTTP, over restarts."""

import asyncio
import json
import shutil

from adapter_calls import answer, listed, load, scan
import pytest

from slora_jax import SloraError


def test_a_restart_finds_the_registry(serving, tmp_path, make_adapter):
    make_adapter(tmp_path / "root" / "b", 0.3)
    make_adapter(tmp_path / "root" / "later", 0.4)
    config = dict(load_root=tmp_path / "root", registry=tmp_path / "registry.json")

    async def first():
        async with serving(**config) as (client, _):
            assert (await load(client, "x", "b")).status_code == 200
            assert (await load(client, "y", "later")).status_code == 200
            assert (await load(client, "z", "nothing")).status_code == 400
            await client.post("/v1/unload_lora_adapter", json={"lora_name": "two"})
            return await answer(client, "x")

    async def second(text):
        shutil.rmtree(tmp_path / "root" / "later")
        async with serving(**config) as (client, service):
            assert await answer(client, "x") == text
            entries = await listed(client)
            assert set(entries) == {"one", "x", "y"}  # "two" stays away, "z" never was
            assert entries["y"]["digest"] is None and "no adapter is at" in entries["y"]["error"]
            shutil.rmtree(tmp_path / "adapters" / "two")
            await scan(service)
            make_adapter(tmp_path / "adapters" / "two")
            await scan(service)
            assert await answer(client, "two") != "404"  # it went and came back

    asyncio.run(second(asyncio.run(first())))
    state = json.loads((tmp_path / "registry.json").read_text())
    assert state == {"version": 1, "loaded": {"x": "b", "y": "later"}, "unloaded": []}


def test_a_registry_that_cannot_be_written_changes_nothing(serving, tmp_path, make_adapter, monkeypatch):
    from slora_jax.server import registry_file

    make_adapter(tmp_path / "root" / "b")

    def full(*args):
        raise OSError(28, "No space left on device")

    async def main():
        async with serving(load_root=tmp_path / "root", registry=tmp_path / "registry.json") as (client, _):
            monkeypatch.setattr(registry_file, "write_atomically", full)
            response = await load(client, "x", "b")
            assert response.status_code == 500 and "No space left" in response.text
            assert await answer(client, "x") == "404"
            response = await client.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
            assert response.status_code == 500 and await answer(client, "one") != "404"

    asyncio.run(main())


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version": 1, "loaded": {"x": 1}, "unloaded": []}', '{"version": 9}']
)
def test_a_registry_that_is_broken_is_never_overwritten(serving, tmp_path, text):
    (tmp_path / "registry.json").write_text(text)

    async def main():
        async with serving(registry=tmp_path / "registry.json"):
            pass

    with pytest.raises(SloraError, match=r"registry\.json"):
        asyncio.run(main())
    assert (tmp_path / "registry.json").read_text() == text


def test_a_registry_cannot_name_a_path_outside(serving, tmp_path):
    (tmp_path / "root").mkdir()
    state = {"version": 1, "loaded": {"x": "../adapters/one"}, "unloaded": []}
    (tmp_path / "registry.json").write_text(json.dumps(state))

    async def main():
        async with serving(load_root=tmp_path / "root", registry=tmp_path / "registry.json") as (client, _):
            assert await answer(client, "x") == "404"
            assert "must be relative" in (await listed(client))["x"]["error"]

    asyncio.run(main())
