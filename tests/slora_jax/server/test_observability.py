"""Metrics, the dashboard that draws them, and traces."""

import asyncio
import json
from pathlib import Path
import re

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from slora_jax import SamplingParams
from slora_jax.requests import Completion, RequestOutput, Timings
from slora_jax.server.metrics import Metrics, Snapshot
from slora_jax.server.tracing import Tracing

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"
TIERS = {
    "pages": dict(hits=7, misses=2, loads=3, evictions=1, adapters=4),
    "host": dict(loads=4, evictions=1, adapters=3, bytes=1000, budget=2000),
    "disk": dict(reads=5, failures=1, load_seconds=0.5),
}


def an_output() -> RequestOutput:
    done = Completion(0, "hi", [1, 2, 3], None, "stop")
    timings = Timings(1.0, scheduled=1.5, first_token=2.0, finished=4.0)
    return RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=[1, 2], adapter="one", adapter_digest="d",
        completions=[done], prompt_logprobs=None, timings=timings,
    )  # fmt: skip


def snapshot(engine) -> Snapshot:
    requests = [
        dict(request_id="a", adapter="one", state="running", prompt_tokens=1, generated_tokens=1),
        dict(request_id="b", adapter="two", state="waiting", prompt_tokens=1, generated_tokens=0),
    ]
    return Snapshot(
        stats=engine.stats() | {"adapter_tiers": TIERS}, requests=requests, adapters=[], num_adapters=2, pages=[],
        max_seqs=8, load_seconds=0.1, loads=2, failures=1,
    )  # fmt: skip


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_what_ended_and_what_is_are_told(engine):
    metrics = Metrics("tiny")
    for i in range(150):
        metrics.finished(an_output(), f"tenant-{i}")
    metrics.refused("queue_full")
    metrics.responded(200)
    got = values(metrics.render(snapshot(engine)).decode())
    assert got["slora_time_to_first_token_seconds_sum", ()] == 150
    assert got["slora_queue_seconds_sum", ()] == 75
    assert got["slora_generated_tokens_total", (("tenant", "tenant-0"),)] == 3
    assert got["slora_generated_tokens_total", (("tenant", "other"),)] == 3 * 50  # labels are bounded
    assert got["slora_adapter_hits_total", (("tier", "device"),)] == 7
    assert (got["slora_adapters", ()], got["slora_adapters_resident", ()]) == (2, 4)
    assert got["slora_adapter_loads_total", (("tier", "host"),)] == 4
    assert got["slora_adapter_load_seconds_total", (("tier", "disk"),)] == 0.5
    parts = {dict(labels)["part"] for name, labels in got if name == "slora_step_host_seconds_total"}
    assert parts == {"plan", "adapters", "build", "dispatch", "wait", "collect"}
    assert got["slora_step_device_seconds_total", ()] == engine.stats()["step_seconds"]["device"]
    (labels,) = [dict(labels) for name, labels in got if name == "vllm:lora_requests_info"]
    assert labels == {"max_lora": "8", "running_lora_adapters": "one", "waiting_lora_adapters": "two"}


def test_every_metric_of_the_dashboard_exists(engine):
    metrics = Metrics("tiny")
    metrics.finished(an_output(), "t")
    metrics.refused("queue_full")
    metrics.responded(200)
    there = {name for name, _ in values(metrics.render(snapshot(engine)).decode())}
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    used = set()
    for panel in dashboard["panels"]:
        assert panel["targets"]
        for target in panel["targets"]:
            used |= set(re.findall(r"\b(?:slora_|vllm:)\w+", target["expr"]))
    assert len(used) > 20 and used <= there, used - there
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_a_call_is_a_span_of_the_callers_trace(serving):
    spans = InMemorySpanExporter()

    async def main():
        async with serving() as (client, service):
            edge = client._transport.app
            while not hasattr(edge, "_tracing"):  # the middleware is built at the first call
                await client.get("/health")
                edge = getattr(edge, "middleware_stack", None) or edge.app
            edge._tracing = Tracing(SimpleSpanProcessor(spans))
            headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
            body = {"model": "one", "prompt": "a secret", "max_tokens": 3}
            await client.post("/v1/completions", json=body, headers=headers)
            await client.post("/v1/completions", json=body | {"model": "nobody"})
            await client.get("/health")
            await client.get("/some/stranger's/path")

    asyncio.run(main())
    first, second, third = spans.get_finished_spans()
    assert first.name == "POST /v1/completions"
    assert f"{first.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    attributes = dict(first.attributes)
    assert attributes["gen_ai.request.model"] == "one" and attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.usage.input_tokens"] == 8 and attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["gen_ai.latency.time_to_first_token"] > 0
    assert second.attributes["http.response.status_code"] == 404
    assert third.name == "GET other"
    assert "secret" not in str([span.to_json() for span in (first, second, third)])


def test_the_log_has_what_an_answer_cost(serving, caplog):
    caplog.set_level("INFO")

    async def main():
        async with serving() as (client, _):
            body = {"model": "two", "prompt": "hello", "max_tokens": SamplingParams().max_tokens}
            await client.post("/v1/completions", json=body | {"stream": True})

    asyncio.run(main())
    (line,) = [r.fields for r in caplog.records if getattr(r, "fields", {}).get("path") == "/v1/completions"]
    assert (line["model"], line["status"], line["prompt_tokens"], line["answer_tokens"]) == ("two", 200, 5, 128)
    assert line["ttft_seconds"] > 0 and line["request_id"]
