"""Spans: what a receiver of OTLP gets from a real server, the caller's trace in log and exemplars, and faults."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.datastructures import Headers

from slatewise import VERSION
from slatewise.http.telemetry import open_tracing
from slatewise.http.trace_context import TraceContext, caller_of
from slatewise.metrics import STAGES
from slatewise.ranking.pipeline import Pipeline
from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.support.application import serve
from tests.support.network import free_port
from tests.support.otlp_receiver import ReceivedSpan, Receiver, receive_otlp

USER = "somebody@example.org"
CALLER = "00f067aa0ba902b7"
SERVER, INTERNAL = 2, 1  # kinds of spans in OTLP
UNSET, ERROR = 0, 2  # statuses
BODY: dict[str, Any] = {
    "user": USER,
    "history": {"item_ids": ["1", "2"]},
    "candidates": {"item_ids": ["3", "4", "no-such-item"]},
}
KEY = "key-of-a-client"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receive_otlp() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def client(receiver: Receiver) -> Iterator[httpx.Client]:
    """A server whose environment had the standard variables at its start, and nothing else that concerns spans."""
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("NO_PROXY", "127.0.0.1")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
            patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=shop")
            patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
            patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
            settings = Settings(bundles=DEMO, variants="fp32", api_keys=KEY, slow_ms=1e-6, log_format="json")
            client = stack.enter_context(serve(settings))
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


def parent(trace: str, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{CALLER}-{flags}"}


def trace_of(number: int) -> str:
    return f"{number:032x}"


def span_of(receiver: Receiver, trace: str) -> ReceivedSpan:
    (span,) = receiver.wait_for(lambda span: span.trace_id == trace and span.kind == SERVER)
    return span


def logged(capsys: pytest.CaptureFixture[str], trace: str) -> dict[str, Any]:
    """The line of the request log with this trace."""
    text = ""
    give_up = time.monotonic() + 10
    while f'"{trace}"' not in text:
        assert time.monotonic() < give_up
        text += capsys.readouterr().err
        time.sleep(0.01)
    (line,) = (json.loads(line) for line in text.splitlines() if trace in line)
    return dict(line)


def exemplars(client: httpx.Client, trace: str) -> dict[str, str]:
    """Span ids of the exemplars with this trace, by name of the metric."""
    answer = client.get("/metrics", headers={"Accept": OPENMETRICS})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    return {
        family.name: sample.exemplar.labels["span_id"]
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels["trace_id"] == trace
    }


def test_ranking_is_a_span_with_stages_below_the_caller(client: httpx.Client, receiver: Receiver) -> None:
    before = time.time_ns()
    answer = client.post("/rerank", json=BODY, headers=parent(trace_of(1)))
    span = span_of(receiver, trace_of(1))
    assert (span.name, span.parent_id, span.status) == ("POST /rerank", CALLER, UNSET)
    assert before < span.begin < span.end < time.time_ns()
    stages = receiver.children_of(span)
    assert [stage.name for stage in stages] == [name for name in STAGES if name in {stage.name for stage in stages}]
    assert {"parse", "features", "encode", "score", "serialize"} <= {stage.name for stage in stages}
    assert all(stage.trace_id == span.trace_id and stage.kind == INTERNAL for stage in stages)
    assert [stage.begin for stage in stages] == [span.begin, *(stage.end for stage in stages[:-1])]
    assert stages[-1].end <= span.end
    measured = answer.json()["timings_ms"]
    for stage in stages[:-1]:
        assert (stage.end - stage.begin) / 1e6 == pytest.approx(measured[stage.name], abs=0.002)


def test_attributes_follow_the_convention(client: httpx.Client, receiver: Receiver) -> None:
    client.post("/v2/models/movielens/infer", content=b"{", headers=parent(trace_of(2)))
    client.post("/rerank", json=BODY | {"deadline_ms": 0.001}, headers=parent(trace_of(3)))
    refused = span_of(receiver, trace_of(2))
    assert refused.name == "POST /v2/models/{model}/infer"
    assert refused.attributes["url.path"] == "/v2/models/movielens/infer"
    assert refused.attributes["http.response.status_code"] == 400 and refused.status == UNSET
    assert refused.attributes["error.type"] == "not-json"
    degraded = span_of(receiver, trace_of(3))
    assert (
        degraded.attributes.items()
        >= {
            "http.request.method": "POST",
            "http.route": "/rerank",
            "http.response.status_code": 200,
            "url.scheme": "http",
            "network.protocol.version": "1.1",
            "slatewise.ranker": "movielens",
            "slatewise.exit": "input_order",
            "slatewise.candidates": 3,
        }.items()
    )
    assert degraded.attributes["slatewise.degraded"] == ["deadline"]


def test_resource_names_the_service_and_the_environment(client: httpx.Client, receiver: Receiver) -> None:
    client.post("/score", json=BODY, headers=parent(trace_of(4)))
    resource = span_of(receiver, trace_of(4)).resource
    assert (resource["service.name"], resource["service.version"]) == ("slatewise", VERSION)
    assert resource["deployment.environment.name"] == "test" and resource["service.instance.id"]
    assert receiver.headers[-1]["x-tenant"] == "shop"


def test_fault_of_the_server_is_an_error_span(
    client: httpx.Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Pipeline, "rank", fail)
    assert client.post("/score", json=BODY, headers=parent(trace_of(5))).status_code == 500
    span = span_of(receiver, trace_of(5))
    assert (span.status, span.attributes["error.type"]) == (ERROR, "internal-error")


def test_caller_that_does_not_sample_is_obeyed(
    client: httpx.Client, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    client.post("/score", json=BODY, headers=parent(trace_of(6), "00"))
    client.get("/models", headers=parent(trace_of(6), "00"))
    client.post("/score", json=BODY, headers=parent(trace_of(7)))
    span_of(receiver, trace_of(7))
    assert not [span for span in receiver.spans if span.trace_id == trace_of(6)]
    assert logged(capsys, trace_of(6))["span_id"] != CALLER
    assert exemplars(client, trace_of(6)) == {}


def test_log_and_exemplars_name_the_span(
    client: httpx.Client, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    client.post("/score", json=BODY, headers=parent(trace_of(8)) | {"X-Request-ID": "r-8"})
    span = span_of(receiver, trace_of(8))
    line = logged(capsys, trace_of(8))
    assert (line["id"], line["span_id"]) == ("r-8", span.span_id)
    found = exemplars(client, trace_of(8))
    names = ("request", "ranking", "stage")
    assert found == {f"slatewise_{name}_duration_seconds": span.span_id for name in names}


def test_request_without_a_caller_starts_a_trace(
    client: httpx.Client, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    client.post("/score", json=BODY | {"id": "r-9"})
    (span,) = receiver.wait_for(lambda span: span.kind == SERVER and span.parent_id == "")
    assert logged(capsys, span.trace_id)["id"] == "r-9"


def test_other_routes_have_fastapis_spans(client: httpx.Client, receiver: Receiver) -> None:
    asked = [
        ("GET", "/models/movielens", "GET /models/{ranker}", 200),
        ("GET", "/models/none", "GET /models/{ranker}", 404),
        ("DELETE", f"/users/{USER}", "DELETE /users/{user}", 204),
    ]
    for number, (method, path, _, _) in enumerate(asked, 20):
        client.request(method, path, headers=parent(trace_of(number)))
    for number, (_, _, name, code) in enumerate(asked, 20):
        span = span_of(receiver, trace_of(number))
        assert (span.name, span.parent_id) == (name, CALLER)
        assert span.attributes["http.response.status_code"] == code


def test_refused_key_is_a_span_of_its_route(client: httpx.Client, receiver: Receiver) -> None:
    headers = parent(trace_of(30)) | {"Authorization": "Bearer wrong"}
    assert client.post("/rerank", json=BODY, headers=headers).status_code == 401
    span = span_of(receiver, trace_of(30))
    assert (span.name, span.attributes["http.response.status_code"]) == ("POST /rerank", 401)


def test_probes_have_no_spans(client: httpx.Client, receiver: Receiver) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        assert client.get(path, headers=parent(trace_of(40))).status_code == 200
    client.post("/score", json=BODY, headers=parent(trace_of(41)))
    span_of(receiver, trace_of(41))
    assert not [span for span in receiver.spans if span.trace_id == trace_of(40)]


def test_spans_contain_neither_user_ids_nor_keys(client: httpx.Client, receiver: Receiver) -> None:
    client.request("DELETE", f"/users/{USER}", headers=parent(trace_of(50)))
    client.post("/score", json=BODY, headers=parent(trace_of(51)) | {"X-User-ID": USER})
    span_of(receiver, trace_of(50))
    span_of(receiver, trace_of(51))
    sent = b"".join(receiver.bodies)
    assert b"POST /score" in sent
    assert USER.encode() not in sent and KEY.encode() not in sent and b"secret" not in sent


def test_plain_text_metrics_have_no_exemplars(client: httpx.Client) -> None:
    for accept in ("*/*", "text/plain; version=0.0.4"):
        answer = client.get("/metrics", headers={"Accept": accept})
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "trace_id" not in answer.text and "slatewise_request_duration_seconds_bucket" in answer.text


def test_collector_that_is_down_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(Settings(bundles=DEMO, variants="fp32")) as client:
        assert [client.post("/score", json=BODY).status_code for _ in range(3)] == [200] * 3


def test_caller_is_logged_without_the_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Settings(bundles=DEMO, variants="fp32", slow_ms=1e-6, log_format="json")) as client:
        client.post("/score", json=BODY, headers=parent(trace_of(60)))
        assert logged(capsys, trace_of(60))["span_id"] == CALLER
        assert set(exemplars(client, trace_of(60)).values()) == {CALLER}
        client.post("/score", json=BODY, headers={"traceparent": "wrong"} | {"X-Request-ID": "r-61"})
        assert "trace_id" not in logged(capsys, "r-61")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (f"00-{trace_of(1)}-{CALLER}-01", TraceContext(trace_of(1), CALLER, True)),
        (f"00-{trace_of(1)}-{CALLER}-02", TraceContext(trace_of(1), CALLER, False)),
        (f"cc-{trace_of(1)}-{CALLER}-03-more", TraceContext(trace_of(1), CALLER, True)),
        (f"00-{trace_of(1)}-{CALLER}-01-more", None),
        (f"ff-{trace_of(1)}-{CALLER}-01", None),
        (f"00-{trace_of(0)}-{CALLER}-01", None),
        (f"00-{trace_of(1)}-{'0' * 16}-01", None),
        (f"00-{trace_of(1).replace('1', 'A')}-{CALLER}-01", None),
        (f"00-{trace_of(1)}-{CALLER}", None),
        ("", None),
    ],
)
def test_traceparent_is_read_as_the_standard_says(given: str, expected: TraceContext | None) -> None:
    assert caller_of(Headers({"traceparent": given})) == expected


def test_two_traceparents_are_none() -> None:
    one = (b"traceparent", parent(trace_of(1))["traceparent"].encode())
    assert caller_of(Headers(raw=[one])) is not None
    assert caller_of(Headers(raw=[one, one])) is None and caller_of(Headers(raw=[])) is None


@pytest.mark.parametrize(
    ("variables", "warned"),
    [
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf",
        ),
    ],
)
def test_environment_that_wants_no_spans_gets_none(
    variables: dict[str, str], warned: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert open_tracing() is None
    assert warned in caplog.text and bool(caplog.text) == bool(warned)
