"""Traces: spans of calls, by OpenTelemetry."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

from torchrec_amort.serving.server.call import Call


class Traces:
    """A span of each call, in the trace of who called, and one within it of each phase; nothing of what requests have.

    Which traces are kept, the variables of OpenTelemetry say: `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG`.

    Args:
        provider: of the spans.

    Example::

        traces = Traces.to("http://127.0.0.1:4318/v1/traces", "films")
        endpoint = Endpoint("films", versions, service, Metrics(), trace=traces.add)
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("torchrec_amort")

    @classmethod
    def to(cls, address: str, name: str) -> Traces:
        """Traces that a collector gets.

        Args:
            address: where it takes OTLP over HTTP.
            name: of the service, as the collector tells it from others.
        """
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(address)))
        return cls(provider)

    def add(self, call: Call) -> None:
        """Add the spans of a call that has ended."""
        span = self._tracer.start_span(
            "score",
            context=extract(call.headers),
            kind=SpanKind.SERVER,
            attributes={"protocol": call.protocol, "result": call.result, "candidates": call.num_candidates},
            start_time=call.started_ns,
        )
        if call.version is not None:
            span.set_attribute("version", call.version)
        if call.result != "ok":
            span.set_status(Status(StatusCode.ERROR))
        started_ns = call.started_ns
        for phase, seconds in call.phases.items():
            part = self._tracer.start_span(phase, context=set_span_in_context(span), start_time=started_ns)
            started_ns += round(seconds * 1e9)
            part.end(started_ns)
        span.end(call.started_ns + round(call.seconds * 1e9))

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()
