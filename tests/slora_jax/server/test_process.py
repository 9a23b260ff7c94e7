"""``slora-jax serve`` as a process: killed, started again, told to stop."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

from slora_jax.cli import main as cli


def call(port: int, path: str, body: dict | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = None if body is None else json.dumps(body)
    headers = {"content-type": "application/json", "connection": "close"}
    connection.request("GET" if body is None else "POST", path, data, headers)
    return connection.getresponse()


def start(port: int, *args) -> subprocess.Popen:
    options = ["--port", port, "--max-seqs", 4, "--page-pool", "1M", "--warm-up", "none", "--quiet"]
    options += ["--seq-buckets", "1,4", "--token-buckets", "16,256", "--prompt-gap", "2", *args]
    command = [sys.executable, "-W", "error", "-m", "slora_jax", "serve", "random:tiny-gqa", *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        try:
            with call(port, "/ready") as response:
                if response.status == 200:
                    return process
        except OSError:
            pass
        time.sleep(0.05)


def test_kill_restart_and_stop(tmp_path, adapters, make_adapter):
    make_adapter(tmp_path / "root" / "mine")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = ["--adapters", adapters, "--load-root", tmp_path / "root", "--registry", tmp_path / "registry.json"]
    process = start(port, *options)
    try:
        with call(port, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "mine"}) as response:
            assert response.status == 200
    finally:
        process.kill()
        process.communicate()
    process = start(port, *options)
    try:
        body = {"model": "x", "prompt": [1, 2, 3], "max_tokens": 300, "ignore_eos": True, "stream": True}
        body["return_tokens_as_token_ids"] = True
        with call(port, "/v1/completions", body | {"logprobs": 0}) as stream:
            stream.readline()
            process.send_signal(signal.SIGTERM)
            assert stream.read().decode().endswith("data: [DONE]\n\n")
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in errors.splitlines()]
    messages = [line["message"] for line in lines]
    assert messages[0] == "listening" and "ready" in messages and "draining" in messages
    request = next(line for line in lines if line["message"] == "request" and line["path"] == "/v1/completions")
    assert request["model"] == "x" and request["status"] == 200


def test_bad_settings_are_one_line(capsys, tmp_path):
    assert cli(["serve", "random:tiny-gqa", "--host", "0.0.0.0"]) == 2
    assert "give --api-keys FILE" in capsys.readouterr().err
    assert cli(["serve", "random:tiny-gqa", "--adapters", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
