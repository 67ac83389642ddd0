"""Spans of the requests to hot routes, made when a request ends, from its timings. FastAPI makes those of other routes.

This file needs the extra `otel`. The exporter, the sampler and the resource follow OpenTelemetry's own variables.

Called by: `telemetry.py`, if the environment asks for spans; `rank.py` and `auth.py` through the application's state.
Calls: the SDK of OpenTelemetry.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Span as AnySpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode
from starlette.datastructures import Headers
from starlette.types import Scope

from slatewise import VERSION, metrics
from slatewise.http.request_log import Outcome
from slatewise.http.trace_context import TraceContext
from slatewise.ranking.trace import Trace

USERS = "/users/"  # paths that contain the id of a user
PATIENCE_SECONDS = 2.0  # time to export the last spans when the server ends


class HideUsers(SpanProcessor):
    """Takes the user id out of the path that FastAPI notes in its spans. The route has the rest."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if str((span.attributes or {}).get("url.path", "")).startswith(USERS):
            span.set_attribute("url.path", f"{USERS}...")


class Tracing:
    """Makes spans and exports them in a thread of its own, in batches."""

    def __init__(self) -> None:
        self.provider = TracerProvider(resource=resource(), shutdown_on_exit=False)
        self.provider.add_span_processor(HideUsers())
        self.batches = BatchSpanProcessor(OTLPSpanExporter())
        self.provider.add_span_processor(self.batches)
        self.scope = InstrumentationScope("slatewise", VERSION)
        self.tracer = self.provider.get_tracer("slatewise", VERSION)

    def start(self, scope: Scope, headers: Headers, route: str, seconds: float) -> AnySpan:
        """Start the span of a request that has ended after `seconds`. The sampler decides whether it is recorded."""
        return self.tracer.start_span(
            f"{scope['method']} {route}",
            propagate.extract(headers),
            SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "http.route": route,
                "url.path": scope["path"],
                "url.scheme": scope["scheme"],
                "network.protocol.version": scope["http_version"],
            },
            start_time=time.time_ns() - int(seconds * 1e9),
        )

    def context(self, span: AnySpan) -> TraceContext:
        """Return the ids of a span, also of one that is not recorded."""
        context = span.get_span_context()
        return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled)

    def finish(self, span: AnySpan, outcome: Outcome, trace: Trace) -> None:
        """End the span with its attributes, and add one for each stage. Does nothing if the span is not recorded."""
        if not isinstance(span, Span) or span.start_time is None:
            return
        span.set_attributes(attributes_of(outcome, trace))
        if outcome.failed:
            span.set_status(Status(StatusCode.ERROR, outcome.refusal))
        for name, begin, end in stage_times(span.start_time, trace):
            self.batches.on_end(self.child(span, name, begin, end))
        span.end(span.start_time + int(outcome.seconds * 1e9))

    def child(self, span: Span, name: str, begin: int, end: int) -> ReadableSpan:
        """Make a finished span: a fifth of the time that starting and ending one takes."""
        parent = span.get_span_context()
        identifier = self.provider.id_generator.generate_span_id()
        context = SpanContext(parent.trace_id, identifier, False, parent.trace_flags, parent.trace_state)
        return ReadableSpan(
            name,
            context,
            parent,
            self.provider.resource,
            start_time=begin,
            end_time=end,
            instrumentation_scope=self.scope,
        )

    def close(self) -> None:
        """Export the last spans, but do not wait long for a collector that does not answer."""
        thread = threading.Thread(target=self.provider.shutdown, name="slatewise-spans", daemon=True)
        thread.start()
        thread.join(PATIENCE_SECONDS)


def attributes_of(outcome: Outcome, trace: Trace) -> dict[str, Any]:
    """Return the attributes of a server span: those of the convention, and ours, without user ids and keys."""
    labels = outcome.labels
    attributes: dict[str, Any] = {"http.response.status_code": int(labels["code"])}
    if outcome.refusal:
        attributes["error.type"] = outcome.refusal
    if outcome.degraded:
        attributes["slatewise.degraded"] = outcome.degraded
    if outcome.candidates is not None:
        attributes["slatewise.candidates"] = outcome.candidates
    if trace.ranker is not None:
        attributes |= {
            "slatewise.ranker": labels["ranker"],
            "slatewise.version": int(labels["version"]),
            "slatewise.variant": labels["variant"],
            "slatewise.exit": trace.exit,
            "slatewise.history.events": trace.history.used,
            "slatewise.history.cache": trace.history.cache,
        }
        if trace.meta is not None:
            attributes["slatewise.meta_embedding"] = trace.meta
    return attributes


def stage_times(start: int, trace: Trace) -> list[tuple[str, int, int]]:
    """Return name, begin and end (nanoseconds) of each stage, one after another in the order of `metrics.STAGES`.

    A stage that ran in several parts is shown as one, because only its sum is measured.
    """
    times = []
    for stage in metrics.STAGES:
        if (seconds := trace.timings.seconds.get(stage)) is not None:
            end = start + int(seconds * 1e9)
            times.append((stage, start, end))
            start = end
    return times


def resource() -> Resource:
    """Return the attributes of this server. Those in OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence."""
    given = OTELResourceDetector().detect().attributes
    ours = {"service.name": "slatewise", "service.version": VERSION, "service.instance.id": str(uuid.uuid4())}
    return Resource.create({name: value for name, value in ours.items() if name not in given})
