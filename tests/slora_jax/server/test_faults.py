"""What goes wrong at one client, one adapter or one thread: it gets its error, and everybody else is served."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import time

from running_server import wait_until

from slora_jax.server.adapter_manager import AdapterManager

BODY = {"model": "one", "prompt": "hello", "max_tokens": 4}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def until_closed(client: socket.socket) -> bytes:
    """What the server says before it closes the connection."""
    client.settimeout(20)
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(4096):
            said += piece
    return said


def test_connections_that_dawdle_are_closed_and_hold_nobody(running):
    with running(header_seconds=0.3, body_seconds=0.3) as server:
        silent, trickle, headless, bodiless = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        with silent, trickle, headless, bodiless:
            headless.sendall(HEAD)
            bodiless.sendall(HEAD + b"content-length: 100\r\n\r\n{")
            with contextlib.closing(server.post(BODY)) as good:
                assert good.getresponse().status == 200
            end = time.monotonic() + 20
            with contextlib.suppress(ConnectionError):  # a byte now and then does not help
                for byte in HEAD * 1000:
                    trickle.sendall(bytes([byte]))
                    time.sleep(0.02)
                    assert time.monotonic() < end
            assert until_closed(silent) == until_closed(headless) == b""
            assert b" 408 " in until_closed(bodiless).split(b"\r\n")[0]


def test_a_kept_connection_may_be_idle_and_then_ask_again(running):
    with running(header_seconds=0.3) as server, contextlib.closing(server.post(BODY)) as connection:
        assert connection.getresponse().read()
        time.sleep(0.6)  # longer than headers may take, shorter than a connection may be idle
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


def test_a_prompt_of_ten_megabytes_is_refused_at_any_limit(running, serving):
    body = json.dumps(BODY | {"prompt": "word " * 2_000_000}).encode()
    with running() as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            client.sendall(body)
        assert b" 413 " in until_closed(client)

    async def main():
        async with serving(max_body=16 << 20) as (client, _):
            answers = [client.post("/v1/completions", content=body, headers={"content-type": "application/json"})]
            answers += [client.post("/v1/completions", json=BODY) for _ in range(3)]
            return await asyncio.gather(*answers)

    large, *others = asyncio.run(main())
    assert large.status_code == 400 and large.json()["error"]["param"] == "prompt"
    assert [answer.status_code for answer in others] == [200] * 3


def test_neither_clients_that_vanish_nor_bad_adapters_leak_files(running, adapters, make_adapter, engine):
    weights = (adapters / "one" / "adapter_model.safetensors").read_bytes()

    def round_of_trouble(server, number):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
            with contextlib.closing(server.post(BODY | {"stream": True, "max_tokens": 100})) as client:
                client.getresponse().read(10)
        cut = make_adapter(adapters / f"cut-{number}")
        (cut / "adapter_model.safetensors").write_bytes(weights[:-50])
        make_adapter(adapters / "two", 1.0 + number)
        for _ in range(2):
            server.service.adapters.scan()
        shutil.rmtree(cut)
        server.service.adapters.scan()
        wait_until(lambda: server.service.in_flight == 0)
        with contextlib.closing(server.post(BODY)) as good:
            assert good.getresponse().status == 200

    with running() as server:
        round_of_trouble(server, 0)
        before = open_files()
        for number in range(1, 4):
            round_of_trouble(server, number)
        wait_until(lambda: open_files() <= before + 2)  # connections that are just being closed


def test_adapters_deleted_or_replaced_while_they_are_read(serving, adapters, make_adapter, engine, monkeypatch):
    add = engine.add_adapters

    def delete_first(directories):
        shutil.rmtree(adapters / "gone")
        return add(directories)

    async def main():
        async with serving() as (client, service):
            before = (await client.post("/v1/completions", json=BODY | {"temperature": 0})).json()
            monkeypatch.setattr(engine, "add_adapters", delete_first)
            make_adapter(adapters / "gone")
            for _ in range(2):
                await asyncio.to_thread(service.adapters.scan)
            listed = {a["name"]: a for a in (await client.get("/v1/adapters")).json()["data"]}
            assert listed["gone"]["error"] and listed["gone"]["digest"] is None
            gone = await client.post("/v1/completions", json=BODY | {"model": "gone"})
            after = (await client.post("/v1/completions", json=BODY | {"temperature": 0})).json()
            await asyncio.to_thread(service.adapters.scan)
            listed = {a["name"] for a in (await client.get("/v1/adapters")).json()["data"]}
            return before, gone, after, listed

    before, gone, after, listed = asyncio.run(main())
    assert gone.status_code == 404 and listed == {"one", "two"}
    assert after["choices"] == before["choices"]


def test_a_worker_thread_that_raises_is_one_calls_error(serving, tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("not foreseen")

    (tmp_path / "root").mkdir()

    async def main():
        async with serving(load_root=tmp_path / "root", scan_seconds=0.01) as (client, _):
            with monkeypatch.context() as patch:
                patch.setattr(AdapterManager, "load", broken)
                patch.setattr(AdapterManager, "scan", broken)
                body = {"lora_name": "x", "lora_path": "x"}
                failed = await client.post("/v1/load_lora_adapter", json=body)
                await asyncio.sleep(0.1)  # the watcher meets it too
            good = await client.post("/v1/completions", json=BODY)
            return failed, good

    failed, good = asyncio.run(main())
    assert failed.status_code == 500 and failed.headers["x-request-id"] in failed.json()["error"]["message"]
    assert "not foreseen" not in failed.text and "not foreseen" in caplog.text
    assert good.status_code == 200
