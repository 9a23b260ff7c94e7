"""API keys: who may do what, how much, and what is written down about it."""

import asyncio
import json
import logging
import stat

import pytest

from slora_jax import SloraError
from slora_jax.cli import main as cli
from slora_jax.cli.parser import parse_arguments
from slora_jax.cli.serve import sharing
from slora_jax.server import ServerConfig
from slora_jax.server.keys import add_key, find_key, hash_key, read_keys
from slora_jax.server.logs import JsonLines
from slora_jax.server.rates import TokenBucket

BODY = {"prompt": "hello secret", "max_tokens": 3}


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.json"
    made = {
        "boss": add_key(path, "boss", admin=True),
        "alice": add_key(path, "alice", adapters=["o*"], base=False),
        "slow": add_key(path, "slow", requests_per_minute=2),
        "few": add_key(path, "few", max_concurrent=2),
        "thrifty": add_key(path, "thrifty", tokens_per_minute=10),
    }
    return path, {name: {"authorization": f"Bearer {key}"} for name, key in made.items()}


def test_keys_open_what_they_are_for(serving, keys):
    path, headers = keys

    async def main():
        async with serving(api_keys=path) as (client, _):

            async def status(who, model="one", call="/v1/completions"):
                sent = headers.get(who, {"authorization": who} if who else {})
                if call == "/v1/completions":
                    return (await client.post(call, json=BODY | {"model": model}, headers=sent)).status_code
                return (await client.get(call, headers=sent)).status_code

            assert [await status(who) for who in ("boss", "alice", "slow")] == [200, 200, 200]
            assert [await status(who) for who in (None, "Bearer sk-wrong", "Bearer", "Basic abc")] == [401] * 4
            assert [await status("alice", model) for model in ("two", "tiny", "nobody")] == [404] * 3
            models = (await client.get("/v1/models", headers=headers["alice"])).json()["data"]
            assert [m["id"] for m in models] == ["one"]
            for call in ("/metrics", "/status", "/v1/adapters"):
                assert [await status(who, call=call) for who in ("boss", "alice", None)] == [200, 403, 401]
            load = await client.post("/v1/load_lora_adapter", content=b"{", headers=headers["alice"])
            assert load.status_code == 403
            for call in ("/health", "/ready", "/version", "/"):
                assert await status(None, call=call) == 200
            big = await client.post("/v1/completions", content=b"x" * (5 << 20))
            assert big.status_code == 401  # nothing of a stranger's is read
            denied = await client.get("/v1/models")
            assert denied.headers["www-authenticate"] == "Bearer"
            assert denied.json()["error"]["type"] == "authentication_error"

    asyncio.run(main())


def test_keys_share_the_device_by_their_weights(serving, keys, tmp_path):
    path, headers = keys
    add_key(path, "heavy", weight=3)
    serve = ["serve", "MODEL", "--api-keys", str(path)]
    policy, options = sharing(parse_arguments(serve))
    assert policy == "fair" and options["weights"]["heavy"] == 3 and options["weights"]["boss"] == 1
    assert sharing(parse_arguments([*serve, "--policy", "priority"])) == ("priority", {})
    assert sharing(parse_arguments(serve[:2])) == ("fcfs", {})
    with pytest.raises(SloraError, match="weight must be a number above 0"):
        add_key(path, "none", weight=0)

    async def main():
        async with serving(api_keys=path) as (client, service):
            asked, start = [], service.engine.astart

            async def watched(requests, **kwargs):
                asked.extend(requests)
                return await start(requests, **kwargs)

            service.engine.astart = watched
            try:
                await client.post("/v1/completions", json=BODY | {"model": "one"}, headers=headers["alice"])
            finally:
                del service.engine.astart
            assert [r.tenant for r in asked] == ["alice"]

    asyncio.run(main())


def test_limits_of_a_key(serving, keys):
    path, headers = keys

    async def main():
        async with serving(api_keys=path) as (client, _):

            async def ask(who, **body):
                return await client.post("/v1/completions", json=BODY | {"model": "one"} | body, headers=headers[who])

            got = [await ask("slow") for _ in range(3)]
            assert [r.status_code for r in got] == [200, 200, 429]
            assert 1 <= int(got[2].headers["retry-after"]) <= 30
            assert got[2].json()["error"] | {"message": ""} == {
                "message": "", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
            }  # fmt: skip
            assert (await ask("few", n=3)).status_code == 429
            assert (await ask("few", n=2)).status_code == 200
            assert [(await ask("thrifty")).status_code for _ in range(2)] == [200, 429]  # 15 tokens were a debt of 5
            assert (await ask("boss")).status_code == 200

    asyncio.run(main())


def test_keys_are_read_again_when_the_file_changes(serving, keys):
    path, headers = keys

    async def main():
        async with serving(api_keys=path) as (client, service):
            new = {"authorization": f"Bearer {add_key(path, 'new')}"}
            assert (await client.get("/v1/models", headers=new)).status_code == 401
            service.tenants.reload()
            assert (await client.get("/v1/models", headers=new)).status_code == 200
            path.write_text("{")
            service.tenants.reload()  # a file that is wrong changes nothing
            assert (await client.get("/v1/models", headers=new)).status_code == 200
            path.write_text('{"keys": []}')
            service.tenants.reload()
            assert (await client.get("/v1/models", headers=new)).status_code == 401

    asyncio.run(main())


def test_neither_keys_nor_prompts_are_logged(serving, keys, caplog):
    path, headers = keys
    caplog.set_level(logging.DEBUG)

    async def main():
        async with serving(api_keys=path) as (client, _):
            sent = headers["boss"] | {"x-request-id": "my-id"}
            response = await client.post("/v1/completions?key=sk-in-query", json=BODY | {"model": "one"}, headers=sent)
            assert response.headers["x-request-id"] == "my-id"
            bad = await client.post("/v1/completions", json=BODY | {"model": "one", "n": "secret"}, headers=sent)
            assert bad.status_code == 400
            odd = await client.get("/health", headers={"x-request-id": "a\tb c"})
            assert " " not in odd.headers["x-request-id"]

    asyncio.run(main())
    records = [r for r in caplog.records if r.name.startswith("slora_jax")]
    text = "\n".join(JsonLines().format(record) for record in records)
    assert "secret" not in text and "sk-" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    line = next(line for line in lines if line.get("request_id") == "my-id")
    assert (line["tenant"], line["model"], line["status"], line["path"]) == ("boss", "one", 200, "/v1/completions")


def test_without_keys_only_this_machine_is_served(serving, tmp_path):
    async def main():
        async with serving() as (client, _):
            for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 403)):
                assert (await client.get("/v1/models", headers={"host": host})).status_code == status
        async with serving(host="0.0.0.0", allow_anonymous=True) as (client, _):
            assert (await client.get("/v1/models", headers={"host": "any.example"})).status_code == 200
            assert (await client.get("/v1/adapters")).status_code == 403

    asyncio.run(main())
    with pytest.raises(SloraError, match="0.0.0.0 can be reached from other machines: give --api-keys"):
        ServerConfig(model_name="m", host="0.0.0.0")
    for name in ("max_body", "max_queue", "scan_seconds"):
        with pytest.raises(SloraError, match=name):
            ServerConfig(model_name="m", **{name: -1})
    with pytest.raises(SloraError, match="is no directory"):
        ServerConfig(model_name="m", adapters=tmp_path / "nothing")


def test_the_key_file_has_hashes_only_and_is_private(tmp_path, capsys):
    path = tmp_path / "keys.json"
    assert cli(["key", "alice", "--file", str(path), "--adapter", "team-*", "--requests-per-minute", "60"]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("sk-") and key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (entry,) = read_keys(path)
    assert (entry.name, entry.adapters, entry.admin) == ("alice", ("team-*",), False)
    assert entry.requests_per_minute == 60 and entry.sha256 == hash_key(key)
    assert find_key([entry], key) is entry and find_key([entry], key + "x") is None
    assert cli(["key", "alice", "--file", str(path)]) == 2
    assert "has a key 'alice' already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "entry, words",
    [
        ({}, "name must be"),
        ({"name": "a", "sha256": "abc"}, "sha256 must be"),
        ({"name": "a", "sha256": "0" * 64, "key": "x"}, "unknown field 'key'"),
        ({"name": "a", "sha256": "0" * 64, "adapters": "*"}, "adapters must be a list"),
        ({"name": "a", "sha256": "0" * 64, "admin": "no"}, "admin must be"),
        ({"name": "a", "sha256": "0" * 64, "max_concurrent": 0}, "max_concurrent must be"),
        ("a", "must be an object"),
    ],
)
def test_a_wrong_key_file_is_named(tmp_path, entry, words):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [entry]}))
    with pytest.raises(SloraError, match=rf"keys\[0\].*{words}"):
        read_keys(path)
    path.write_text("[]")
    with pytest.raises(SloraError, match="must be"):
        read_keys(path)
    with pytest.raises(SloraError, match="cannot be read"):
        read_keys(tmp_path / "missing.json")


def test_a_token_bucket():
    now = 0.0
    bucket = TokenBucket(60, lambda: now)
    assert bucket.wait(60) == 0
    bucket.take(90)
    assert bucket.wait(1) == pytest.approx(31)
    now = 31.0
    assert bucket.wait(1) == 0 and bucket.wait(1000) == pytest.approx(59)
    now = 1000.0
    assert bucket.wait(60) == 0  # it holds no more than a minute's worth
    assert TokenBucket(None).wait(10**9) == 0
