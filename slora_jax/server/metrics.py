"""Prometheus metrics. What happened is counted as it happens; what is, is asked of the engine when somebody scrapes.

The gauges that LoRA-aware routers read have vLLM's names (Gateway API inference extension, proposal 003).
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pallas_kernels.geometry import PAGE_TOKENS
from slora_jax.requests import EmbeddingOutput, RequestOutput

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MAX_TENANTS = 100
_TPOT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The engine and its adapters at one moment.

    stats: of Engine.stats. requests: of Engine.list_requests. adapters: of AdapterManager.describe, some of
    num_adapters that are served. pages: of Engine.page_map. max_seqs: completions the engine runs at once.
    """

    stats: Mapping[str, Any]
    requests: Sequence[Mapping[str, Any]]
    adapters: Sequence[Mapping[str, Any]]
    num_adapters: int
    pages: Sequence[str | None]
    max_seqs: int
    load_seconds: float
    loads: int
    failures: int


class Metrics:
    """The metrics of one server. Labels are few: the first tenants by name and "other" for more, adapters only while
    they are used.
    """

    def __init__(self, model_name: str):
        self._model = model_name
        self._registry = CollectorRegistry()
        self._snapshot: Snapshot | None = None
        self._tenants: set[str] = set()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"slora_{name}", text, buckets=buckets, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"slora_{name}", text, labels, registry=self._registry)

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token", _SECONDS)
        self._tpot = histogram("time_per_output_token_seconds", "Mean time between an answer's tokens", _TPOT)
        self._latency = histogram("request_latency_seconds", "From arrival to the end of the answer", _SECONDS)
        self._queued = histogram("queue_seconds", "From arrival to the first step", _SECONDS)
        self._ended = counter("completions", "Completions by how they ended", "tenant", "finish_reason")
        self._embedded = counter("embeddings", "Texts made vectors, by how they ended", "tenant", "result")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "tenant")
        self._answer_tokens = counter("generated_tokens", "Tokens of answers", "tenant")
        self._responses = counter("http_responses", "HTTP responses by status", "status")
        self._refused = counter("refused", "Calls turned away, by error code", "code")
        self._registry.register(_Present(self))

    def finished(self, output: RequestOutput, tenant: str) -> None:
        """Counts a request that has ended, however it did."""
        tenant = self._tenant_label(tenant)
        timings = output.timings
        tokens = sum(len(c.token_ids) for c in output.completions)
        for completion in output.completions:
            self._ended.labels(tenant, completion.finish_reason or "abort").inc()
        self._prompt_tokens.labels(tenant).inc(len(output.prompt_token_ids))
        self._answer_tokens.labels(tenant).inc(tokens)
        if timings.scheduled is not None:
            self._queued.observe(timings.scheduled - timings.arrival)
        if timings.ttft is not None:
            self._ttft.observe(timings.ttft)
        if timings.latency is not None:
            self._latency.observe(timings.latency)
        longest = max(len(c.token_ids) for c in output.completions)
        if longest > 1 and timings.finished is not None and timings.first_token is not None:
            self._tpot.observe((timings.finished - timings.first_token) / (longest - 1))

    def embedded(self, output: EmbeddingOutput, tenant: str) -> None:
        """Counts an embedding that has ended, however it did."""
        tenant = self._tenant_label(tenant)
        self._embedded.labels(tenant, "error" if output.error else "ok").inc()
        self._prompt_tokens.labels(tenant).inc(len(output.prompt_token_ids))
        if output.timings.scheduled is not None:
            self._queued.observe(output.timings.scheduled - output.timings.arrival)

    def _tenant_label(self, tenant: str) -> str:
        if tenant not in self._tenants and len(self._tenants) >= _MAX_TENANTS:
            return "other"  # a key file may be rewritten with new names for ever
        self._tenants.add(tenant)
        return tenant

    def responded(self, status: int) -> None:
        self._responses.labels(str(status)).inc()

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def render(self, snapshot: Snapshot | None) -> bytes:
        """Prometheus' text format. snapshot: None while the engine is not there yet."""
        self._snapshot = snapshot
        return generate_latest(self._registry)

    def present(self) -> Iterable[Metric]:
        """Metrics of the last snapshot."""
        now = self._snapshot
        if now is None:
            return
        stats, pages = now.stats, now.stats["pages"]
        used = GaugeMetricFamily("slora_pages", "Pages of the pool by what they hold", labels=["kind"])
        for kind, count in pages.items():
            used.add_metric([kind], count)
        yield used
        yield GaugeMetricFamily("slora_page_bytes", "Bytes of a page", stats["page_bytes"])
        yield GaugeMetricFamily("slora_adapters", "Adapters that can be asked", now.num_adapters)
        resident = stats["adapter_tiers"]["pages"]["adapters"]
        yield GaugeMetricFamily("slora_adapters_resident", "Adapters in the pool", resident)
        for name in ("steps", "preemptions", "adapter_loads"):
            yield CounterMetricFamily(f"slora_engine_{name}", f"The engine's {name.replace('_', ' ')}", stats[name])
        times = stats["step_seconds"]
        host = CounterMetricFamily("slora_step_host_seconds", "The engine thread's seconds by part", labels=["part"])
        for part, spent in times["host"].items():
            host.add_metric([part], spent)
        yield host
        yield CounterMetricFamily("slora_step_device_seconds", "Seconds in which a step ran", times["device"])
        prefixes = stats["prefix_cache"]
        text = "Prompt tokens that were looked for among kept prefixes"
        yield CounterMetricFamily("slora_prefix_queried_tokens", text, prefixes["prompt_tokens"])
        yield CounterMetricFamily("slora_prefix_hit_tokens", "Those that were found", prefixes["hit_tokens"])
        yield from _tiers(stats.get("adapter_tiers", {}))
        yield CounterMetricFamily("slora_adapter_registrations", "Adapters taken from files", now.loads)
        yield CounterMetricFamily("slora_adapter_registration_failures", "Adapters refused", now.failures)
        yield CounterMetricFamily("slora_adapter_registration_seconds", "Seconds spent checking them", now.load_seconds)
        yield from self._vllm(now)

    def _vllm(self, now: Snapshot) -> Iterable[Metric]:
        stats = now.stats
        gauges = {
            "vllm:num_requests_running": ("Completions running", stats["running"]),
            "vllm:num_requests_waiting": ("Completions waiting", stats["waiting"]),
            # adapters take pages of the same pool; idle ones leave when somebody needs theirs
            "vllm:kv_cache_usage_perc": (
                "Share of pages in use, 0 to 1",
                (stats["pages"]["kv"] + stats["pages"]["adapter"]) / stats["num_pages"],
            ),
        }
        for name, (text, value) in gauges.items():
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        cache = GaugeMetricFamily("vllm:cache_config_info", "The page pool", labels=["block_size", "num_gpu_blocks"])
        cache.add_metric([str(PAGE_TOKENS), str(stats["num_pages"])], 1)
        yield cache
        adapters = {state: set() for state in ("running", "waiting")}  # type: dict[str, set[str]]
        for request in now.requests:
            if request["adapter"] is not None:
                adapters[request["state"]].add(request["adapter"])
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of requests in flight; the value is the time",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        # there are no adapter slots: as many adapters run as completions do
        names = [",".join(sorted(adapters[state])) for state in ("running", "waiting")]
        lora.add_metric([str(now.max_seqs), *names], time.time())
        yield lora


def _tiers(tiers: Mapping[str, Mapping[str, float]]) -> Iterable[Metric]:
    """Hits, loads and evictions of the places where adapters lie: the device's pages, host memory, disk."""
    counts = {
        "hits": "Times an adapter that a request needed was there",
        "misses": "Times it was not",
        "loads": "Times an adapter was brought there",
        "reads": "Adapters read from files",
        "evictions": "Times an adapter had to leave",
        "failures": "Reads that failed",
        "load_seconds": "Seconds spent reading",
    }
    for field, text in counts.items():
        family = CounterMetricFamily(f"slora_adapter_{field}", text, labels=["tier"])
        for tier, values in tiers.items():
            if field in values:
                family.add_metric(["device" if tier == "pages" else tier], values[field])
        if family.samples:
            yield family
    if host := tiers.get("host"):
        yield GaugeMetricFamily("slora_adapter_host_bytes", "Host memory that adapters take", host["bytes"])


class _Present:
    """Metrics that are made when they are scraped."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.present()
