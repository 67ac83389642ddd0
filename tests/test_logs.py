"""The log: every line that a server writes, of every origin, has one format on one stream."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest

from slatewise.logs import JsonFormatter, TextFormatter, fields, make_record
from tests.test_cli import DIRECT, environment

USER = "somebody@example.org"
KEY = "a-key-of-a-client"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
# A server with faults of its own: in a thread, in a destructor, in the ranking of one request; and no SDK of
# OpenTelemetry, as without the extra.
SERVER = """
import logging, sys, threading, warnings
sys.modules["opentelemetry.sdk"] = None
from slatewise import main
from slatewise.http import rank

class Broken:
    def __del__(self):
        raise ValueError("in a destructor")

def fail():
    raise ValueError("in a thread")

def with_faults(parsed, headers, original=rank.with_headers):
    if headers.get("x-request-id") == "broken":
        warnings.warn("a warning\\nof two lines")
        Broken()
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        logging.getLogger("library").warning("%d", "not a number")
        raise ValueError("in a request")
    return original(parsed, headers)

rank.with_headers = with_faults
sys.exit(main.main(["--port", "0", "--variants", "fp32", *sys.argv[1:]]))
"""
VARIABLES = {
    "SLATEWISE_LOG_FORMAT": "json",
    "SLATEWISE_LOG_LEVEL": "debug",
    "SLATEWISE_API_KEYS": KEY,
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
}


def ask(url: str, request_id: str, **more: Any) -> int:
    body = {"user": USER, "candidates": {"item_ids": ["1", "2"]}, **more}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", "X-Request-ID": request_id}
    headers["traceparent"] = f"00-{TRACE}-{SPAN}-00"
    try:
        return int(DIRECT.open(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=30).status)
    except urllib.error.HTTPError as error:
        return error.code


def provoke(url: str) -> None:
    """Make the server write a line of every kind."""
    assert ask(f"{url}/score", "ordinary") == 200
    assert ask(f"{url}/rerank", "degraded", deadline_ms=0.001) == 200
    assert ask(f"{url}/rerank", "refused", ranker="other") == 404
    assert ask(f"{url}/rerank", "broken") == 500
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(b"not HTTP\r\n\r\n")
        while connection.recv(1_000):
            pass


@pytest.fixture(scope="module")
def written() -> tuple[str, str]:
    """Standard output and standard error of a server from its start to its end."""
    command = [sys.executable, "-c", SERVER]
    process = subprocess.Popen(
        command, env=environment(**VARIABLES), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    seen = ""
    try:
        assert process.stderr
        for line in process.stderr:
            seen += line
            if found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
                provoke(found[1])
                process.terminate()
                break
        output, rest = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, seen + rest
    return output, seen + rest


@pytest.fixture(scope="module")
def lines(written: tuple[str, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written[1].splitlines()]


def test_nothing_is_written_to_standard_output(written: tuple[str, str]) -> None:
    assert written[0] == ""


def test_every_line_is_a_json_object_with_the_same_head(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert list(line)[:4] == ["time", "level", "logger", "message"], line
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
        assert line["level"] in ("debug", "info", "warning", "error", "critical")


def test_lines_of_every_origin_are_there(lines: list[dict[str, Any]]) -> None:
    found = {(line["logger"], line["level"], line["message"].split(":")[0]) for line in lines}
    assert ("slatewise", "info", "listening on http") in found
    assert ("slatewise", "error", "unexpected error") in found
    assert ("library", "warning", "%d ('not a number',)") in found
    (warned,) = (line["message"] for line in lines if line["logger"] == "py.warnings")
    assert "UserWarning: a warning of two lines" in warned
    raised = [line["exception"].splitlines()[-1] for line in lines if "exception" in line]
    assert sorted(raised) == [f"ValueError: in a {place}" for place in ("destructor", "request", "thread")]


def test_requests_have_level_and_trace(lines: list[dict[str, Any]]) -> None:
    requests = {line["id"]: line for line in lines if line["logger"] == "slatewise.requests"}
    assert {name: line["level"] for name, line in requests.items()} == {
        "ordinary": "debug",
        "degraded": "warning",
        "refused": "info",
        "broken": "error",
    }
    assert all((line["trace_id"], line["span_id"]) == (TRACE, SPAN) for line in requests.values())
    (unexpected,) = (line for line in lines if line["message"] == "unexpected error")
    assert (unexpected["trace_id"], unexpected["span_id"]) == (TRACE, SPAN)


def test_lines_contain_neither_user_ids_nor_keys(written: tuple[str, str]) -> None:
    assert USER not in written[1] and KEY not in written[1]


def test_missing_extra_is_one_warning_with_its_remedy(lines: list[dict[str, Any]]) -> None:
    (warned,) = (line["message"] for line in lines if line["message"].startswith("no spans"))
    assert "slatewise[otel]" in warned and "opentelemetry.sdk" in warned


def test_failed_start_is_json_too() -> None:
    command = [sys.executable, "-m", "slatewise", "serve", "--threads", "many", "--log-format", "json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (done.returncode, done.stdout, line["level"]) == (1, "", "error")
    assert line["message"].startswith("slatewise serve: error: ")


def test_text_has_fields_as_names_and_values() -> None:
    record = make_record("slatewise.requests", "info", "a request\nof two lines")
    record.__dict__.update(
        fields(
            {
                "id": "r-1",
                "reasons": ["slow", "not-json"],
                "none": None,
                "empty": "",
                "why": 'a "b" c',
                "ms": {"parse": 0.5},
            }
        )
    )
    text = TextFormatter().format(record)
    assert re.fullmatch(r"[\d-]+ [\d:,]+ INFO a request of two lines id=r-1 reasons=slow,not-json why=.*", text)
    assert text.endswith(r'why="a \"b\" c" ms={"parse":0.5}')


def test_text_shows_tracebacks_below_their_line() -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        record = make_record("slatewise", "error", "failed", sys.exc_info())
    first, *rest = TextFormatter().format(record).splitlines()
    assert first.endswith("ERROR failed") and rest[-1] == "ValueError: wrong"


def test_json_is_one_line_of_ascii_for_any_value() -> None:
    record = make_record("slatewise", "info", "caf\xe9\u2028\n")
    record.__dict__.update(fields({"path": logging, "text": "\u2029\n"}))
    line = JsonFormatter().format(record)
    assert line.isascii() and len(line.splitlines()) == 1
    assert json.loads(line)["text"] == "\u2029\n"
