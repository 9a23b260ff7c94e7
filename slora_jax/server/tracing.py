"""OpenTelemetry: a span for each call, with the caller's trace as its parent. Needs the extra ``otel``.

Attributes are those of the call's line in the log, under OpenTelemetry's names where it has one: no prompt, no key.
"""

from collections.abc import Iterator, Mapping
import contextlib
from typing import TYPE_CHECKING, Any

from slora_jax.errors import SloraError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_NAMES = {
    "status": "http.response.status_code",
    "request_id": "slora.request_id",
    "tenant": "slora.tenant",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "answer_tokens": "gen_ai.usage.output_tokens",
    "queue_seconds": "gen_ai.latency.time_in_queue",
    "ttft_seconds": "gen_ai.latency.time_to_first_token",
}


class Tracing:
    """Sends spans where the standard variables OTEL_EXPORTER_OTLP_* say; by default to a collector on this machine.

    SloraError if the packages are not installed. processor: what takes the spans instead.
    """

    def __init__(self, processor: "SpanProcessor | None" = None):
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if processor is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
                from opentelemetry.sdk.trace.export import BatchSpanProcessor

                processor = BatchSpanProcessor(OTLPSpanExporter())
        except ImportError:
            raise SloraError('traces need OpenTelemetry: pip install "slora-jax[otel]"') from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "slora-jax"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("slora_jax")
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def call(self, method: str, path: str, headers: Mapping[str, str], fields: Mapping[str, Any]) -> Iterator[None]:
        """A span around a call. fields: of its line in the log, as they are when it ends."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        context = self._propagator.extract(headers)
        start = {"http.request.method": method, "url.path": path}
        with self._tracer.start_as_current_span(f"{method} {path}", context, SpanKind.SERVER, start) as span:
            try:
                yield
            finally:
                for name, value in fields.items():
                    if name in _NAMES and value is not None:
                        span.set_attribute(_NAMES[name], value)
                if fields.get("status", 0) >= 500:
                    span.set_status(Status(StatusCode.ERROR))

    def close(self) -> None:
        """Sends what is left. Takes at most a few seconds."""
        self._provider.shutdown()
