"""The contract over HTTP, against a real server on a real socket."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from pydantic import TypeAdapter
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from slatewise.bundle.ranker import Ranker
from slatewise.errors import RankingError
from slatewise.http.problems import PROBLEMS
from slatewise.main import build_app
from slatewise.ranking.admission import Admission
from slatewise.schemas import Problem, RankResponse
from slatewise.settings import Settings
from tests.conftest import DEMO, Stop, Tiny, free_port, serve

BOUND = 1e-5
RESPONSE = TypeAdapter(RankResponse)


def ask(client: httpx.Client, body: dict[str, Any], path: str = "/score", **more: Any) -> dict[str, Any]:
    answer = client.post(path, json=body | more)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def by_item(answer: dict[str, Any]) -> dict[str, float]:
    return dict(zip(answer["results"]["item_ids"], answer["results"]["scores"], strict=True))


def assert_problem(answer: httpx.Response, *allowed: int) -> dict[str, Any]:
    assert answer.status_code in allowed, f"{answer.status_code}: {answer.text[:300]}"
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    problem = Problem.model_validate(body)
    assert problem.status == answer.status_code
    assert problem.error == problem.message == problem.detail
    assert "Traceback" not in answer.text
    return body


def assert_alive(client: httpx.Client) -> None:
    assert client.get("/livez").status_code == 200


def test_answers_have_the_documented_shape_and_nothing_else(client: httpx.Client, example: dict[str, Any]) -> None:
    for path in ("/rerank", "/score"):
        answer = client.post(path, json=example)
        RESPONSE.validate_json(answer.content)  # forbids extra members
        assert set(answer.json()["timings_ms"]) >= {"parse", "features", "embed", "queue", "encode", "score", "total"}
        assert "total;dur=" in answer.headers["Server-Timing"]


def test_rerank_is_score_sorted_and_cut(client: httpx.Client, example: dict[str, Any]) -> None:
    scored = ask(client, example)
    ranked = ask(client, example, "/rerank")
    n = len(example["candidates"]["item_ids"])
    assert scored["results"]["index"] == list(range(n))
    assert ranked["results"]["scores"] == sorted(scored["results"]["scores"], reverse=True)
    assert [example["candidates"]["item_ids"][i] for i in ranked["results"]["index"]] == ranked["results"]["item_ids"]
    assert ask(client, example, "/rerank", top_n=3)["results"]["index"] == ranked["results"]["index"][:3]
    assert len(ask(client, example, "/score", top_n=3)["results"]["index"]) == n


def test_duplicates_are_each_ranked(client: httpx.Client, example: dict[str, Any]) -> None:
    item = example["candidates"]["item_ids"][0]
    answer = ask(client, example, candidates={"item_ids": [item, item, item]}, exit="point")
    scores = answer["results"]["scores"]
    assert answer["results"]["item_ids"] == [item] * 3 and scores == pytest.approx([scores[0]] * 3, abs=BOUND)


def test_ids_may_be_integers_beyond_64_bits_only_as_strings(client: httpx.Client, example: dict[str, Any]) -> None:
    ids = [int(i) for i in example["candidates"]["item_ids"]]
    assert by_item(ask(client, example)) == by_item(
        ask(client, example, candidates=example["candidates"] | {"item_ids": ids})
    )
    assert ask(client, example, candidates={"item_ids": [2**63, -1, 0, 18446744073709551615]})[
        "unknown_candidates"
    ] == [0, 1, 2, 3]
    assert_problem(client.post("/score", json=example | {"candidates": {"item_ids": [2**70]}}), 422)
    mixed: list[Any] = [str(i) if k % 2 else i for k, i in enumerate(ids)]
    found = ask(client, example, candidates=example["candidates"] | {"item_ids": mixed})["results"]
    assert found["item_ids"] == example["candidates"]["item_ids"], "the answer has them as text"


def test_unknown_items_are_flagged_ranked_and_described_by_fields(
    client: httpx.Client, example: dict[str, Any]
) -> None:
    ids = [*example["candidates"]["item_ids"][:3], "no-such-item", "nor-this"]
    plain = ask(client, example, candidates={"item_ids": ids}, exit="point")
    assert plain["unknown_candidates"] == [3, 4] and len(plain["results"]["scores"]) == 5
    assert plain["results"]["scores"][3] == plain["results"]["scores"][4]
    fields = {
        "genres": [None, None, None, ["Comedy", "never heard of"], None],
        "decade": [None, None, None, "1990s", None],
    }
    described = ask(client, example, candidates={"item_ids": ids, "fields": fields}, exit="point")
    assert described["results"]["scores"][3] != plain["results"]["scores"][3]
    assert described["results"]["scores"][4] == pytest.approx(plain["results"]["scores"][4], abs=BOUND)


def test_every_member_is_used(client: httpx.Client, example: dict[str, Any]) -> None:
    base = by_item(ask(client, example, user="fresh-0"))
    history = example["history"]
    candidates = example["candidates"]
    changes: dict[str, dict[str, Any]] = {
        "item_ids": {"history": history | {"item_ids": history["item_ids"][::-1]}},
        "actions": {"history": history | {"actions": ["hate"] * len(history["item_ids"])}},
        "timestamps": {"history": history | {"timestamps": [t * 2 for t in history["timestamps"]]}},
        "request_time": {"request_time": example["request_time"] + 40_000},
        "head_weights": {"head_weights": {"like": 1.0}},
        "exit": {"exit": "dot"},
        "user": {"user": example["user"]},
    }
    for name, column in candidates["features"].items():
        changes[name] = {
            "candidates": candidates | {"features": candidates["features"] | {name: [v + 1 for v in column]}}
        }
    for k, (name, change) in enumerate(changes.items()):
        other = by_item(ask(client, example | {"user": f"fresh-{k + 1}"} | change))
        assert max(abs(base[i] - other[i]) for i in base) > BOUND, name


def test_an_offset_moves_the_window(client: httpx.Client, example: dict[str, Any]) -> None:
    """128 events are read at most, from a multiple of 64."""
    many = {name: (column * 10)[:200] for name, column in example["history"].items()}
    many["timestamps"] = sorted(many["timestamps"])
    for offset, first in (
        (0, 128),
        (8, 120),
        (56, 72),
        (60, 132),
    ):  # the last 128 of 200 begin at 72; 60 + 72 = 132 is past 128
        answer = ask(client, example, history=many | {"offset": offset}, user=f"offset-{offset}")
        assert (answer["history"]["used"], answer["history"]["dropped"]) == (200 - first, first)


def test_ids_of_request_and_user_come_either_way(client: httpx.Client, example: dict[str, Any]) -> None:
    answer = client.post("/rerank", json=example | {"id": "r-81f4"})
    assert answer.json()["id"] == answer.headers["X-Request-ID"] == "r-81f4"
    answer = client.post("/rerank", json=example, headers={"X-Request-ID": "r-2"})
    assert answer.json()["id"] == answer.headers["X-Request-ID"] == "r-2"
    without = {k: v for k, v in example.items() if k != "user"}
    answer = client.post("/score", json=without, headers={"X-User-ID": example["user"]})
    assert answer.json()["meta_embedding"]["status"] == "hit"
    assert_problem(client.post("/score", json=example, headers={"X-User-ID": "another"}), 422)
    number = client.post("/score", json=without | {"user": 6040}, headers={"X-User-ID": "6040"})
    assert number.status_code == 200, "an integer is its decimal string, in the body as in the header"
    problem = assert_problem(client.post("/score", json=example | {"id": "r-3", "ranker": "none"}), 404)
    assert problem["request_id"] == "r-3"
    assert_problem(client.post("/score", json=example, headers={"X-Request-ID": "x" * 300}), 422)


BAD: list[tuple[str, bytes, int]] = [
    ("empty", b"", 400),
    ("not JSON", b"{oops", 400),
    ("not UTF-8", b'{"user": "\xff\xfe"}', 400),
    ("lone surrogate", b'{"candidates": {"item_ids": ["\\ud800"]}}', 400),
    ("NaN", b'{"candidates": {"item_ids": ["1"]}, "request_time": NaN}', 422),
    ("too large for a double", b'{"candidates": {"item_ids": ["1"]}, "request_time": 1e400}', 422),
    ("array", b"[]", 422),
    ("number", b"1", 422),
    ("brackets", b"[" * 100_000, 400),
    ("objects", b'{"a":' * 50_000, 400),
    ("50,000 digits", b'{"candidates": {"item_ids": ["1"]}, "top_n": ' + b"9" * 50_000 + b"}", 400),
    ("no candidates", b'{"candidates": {"item_ids": []}}', 422),
    ("no candidates member", b"{}", 422),
    ("null candidates", b'{"candidates": null}', 422),
    ("boolean id", b'{"candidates": {"item_ids": [true]}}', 422),
    ("float id", b'{"candidates": {"item_ids": [1.5]}}', 422),
    ("null id", b'{"candidates": {"item_ids": [null]}}', 422),
    ("empty id", b'{"candidates": {"item_ids": [""]}}', 422),
    ("long id", b'{"candidates": {"item_ids": ["' + b"x" * 100_000 + b'"]}}', 422),
    ("misspelt", b'{"candidates": {"item_ids": ["1"]}, "candidatez": 1}', 422),
    ("string number", b'{"candidates": {"item_ids": ["1"]}, "top_n": "3"}', 422),
    ("negative top_n", b'{"candidates": {"item_ids": ["1"]}, "top_n": -1}', 422),
    ("top_n 0", b'{"candidates": {"item_ids": ["1"]}, "top_n": 0}', 422),
    ("negative time", b'{"candidates": {"item_ids": ["1"]}, "request_time": -1}', 422),
    ("milliseconds", b'{"candidates": {"item_ids": ["1"]}, "request_time": 1700000000000}', 422),
    ("deadline 0", b'{"candidates": {"item_ids": ["1"]}, "deadline_ms": 0}', 422),
    ("exit", b'{"candidates": {"item_ids": ["1"]}, "exit": "none"}', 422),
    ("text feature", b'{"candidates": {"item_ids": ["1"], "features": {"year": ["x"]}}}', 422),
    ("infinite feature", b'{"candidates": {"item_ids": ["1"], "features": {"year": [1e999]}}}', 422),
    ("control characters in the id", b'{"candidates": {"item_ids": ["1"]}, "id": "a\\r\\nX: 1"}', 422),
    ("no head weights", b'{"candidates": {"item_ids": ["1"]}, "head_weights": {}}', 422),
    (
        "a value a thousand times",
        b'{"candidates": {"item_ids": ["1"], "fields": {"genres": [[' + b'"x",' * 1000 + b'"x"]]}}}',
        422,
    ),
    (
        "numbers for values",
        b'{"candidates": {"item_ids": ["1"], "fields": {"genres": [[' + b"0," * 200_000 + b"0]]}}}",
        422,
    ),
    ("thousands of unknown members", b"{" + b",".join(b'"m%d":0' % k for k in range(50_000)) + b"}", 422),
    (
        "thousands of unknown heads",
        b'{"candidates": {"item_ids": ["1"]}, "head_weights": {'
        + b",".join(b'"m%d":0' % k for k in range(50_000))
        + b"}}",
        422,
    ),
    ("negative offset", b'{"candidates": {"item_ids": ["1"]}, "history": {"offset": -1}}', 422),
]


@pytest.mark.parametrize(("what", "body", "status"), BAD, ids=[what for what, _, _ in BAD])
def test_bad_bodies_are_refused_with_a_reason(client: httpx.Client, what: str, body: bytes, status: int) -> None:
    for path in ("/rerank", "/score"):
        problem = assert_problem(client.post(path, content=body, headers={"Content-Type": "application/json"}), status)
        assert len(json.dumps(problem)) < 5_000
        if status == 422:
            assert problem["errors"] and all(
                e["pointer"] == "" or e["pointer"].startswith("/") for e in problem["errors"]
            )


def test_a_fault_is_pointed_at(client: httpx.Client, example: dict[str, Any]) -> None:
    problem = assert_problem(client.post("/score", json=example | {"candidates": {"item_ids": ["1", True]}}), 422)
    assert [e["pointer"] for e in problem["errors"]] == ["/candidates/item_ids/1"]
    problem = assert_problem(client.post("/score", json=example | {"candidates": {"item_ids": ["1"] * 2001}}), 422)
    assert "2001 candidates, limit 2000" in problem["detail"]
    problem = assert_problem(client.post("/score", json=example | {"history": {"item_ids": ["1"] * 1001}}), 422)
    assert "limit 1000" in problem["detail"]


def test_bodies_are_bounded_as_sent_and_inflated(client: httpx.Client, example: dict[str, Any]) -> None:
    body = json.dumps(example).encode()
    kind = {"Content-Type": "application/json"}
    packed = client.post("/score", content=gzip.compress(body), headers=kind | {"Content-Encoding": "gzip"})
    assert by_item(packed.json()) == by_item(ask(client, example))
    assert_problem(client.post("/score", content=b" " * 1_000_001, headers=kind), 413)
    assert_problem(client.post("/score", content=iter([b" " * 100_000] * 11), headers=kind), 413)  # chunked, no length
    bomb = gzip.compress(b" " * 50_000_000)
    assert_problem(client.post("/score", content=bomb, headers=kind | {"Content-Encoding": "gzip"}), 413)
    assert_problem(
        client.post("/score", content=gzip.compress(body)[:-5], headers=kind | {"Content-Encoding": "gzip"}), 400
    )
    assert_problem(client.post("/score", content=body, headers=kind | {"Content-Encoding": "br"}), 415)
    assert_problem(client.post("/score", content=body, headers={"Content-Type": "text/plain"}), 415)


def test_a_request_to_upgrade_is_told_to_stay_with_http_1(client: httpx.Client, example: dict[str, Any]) -> None:
    """As Java's HttpClient asks by default; the HTTP parser drops the body then."""
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}
    problem = assert_problem(client.post("/score", json=example, headers=headers), 400)
    assert "Upgrade" in problem["detail"]
    ask(client, example)


def test_paths_and_methods_that_do_not_exist_are_problems_too(client: httpx.Client) -> None:
    assert_problem(client.get("/no-such-path"), 404)
    assert_problem(client.get("/rerank"), 405)
    assert_problem(client.get("/models/none"), 404)
    assert_problem(client.get("/admin/anything"), 404)
    assert_problem(
        client.post("/rerank/", json={}, headers={"Host": "elsewhere.example"}), 404
    )  # no redirect to a host of the client's choice


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_replaces_a_member_the_answer_is_a_ranking_or_a_problem(
    client: httpx.Client, example: dict[str, Any], data: st.DataObject
) -> None:
    body = json.loads(json.dumps(example))
    place: Any = body
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    answer = client.post(
        "/score",
        content=json.dumps(body).encode("utf-8", "surrogatepass"),
        headers={"Content-Type": "application/json"},
    )
    if answer.status_code == 200:
        RESPONSE.validate_json(answer.content)
    else:
        assert_problem(answer, 400, 404, 413, 422)
    assert_alive(client)


def test_the_openapi_document_holds_against_generated_requests(client: httpx.Client) -> None:
    """schemathesis: no undocumented status or content type, no server error, no bad data accepted, for every operation.

    Good data may be refused: a schema cannot say that columns have one length, nor which heads a ranker has.
    """
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json", wait_for_schema=5)
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def holds(case: schemathesis.Case) -> None:
            answer = case.call_and_validate(excluded_checks=[positive_data_acceptance, not_a_server_error])
            assert answer.status_code in (
                200,
                400,
                404,
                405,
                406,
                408,
                411,
                413,
                415,
                422,
                503,
                504,
            )  # 503 and 504 are documented, 500 is not to be had

        holds()


def test_docs_need_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs").text
    assert "://" not in page.replace("http://www.w3.org", "")
    for path in ("swagger-ui-bundle.js", "swagger-ui.css"):
        found = next(part for part in page.split('"') if part.endswith(path))
        assert client.get(found).status_code == 200


def test_metrics_count_requests_once_and_stages(client: httpx.Client, example: dict[str, Any]) -> None:
    def value(name: str) -> float:
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in client.get("/metrics").text.splitlines() if line.startswith(name)
        )

    requests = 'slatewise_requests_total{code="200",endpoint="/rerank",ranker="tiny",variant="fp32",version="1"}'
    names = [
        requests,
        *(
            f'slatewise_stage_duration_seconds_count{{stage="{s}"}}'
            for s in ("parse", "features", "score", "serialize")
        ),
    ]
    before = {name: value(name) for name in names}
    for k in range(3):
        ask(client, example, "/rerank", user=f"metrics-{k}")
    assert {name: value(name) - before[name] for name in names} == dict.fromkeys(names, 3.0)
    refused = 'slatewise_requests_total{code="422"'
    count = value(refused)
    client.post("/rerank", json={})
    assert value(refused) - count == 1
    assert value("slatewise_requests_in_flight ") == 0


SHAPES = [
    (0, 1, None, "dot"),
    (10, 24, None, "point"),
    (50, 24, "new", "set"),
    (40, 200, "kept", "set"),
    (128, 1000, None, "set"),
    (128, 2000, "kept", "point"),
]


def shaped(example: dict[str, Any], events: int, n: int, user: str | None, exit: str) -> dict[str, Any]:
    """A request of another size, of what the example has."""
    history = {name: (column * 4)[:events] for name, column in example["history"].items()} | {
        "timestamps": list(range(10**9, 10**9 + events))
    }
    ids = (example["candidates"]["item_ids"] * 100)[:n]
    body = {name: value for name, value in example.items() if name != "user"} | {
        "history": history,
        "candidates": {"item_ids": ids},
        "exit": exit,
    }
    return body if user is None else body | {"user": user}


@pytest.mark.parametrize(("events", "n", "user", "exit"), SHAPES)
def test_the_stages_of_an_answer_add_up_to_its_total(
    client: httpx.Client, example: dict[str, Any], events: int, n: int, user: str | None, exit: str
) -> None:
    """Within 5 %, of which a request that the machine paused between its last lap and its total is allowed to miss some."""
    missing = []
    for k in range(15):
        answer = ask(client, shaped(example, events, n, f"adds-up-{events}-{k}" if user == "new" else user, exit))
        timings = answer["timings_ms"]
        total = timings.pop("total")
        assert min(timings.values()) >= 0 and answer["exit"] == exit
        assert sum(timings.values()) <= total + 0.001 * len(timings)  # each is rounded
        missing.append(1 - sum(timings.values()) / total)
    assert statistics.median(missing) <= 0.05


def sums(client: httpx.Client, *names: str) -> list[float]:
    """Over all labels."""
    lines = client.get("/metrics").text.splitlines()
    return [sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)) for name in names]


def test_the_stage_histograms_add_up_to_the_duration_histogram(client: httpx.Client, example: dict[str, Any]) -> None:
    names = (
        "slatewise_stage_duration_seconds_sum",
        "slatewise_request_duration_seconds_sum",
        "slatewise_request_duration_seconds_count",
    )
    before = sums(client, *names)
    for k in range(5):
        for events, n, user, exit in SHAPES:
            ask(client, shaped(example, events, n, f"histograms-{k}" if user == "new" else user, exit))
    stages, durations, count = (after - old for after, old in zip(sums(client, *names), before, strict=True))
    assert count == 5 * len(SHAPES)
    assert 0.95 * durations <= stages <= durations * (1 + 1e-9)


def wait_for(client: httpx.Client, name: str, value: float) -> None:
    give_up = time.monotonic() + 30
    while sums(client, name) != [value]:
        assert time.monotonic() < give_up, f"{name} is {sums(client, name)}, not {value}"
        time.sleep(0.02)


@pytest.mark.parametrize("method", ["extend", "point"])
def test_a_client_that_leaves_between_quanta_has_the_rest_not_run(
    tiny: Tiny, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It is counted as one that left; a quantum that runs is finished, and the next request is served."""
    with serve(Settings(bundles=tiny.root, threads=1)) as client:
        body = json.dumps(
            shaped(example, 40, 1500, "leaves", "point")
            if method == "point"
            else shaped(example, 128, 600, "leaves", "set")
        ).encode()
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        gone = ("slatewise_client_disconnects_total", 'slatewise_requests_total{code="499"')
        before = sums(client, *gone)
        stop = Stop(method, monkeypatch)
        scored = Stop("point", monkeypatch) if method == "extend" else None
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
            connection.sendall(head + body)
            assert stop.begun.wait(30)
        wait_for(client, gone[0], before[0] + 1)
        wait_for(client, "slatewise_requests_in_flight ", 0)
        assert sums(client, *gone) == [count + 1 for count in before]
        assert sums(client, "slatewise_outstanding_tokens ") == [0], "its room is free before its quantum has ended"
        stop.may_end.set()
        wait_for(client, "slatewise_queue_length", 0)
        assert (
            ask(client, {"candidates": {"item_ids": ["1"]}}, exit="dot")["exit"] == "dot"
        )  # by the one thread: what was before it has had its turn
        assert stop.calls == 1 and (scored is None or scored.calls == 0)


def test_a_server_that_stops_between_quanta_answers_503(
    tiny: Tiny, example: dict[str, Any], ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a request outlives the grace: what runs and what waits is told so, and so is who comes later."""
    app = build_app(Settings(bundles=tiny.root, threads=1), {"tiny": ranker})
    stop = Stop("point", monkeypatch)
    admissions: list[Admission] = []

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            async with app.router.lifespan_context(app):
                running = asyncio.create_task(client.post("/score", json=shaped(example, 0, 1500, None, "point")))
                assert await asyncio.to_thread(stop.begun.wait, 30)
                workers = app.state.pipeline.workers
                admissions.append(app.state.pipeline.admission)
                waiting = [
                    asyncio.create_task(client.post("/score", json=shaped(example, 5, 10, user, "set")))
                    for user in (None, "u", "u")
                ]
                while len(workers.queue) < 2:  # the two of one user share an encoding  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                end = asyncio.create_task(workers.__aexit__())
                while not workers.stopping:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                stop.may_end.set()
                answers = await asyncio.wait_for(asyncio.gather(running, *waiting), 30)
                await end
                answers.append(await client.post("/score", json=example))
            answers.append(await client.post("/score", json=example))
        return answers

    for answer in asyncio.run(main()):
        assert "stopping" in assert_problem(answer, 503)["detail"]
    assert stop.calls == 1 and admissions[0].in_flight == 0


def test_a_client_that_leaves_takes_its_work_with_it(tiny: Tiny, example: dict[str, Any]) -> None:
    with serve(Settings(bundles=tiny.root, threads=1)) as client:
        body = json.dumps(example | {"candidates": {"item_ids": example["candidates"]["item_ids"] * 150}}).encode()
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for _ in range(20):
            with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
                connection.sendall(head + body)
        give_up = time.monotonic() + 20
        for gauge in ("slatewise_requests_in_flight 0.0", "slatewise_outstanding_tokens 0.0"):
            while gauge not in client.get("/metrics").text:
                assert time.monotonic() < give_up
                time.sleep(0.05)
        ask(client, example)


def test_a_slow_body_is_given_up(tiny: Tiny) -> None:
    with (
        serve(Settings(bundles=tiny.root, body_timeout_s=0.3)) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection,
    ):
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        connection.settimeout(20)
        assert b" 408 " in connection.recv(1000)


def test_too_many_at_once_are_told_to_come_back(tiny: Tiny, example: dict[str, Any]) -> None:
    """With room for one request in flight, one whose body never comes takes the room."""
    with (
        serve(Settings(bundles=tiny.root, max_in_flight=1)) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection,
    ):
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        give_up = time.monotonic() + 20
        while "slatewise_requests_in_flight 1.0" not in client.get("/metrics").text:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        answer = client.post("/score", json=example)
        assert_problem(answer, 429)
        assert int(answer.headers["Retry-After"]) >= 1
        assert client.get("/livez").status_code == 200
        connection.close()
        while (status := client.post("/score", json=example).status_code) == 429:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        assert status == 200


def test_limits_may_be_lower_than_the_bundles_own_warm_up(tiny: Tiny, example: dict[str, Any]) -> None:
    with serve(Settings(bundles=tiny.root, max_candidates=30, max_history=50)) as client:
        assert client.get("/models/tiny").json()["limits"]["max_candidates"] == 30
        ask(client, example)


def test_sigterm_drains_and_exits_with_0(tiny: Tiny, example: dict[str, Any]) -> None:
    """/readyz says no at once, requests are served on, and then the process ends by itself."""
    port = free_port()
    settings = {"SLATEWISE_BUNDLES": str(tiny.root), "SLATEWISE_PORT": str(port), "SLATEWISE_DRAIN_SECONDS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-m", "slatewise.main"],
        env=os.environ | settings,
        cwd=DEMO.parent.parent,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            give_up = time.monotonic() + 60
            while not answers(client):
                assert time.monotonic() < give_up and process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            while (ready := client.get("/readyz")).status_code == 200:
                assert time.monotonic() < give_up
            assert_problem(ready, 503)
            ask(client, example)
            assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def test_keys_are_asked_for_where_they_are_set(tiny: Tiny, example: dict[str, Any]) -> None:
    def refused() -> float:
        return REGISTRY.get_sample_value("slatewise_rejected_total", {"reason": "key"}) or 0.0

    with serve(Settings(bundles=tiny.root, api_keys="first, second")) as client:  # type: ignore[arg-type]
        for path in ("/livez", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic first"},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer f\u00e9"},
        ):
            raw = {k: v.encode() for k, v in headers.items()}
            before = refused()
            answer = client.post("/score", json=example, headers=raw)
            assert_problem(answer, 401)
            assert refused() == before + 1
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            for path in ("/models", "/docs", "/openapi.json", "/no-such-path"):
                assert_problem(client.get(path, headers=raw), 401)
        for key in ("first", "second"):
            assert client.post("/score", json=example, headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_threads_of_clients_get_their_own_answers(client: httpx.Client, example: dict[str, Any]) -> None:
    ids = example["candidates"]["item_ids"]
    bodies = [
        example | {"user": f"own-{k}", "candidates": {"item_ids": ids[k % 7 : k % 7 + 1 + k % 9]}} for k in range(24)
    ]
    alone = [ask(client, body)["results"] for body in bodies]
    together: list[Any] = [None] * len(bodies)

    def one(k: int) -> None:
        together[k] = ask(client, bodies[k] | {"user": f"own-again-{k}"})["results"]

    threads = [threading.Thread(target=one, args=(k,)) for k in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert a["item_ids"] == b["item_ids"]
        assert a["scores"] == pytest.approx(b["scores"], abs=BOUND)


def test_every_error_class_is_documented() -> None:
    def classes(error: type[RankingError]) -> list[type[RankingError]]:
        return [error, *(c for sub in error.__subclasses__() for c in classes(sub))]

    found = classes(RankingError)
    assert {c.status for c in found} == set(PROBLEMS)
    assert len({c.title for c in found}) == len(found)


def test_the_committed_demo_serves_its_example() -> None:
    with serve(Settings(bundles=DEMO)) as client:
        card = client.get("/models/movielens").json()
        assert card["refused_variants"] == {}
        example = card["example"]
        assert len(example["candidates"]["item_ids"]) >= 20 and len(example["history"]["item_ids"]) >= 10
        answer = ask(client, example, "/rerank")
        assert answer["meta_embedding"]["status"] == "hit" and answer["exit"] == "set" and not answer["degraded"]
        assert len(set(answer["results"]["scores"])) > 10
        half = {"item_ids": example["candidates"]["item_ids"][:10]}
        a, b = (
            by_item(ask(client, example, user=f"set-{k}", candidates=c))
            for k, c in enumerate((half, {"item_ids": example["candidates"]["item_ids"]}))
        )
        assert max(abs(a[i] - b[i]) for i in a) > 10 * BOUND, "the demo is not set-wise"


def test_the_readme_shows_the_demos_real_answer() -> None:
    text = (DEMO.parent.parent / "README.md").read_text()
    request, answer = (
        json.loads(text[start : text.index(end, start)])
        for start, end in ((text.index('{"user"'), "'\n```"), (text.index('{"id": null'), "\n```"))
    )
    with serve(Settings(bundles=DEMO)) as client:
        found = ask(client, request, "/rerank")
    assert found.keys() == answer.keys() and found["timings_ms"].keys() == answer["timings_ms"].keys()
    for member in ("ranker", "version", "variant", "exit", "unknown_candidates", "history", "degraded"):
        assert found[member] == answer[member]
    assert (
        found["results"]["index"] == answer["results"]["index"]
        and found["results"]["item_ids"] == answer["results"]["item_ids"]
    )
    assert found["results"]["scores"] == pytest.approx(answer["results"]["scores"], abs=1e-4)
