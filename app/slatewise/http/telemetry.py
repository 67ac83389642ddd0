"""Whether spans are made: by OpenTelemetry's variables alone. An environment without them costs a request nothing.

Called by: `app.py`. Calls: `tracing.py`, only if the environment asks for spans.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi.telemetry import TelemetryConfig
from starlette.types import Scope

if TYPE_CHECKING:
    from slatewise.http.tracing import Tracing

log = logging.getLogger("slatewise")
PROTOCOL = "http/protobuf"
OFF: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def variable(name: str, default: str = "") -> str:
    """Return a variable of the environment. An empty one counts as not set, as the standard says."""
    return os.environ.get(name, "").strip() or default


def open_tracing() -> Tracing | None:
    """Return the tracing that the environment asks for. Without its packages, or with wrong values: a warning."""
    if not variable("OTEL_EXPORTER_OTLP_ENDPOINT") and not variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return None
    exporter = variable("OTEL_TRACES_EXPORTER", "otlp").lower()
    if variable("OTEL_SDK_DISABLED").lower() == "true" or exporter == "none":
        return None
    protocol = variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", variable("OTEL_EXPORTER_OTLP_PROTOCOL", PROTOCOL))
    if exporter != "otlp":
        log.warning("no spans: OTEL_TRACES_EXPORTER is %s; otlp and none are known", exporter)
        return None
    if protocol != PROTOCOL:
        log.warning("no spans: the protocol of OTLP is %s; set OTEL_EXPORTER_OTLP_PROTOCOL=%s", protocol, PROTOCOL)
        return None
    try:
        from slatewise.http.tracing import Tracing

        return Tracing()
    except ModuleNotFoundError as error:
        remedy = "pip install 'slatewise[otel]' (in a clone: pip install '.[otel]')"
        log.warning("no spans: OTEL_EXPORTER_OTLP_ENDPOINT is set, but %s is missing; run: %s", error.name, remedy)
    except ValueError as error:  # of the SDK, for a value of a variable
        log.warning("no spans: %s", error)
    return None


def fastapi_telemetry(tracing: Tracing | None, exclude: Callable[[Scope], bool]) -> TelemetryConfig:
    """Return the settings of FastAPI's own telemetry: spans of requests alone.

    Its logs would export messages and tracebacks, and Prometheus has the metrics.
    """
    if tracing is None:
        return OFF
    return {
        **OFF,
        "tracing": True,
        "tracer_provider": tracing.provider,
        "operation_spans": False,
        "exclude": exclude,
    }
