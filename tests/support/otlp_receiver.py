"""A receiver of OTLP over HTTP on loopback, which decodes the spans with the published protocol.

Called by: the tests of tracing and `loadtest/server/tracing.py`. Calls: opentelemetry-proto.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it was sent. Ids are hexadecimal, times are nanoseconds."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    begin: int
    end: int
    status: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Receiver:
    """What arrived so far."""

    url: str
    spans: list[ReceivedSpan] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def wait_for(self, wanted: Callable[[ReceivedSpan], bool], count: int = 1) -> list[ReceivedSpan]:
        """Wait for `count` such spans, and return all of them."""
        give_up = time.monotonic() + 30
        while len(found := [span for span in [*self.spans] if wanted(span)]) < count:
            assert time.monotonic() < give_up, f"{len(found)} of {count} spans; {[span.name for span in self.spans]}"
            time.sleep(0.02)
        return found

    def children_of(self, span: ReceivedSpan) -> list[ReceivedSpan]:
        return sorted((one for one in self.spans if one.parent_id == span.span_id), key=lambda one: one.begin)


def plain(value: AnyValue) -> Any:
    if value.WhichOneof("value") == "array_value":
        return [plain(item) for item in value.array_value.values]
    return getattr(value, value.WhichOneof("value") or "string_value")


def by_key(pairs: Iterator[KeyValue]) -> dict[str, Any]:
    return {pair.key: plain(pair.value) for pair in pairs}


def decode(body: bytes) -> Iterator[ReceivedSpan]:
    for group in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = by_key(iter(group.resource.attributes))
        for scoped in group.scope_spans:
            for span in scoped.spans:
                yield ReceivedSpan(
                    span.name,
                    span.kind,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code,
                    by_key(iter(span.attributes)),
                    resource,
                )


@contextmanager
def receive_otlp() -> Iterator[Receiver]:
    """Receive at a free port, at the path that the standard has: /v1/traces."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            received.bodies.append(body)
            received.headers.append(dict(self.headers))
            received.spans += decode(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
