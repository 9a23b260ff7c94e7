"""The Ray Serve example: two replicas on the CPU, and requests that follow their adapters. Needs the extra ``ray``."""

from collections import defaultdict
import json
import os
from pathlib import Path

from adapter_files import qv_tensors, write_adapter
import httpx
import pytest

from slora_jax.loading import load_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def url(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    monkeypatch.chdir(ROOT)
    from examples.ray_serve.app import build

    config = load_config("random:tiny-gqa")
    for index in range(4):
        tensors = {name: t * (1 + index) for name, t in qv_tensors(config=config).items()}
        write_adapter(tmp_path / "adapters" / f"a{index}", tensors=tensors)
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": environment})
    engine = dict(max_seqs=4, max_step_tokens=32, seq_buckets=[4], token_buckets=[32], page_pool_bytes=1 << 20)
    arguments = dict(model="random:tiny-gqa", adapters=str(tmp_path / "adapters"), engine=json.dumps(engine))
    try:
        serve.run(build(arguments), name="slora", route_prefix="/")
        yield "http://127.0.0.1:8000"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.filterwarnings("default")  # of ray
def test_requests_follow_their_adapters(url):
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    homes, answers = defaultdict(list), defaultdict(set)
    with httpx.Client(base_url=url, timeout=300) as client:
        for _ in range(5):
            for index in range(4):
                answer = client.post("/v1/completions", json=body | {"model": f"a{index}"})
                assert answer.status_code == 200, answer.text
                homes[index].append(answer.headers["x-replica"])
                answers[index].add(tuple(answer.json()["choices"][0]["token_ids"]))
        streamed = client.post("/v1/completions", json=body | {"model": "a1", "stream": True})
        unknown = client.post("/v1/completions", json=body | {"model": "../a1"})
    assert all(len(set(home[1:])) == 1 for home in homes.values()), homes  # the first call may find nobody at home
    assert all(len(tokens) == 1 for tokens in answers.values())  # whichever replica answered
    assert streamed.text.endswith("data: [DONE]\n\n") and streamed.headers["content-type"].startswith("text/event")
    assert unknown.status_code == 404
