"""Where the time of calls goes: spans, and the seconds of each phase."""

import gzip
import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from threading import Thread

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.serving.server.test_server import serving, unlabelled, version
from torchrec_amort.serving.server.call import Call
from torchrec_amort.serving.server.traces import Traces
from torchrec_amort.serving.versions import Versions

PHASES = ["read", "wait", "score", "write"]
TRACE, CALLER = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
PARENT = {"traceparent": f"00-{TRACE:032x}-{CALLER:016x}-01"}


def test_a_call_has_a_span_in_its_callers_trace_and_one_of_each_phase() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    asked = unlabelled()
    with serving(Versions(version("monday")), trace=Traces(provider).add) as client:
        for path, body in (
            ("/v1/score", {"requests": asked}),
            ("/v1/score", {"requests": [asked[0] | {"candidate_item": [10**9]}]}),
        ):
            client.http.post(path, json=body, headers=PARENT)
        told = client.http.get("/metrics").text
    spans = exporter.get_finished_spans()
    *parts, whole, refused = spans
    assert [span.name for span in spans] == [*PHASES, "score", "score"]
    for span in (whole, refused):
        assert span.context is not None and span.parent is not None
        assert (span.context.trace_id, span.parent.span_id) == (TRACE, CALLER)
    candidates = sum(len(request["candidate_item"]) for request in asked)
    assert whole.attributes == {"protocol": "score", "result": "ok", "candidates": candidates, "version": "monday"}
    assert refused.attributes == {"protocol": "score", "result": "bad_input", "candidates": 0}
    assert not refused.status.is_ok
    # One after the other, from the call's beginning to its end.
    assert times_of(parts[0])[0] == times_of(whole)[0]
    assert all(times_of(one)[1] == times_of(two)[0] for one, two in pairwise(parts))
    assert abs(times_of(parts[-1])[1] - times_of(whole)[1]) < 10
    assert re.findall(r'amort_phase_seconds_count\{phase="(\w+)"\} (\S+)', told) == [(phase, "1.0") for phase in PHASES]


def times_of(span: ReadableSpan) -> tuple[int, int]:
    """When it began and ended, in nanoseconds."""
    assert span.start_time is not None and span.end_time is not None and span.start_time <= span.end_time
    return span.start_time, span.end_time


def test_a_collector_gets_what_was_not_sent_when_the_server_ends() -> None:
    bodies = list[bytes]()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        Thread(target=collector.serve_forever, daemon=True).start()
        traces = Traces.to(f"http://127.0.0.1:{collector.server_port}/v1/traces", "films")
        traces.add(Call("grpc", {}))
        traces.close()
        collector.shutdown()
    (resource,) = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans
    named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert named["service.name"] == "films"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["score"]
