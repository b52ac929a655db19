"""A collector made of OpenTelemetry's own protobufs, over gRPC and over HTTP: what it was sent, as spans that a test can ask about."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.support.processes import until

KINDS = {1: "INTERNAL", 2: "SERVER", 3: "CLIENT"}


@dataclass
class Span:
    trace: str
    id: str
    parent: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    failed: bool
    service: str
    attributes: dict[str, Any]
    events: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


class Collector:
    """Keeps every span. `refuse`: answers with an error instead."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.refuse = False
        self.port = self.http_port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def http_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def take(self, request: Any) -> None:
        for resource in request.resource_spans:
            service = next((item.value.string_value for item in resource.resource.attributes if item.key == "service.name"), "")
            for scope in resource.scope_spans:
                self.spans += [_span(span, service) for span in scope.spans]

    def of(self, trace: str, service: str = "penstock") -> list[Span]:
        return [span for span in self.spans if span.trace == trace and span.service == service]

    def tree(self, trace: str) -> tuple[Span, list[Span]]:
        """The request's own span and those below it, in time, once they are there."""
        until(f"trace {trace} is there", lambda: any(span.kind == "SERVER" for span in self.of(trace)), 15, 0.05)
        spans = self.of(trace)
        (server,) = [span for span in spans if span.kind == "SERVER"]
        below = sorted((span for span in spans if span is not server), key=lambda span: span.start_ns)
        assert all(span.parent == server.id for span in below)
        return server, below


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def _span(span: Any, service: str) -> Span:
    attributes = {item.key: _value(item.value) for item in span.attributes}
    events = [event.name for event in span.events]
    kind, failed = KINDS.get(span.kind, str(span.kind)), span.status.code == 2
    return Span(
        span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name, kind, span.start_time_unix_nano,
        span.end_time_unix_nano, failed, service, attributes, events,
    )  # fmt: skip


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    found = Collector()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's own name
            if found.refuse:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no")
            found.take(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces", self.path
            request = trace_service_pb2.ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
            found.take(request)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)  # type: ignore[no-untyped-call]
    found.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.http_port = web.server_address[1]
    serving = threading.Thread(target=web.serve_forever, daemon=True)
    serving.start()
    try:
        yield found
    finally:
        server.stop(0)
        web.shutdown()
        web.server_close()
