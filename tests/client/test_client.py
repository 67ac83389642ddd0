"""Client and AsyncClient against a real server, and against one that gives the answers of proxies and of overload."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from slatewise import AsyncClient, Client
from slatewise.client import errors
from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.support.application import serve
from tests.support.network import free_port
from tests.support.scripted_server import Answer, scripted_server

ROWS = [("318", "love", 1e9), ("500", "like", 1.1e9)]
MEMBERS: dict[str, Any] = {"user": "small:99", "history": ROWS, "candidates": ["595", "589", "1", "2028"]}
BODY: dict[str, Any] = {
    "user": "small:99",
    "history": {"item_ids": ["318", "500"], "actions": ["love", "like"], "timestamps": [1e9, 1.1e9]},
    "candidates": {"item_ids": ["595", "589", "1", "2028"]},
}
AT = {"request_time": 1.2e9}

Ask = Callable[..., Any]


def sync_ask(
    url: str | None, method: str, /, *arguments: Any, options: dict[str, Any] | None = None, **members: Any
) -> Any:
    with Client(url, **(options or {})) as client:
        return getattr(client, method)(*arguments, **members)


def async_ask(
    url: str | None, method: str, /, *arguments: Any, options: dict[str, Any] | None = None, **members: Any
) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, **(options or {})) as client:
            return await getattr(client, method)(*arguments, **members)

    return asyncio.run(ask())


@pytest.fixture(params=[sync_ask, async_ask], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    found: Ask = request.param
    return found


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLATEWISE_URL", "SLATEWISE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


# A real server


@pytest.mark.parametrize(("method", "path"), [("rerank", "/rerank"), ("score", "/score")])
def test_ranking_is_that_of_the_plain_call(ask: Ask, demo_url: str, method: str, path: str) -> None:
    ranking = ask(demo_url, method, **MEMBERS, **AT, options={"timeout": 30})
    plain = httpx.post(demo_url + path, json=BODY | AT, trust_env=False).json()
    assert ranking.scores == plain["results"]["scores"]
    assert ranking.item_ids == plain["results"]["item_ids"] and ranking.index == plain["results"]["index"]
    assert ranking.heads == plain["results"]["heads"] and ranking.exit == plain["exit"]
    assert sorted(ranking.ranks) == [1, 2, 3, 4]


def test_every_member_reaches_the_server(ask: Ask, demo_url: str) -> None:
    members = MEMBERS | {"head_weights": {"like": 1}, "top_n": 2, "deadline_ms": 60_000, "allow_degraded": False}
    members |= {"ranker": "movielens", "variant": "fp32", "exit": "dot", "priority": -5, "id": "r-1"}
    ranking = ask(demo_url, "rerank", **members, options={"timeout": 30})
    assert len(ranking) == 2 and (ranking.exit, ranking.variant, ranking.id) == ("dot", "fp32", "r-1")


def test_faults_of_a_request_are_typed(ask: Ask, demo_url: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        ask(demo_url, "rerank", candidates=[], top_n=0)
    assert {fault.pointer for fault in caught.value.faults} == {"/candidates/item_ids", "/top_n"}
    with pytest.raises(errors.NotFound, match="no such ranker"):
        ask(demo_url, "rerank", candidates=[1], ranker="other")
    with pytest.raises(errors.NotFound) as missing:
        ask(demo_url + "/nowhere", "models")
    assert missing.value.slug == "not-found"


def test_models_are_described(ask: Ask, demo_url: str) -> None:
    assert [model["name"] for model in ask(demo_url, "models")] == ["movielens"]
    card = ask(demo_url, "model")
    assert card == ask(demo_url, "model", "movielens") and "example" in card
    with pytest.raises(errors.NotFound):
        ask(demo_url, "model", "a/../b")
    assert ask(demo_url, "wait_until_ready") is None


def test_key_is_sent_and_never_shown(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Settings(bundles=DEMO, variants="fp32", api_keys="s3cret")) as plain:
        url = str(plain.base_url)
        with pytest.raises(errors.Unauthorized):
            ask(url, "models")
        assert ask(url, "models", options={"api_key": "s3cret"})
        monkeypatch.setenv("SLATEWISE_URL", url)
        monkeypatch.setenv("SLATEWISE_API_KEY", "s3cret")
        assert ask(None, "models")
        with Client() as client:
            assert "s3cret" not in repr(client) and url in repr(client)


def test_deadline_exceeded_is_its_own_error(ask: Ask, demo_url: str) -> None:
    members = {"candidates": [*map(str, range(2000))], "history": [*map(str, range(500))], "allow_degraded": False}
    with pytest.raises(errors.DeadlineExceeded):
        ask(demo_url, "rerank", **members, deadline_ms=0.001, options={"timeout": 30})


# Scripted answers


def problem(status: int, slug: str, **headers: str) -> Answer:
    body = json.dumps({"type": f"urn:slatewise:problem:{slug}", "detail": "a reason", "status": status}).encode()
    return Answer(status, body, {"Content-Type": "application/problem+json"} | headers)


MODELS = Answer(200, b'{"models": []}')
OPTIONS = {"timeout": 5.0, "retries": 2}


@pytest.mark.parametrize(("status", "slug"), [(429, "overloaded"), (503, "not-ready")])
def test_overload_with_retry_after_is_repeated(ask: Ask, status: int, slug: str) -> None:
    refused = problem(status, slug, **{"Retry-After": "0"})
    with scripted_server(refused, refused, MODELS) as script:
        assert ask(script.url, "models", options=OPTIONS) == []
        assert len(script.requests) == 3


NEVER = [
    (problem(429, "overloaded"), errors.Overloaded),
    (problem(503, "not-ready"), errors.NotReady),
    (problem(504, "deadline-exceeded", **{"Retry-After": "0"}), errors.DeadlineExceeded),
    (problem(500, "internal-error", **{"Retry-After": "0"}), errors.ServerFault),
    (problem(422, "invalid-request", **{"Retry-After": "0"}), errors.Invalid),
    (problem(429, "overloaded", **{"Retry-After": "soon"}), errors.Overloaded),
    (problem(429, "overloaded", **{"Retry-After": "60"}), errors.Overloaded),
    (Answer(0), errors.ConnectionLost),
]


@pytest.mark.parametrize(("answer", "kind"), NEVER)
def test_other_answers_are_not_repeated(ask: Ask, answer: Answer, kind: type[errors.SlatewiseError]) -> None:
    begin = time.monotonic()
    with scripted_server(answer, MODELS) as script, pytest.raises(kind):
        ask(script.url, "models", options=OPTIONS)
    assert len(script.requests) == 1
    assert time.monotonic() - begin < 4, "it did not wait for a pause beyond its time"


def test_retry_after_is_told_in_seconds(ask: Ask) -> None:
    for value, least, most in (("60", 60, 60), (formatdate(time.time() + 60, usegmt=True), 50, 61)):
        with scripted_server(problem(429, "overloaded", **{"Retry-After": value})) as script:
            with pytest.raises(errors.Overloaded) as caught:
                ask(script.url, "models", options=OPTIONS)
            assert caught.value.retry_after is not None and least <= caught.value.retry_after <= most


def test_repeats_are_counted(ask: Ask) -> None:
    with scripted_server(problem(429, "overloaded", **{"Retry-After": "0"})) as script:
        with pytest.raises(errors.Overloaded):
            ask(script.url, "models", options={"timeout": 5.0, "retries": 3})
        assert len(script.requests) == 4
        with pytest.raises(errors.Overloaded):
            ask(script.url, "models", options={"timeout": 5.0, "retries": 0})
        assert len(script.requests) == 5


def test_slow_answer_times_out_once(ask: Ask) -> None:
    begin = time.monotonic()
    with (
        scripted_server(Answer(200, b'{"models": []}', seconds=2)) as script,
        pytest.raises(errors.TimedOut, match=r"0\.3 s"),
    ):
        ask(script.url, "models", options={"timeout": 0.3, "retries": 3})
    assert len(script.requests) == 1 and time.monotonic() - begin < 2


def test_no_server_is_asked_again_within_the_time(ask: Ask) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(errors.ConnectionFailed, match=f"cannot connect to {url}"):
        ask(url, "models", options={"timeout": 1.0, "retries": 2})


def test_connect_error_is_repeated() -> None:
    """The server begins to listen between two tries."""
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, "-c", LATE_SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert sync_ask(f"http://127.0.0.1:{port}", "models", options={"timeout": 60.0, "retries": 10}) == []
    finally:
        child.kill()
        child.wait()


LATE_SERVER = """
import socket, sys, time
time.sleep(0.3)
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    connection, _ = listener.accept()
    connection.recv(65536)
    connection.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 14\\r\\n\\r\\n{"models": []}')
    time.sleep(5)
"""

FOREIGN = [
    (Answer(502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"}), errors.ServerFault, r"502 \(text/html\)"),
    (Answer(504, b"<html>late</html>", {"Content-Type": "text/html"}), errors.ServerFault, "504"),
    (Answer(413, b"too large", {"Content-Type": "text/plain"}), errors.TooLarge, "413"),
    (Answer(404, b"", {}), errors.NotFound, "404"),
    (
        Answer(200, b"<html>hello</html>", {"Content-Type": "text/html"}),
        errors.ServerFault,
        "not an answer of Slatewise",
    ),
    (Answer(200, b'{"other": 1}', {}), errors.ServerFault, "another form"),
    (Answer(200, b"[]", {}), errors.ServerFault, "another form"),
    (Answer(301, b"", {"Location": "https://other/"}), errors.SlatewiseError, "redirects to https://other/"),
    (Answer(400, b"\xff\xfe", {}), errors.SlatewiseError, "400"),
]


@pytest.mark.parametrize(("answer", "kind", "text"), FOREIGN)
def test_answer_of_a_proxy_is_a_clear_error(ask: Ask, answer: Answer, kind: type[Exception], text: str) -> None:
    with scripted_server(answer) as script, pytest.raises(kind, match=text) as caught:
        ask(script.url, "models", options=OPTIONS)
    assert type(caught.value) is kind


def test_too_long_an_answer_is_refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slatewise.client.exchange.MOST_BYTES", 100)
    with scripted_server(Answer(200, b"x" * 101)) as script, pytest.raises(errors.ServerFault, match="longer than 100"):
        ask(script.url, "models", options=OPTIONS)


def test_connections_are_reused(ask: Ask) -> None:
    with scripted_server(MODELS) as script:
        with Client(script.url, timeout=30) as client:
            for _ in range(5):
                client.models()
        assert (len(script.requests), script.connections) == (5, 1)


def test_calls_for_users_have_their_bodies(ask: Ask) -> None:
    with scripted_server(Answer(200, b'{"accepted": 1}')) as script:
        ask(script.url, "event", user=7, item_id="a", action="like", timestamp=5, request_id="r", options=OPTIONS)
        ask(script.url, "events", [{"user": "u", "item_id": "a", "event_id": "e"}], options=OPTIONS)
        ask(script.url, "encode", "u", [("a", "like")], options=OPTIONS)
    (_, path, _, first), (_, _, _, second), (_, encode, _, third) = script.requests
    event = json.loads(first)["events"][0]
    assert path == "/events" and len(event.pop("event_id")) == 32
    assert event == {"user": 7, "item_id": "a", "action": "like", "timestamp": 5, "request_id": "r"}
    assert json.loads(second) == {"events": [{"user": "u", "item_id": "a", "event_id": "e"}]}
    assert encode == "/encode"
    assert json.loads(third) == {"user": "u", "history": {"item_ids": ["a"], "actions": ["like"]}}


@pytest.mark.parametrize("user", ["Zoë", "用户 7", "a:b/c", 7])
def test_user_is_a_header_for_balancers(ask: Ask, demo_url: str, user: str | int) -> None:
    found = ask(demo_url, "rerank", options=OPTIONS, user=user, candidates=["595", "1"])  # 422 if the two differ
    assert len(found) == 2
    with scripted_server(Answer(200, b'{"accepted": 1}')) as script:
        ask(script.url, "events", [{"user": user, "item_id": "a"}] * 2, options=OPTIONS)
        ask(script.url, "encode", user, options=OPTIONS)
        ask(script.url, "delete_user", user, options=OPTIONS)
        for _, _, headers, _ in script.requests:
            assert headers["X-User-ID"].encode("latin-1").decode() == str(user)


@pytest.mark.parametrize("user", [None, "", " a", "a\n", "a\x00b", "a\x85", "x" * 257])
def test_user_that_no_header_carries_stays_in_the_body(ask: Ask, demo_url: str, user: str | None) -> None:
    with scripted_server(Answer(422, b"{}")) as script, pytest.raises(errors.SlatewiseError):
        ask(script.url, "rerank", options=OPTIONS, user=user, candidates=["1"])
    _, _, headers, body = script.requests[0]
    assert "X-User-ID" not in headers and json.loads(body).get("user") == user


def test_events_of_several_users_have_no_header(ask: Ask) -> None:
    with scripted_server(Answer(200, b'{"accepted": 2}')) as script:
        ask(script.url, "events", [{"user": "u", "item_id": 1}, {"user": "v", "item_id": 1}], options=OPTIONS)
        ask(script.url, "events", [], options=OPTIONS)
    assert all("X-User-ID" not in headers for _, _, headers, _ in script.requests)


def test_deletion_quotes_the_user(ask: Ask) -> None:
    with scripted_server(Answer(204, b"")) as script:
        assert ask(script.url, "delete_user", "a/b c?", options=OPTIONS) is None
    assert script.requests[0][:2] == ("DELETE", "/users/a%2Fb%20c%3F")


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_events_of_a_frame_are_rows(ask: Ask, kind: str) -> None:
    frame = pytest.importorskip(kind).DataFrame({"user": ["u", "v"], "item_id": [1, 2], "action": ["like", None]})
    with scripted_server(Answer(200)) as script:
        ask(script.url, "events", frame, options=OPTIONS)
        with pytest.raises(errors.Invalid, match="rating"):
            ask(
                script.url,
                "events",
                frame.rename(columns={"action": "rating"}) if kind == "pandas" else frame.rename({"action": "rating"}),
            )
    sent = json.loads(script.requests[0][3])["events"]
    assert [{**event, "event_id": ""} for event in sent] == [
        {"user": "u", "item_id": 1, "action": "like", "event_id": ""},
        {"user": "v", "item_id": 2, "event_id": ""},
    ]


def test_titles_come_in_parts_and_may_be_missing(ask: Ask) -> None:
    answer = Answer(200, b'{"item_ids": ["a", "b"], "known": [true, false], "fields": {"title": ["A", null]}}')
    with scripted_server(answer) as script:
        assert ask(script.url, "titles", "films", ["a,b"] * 201, options=OPTIONS) == {"a": "A"}
        assert [path.count("id=a%2Cb") for _, path, _, _ in script.requests] == [200, 1]
    with scripted_server(problem(404, "not-found")) as script:
        assert ask(script.url, "titles", "films", ["a"], options=OPTIONS) == {}


def test_waiting_for_a_server_ends(ask: Ask) -> None:
    proxy = Answer(502, b"<html>", {"Content-Type": "text/html"})
    with scripted_server(problem(503, "not-ready"), proxy, Answer(200)) as script:
        ask(script.url, "wait_until_ready", 20)
        assert len(script.requests) == 3
    with scripted_server(Answer(404, b"<html>")) as script, pytest.raises(errors.NotFound):
        ask(script.url, "wait_until_ready", 20)
    with pytest.raises(errors.TimedOut, match=r"not ready after 0\.3 s: cannot connect"):
        ask(f"http://127.0.0.1:{free_port()}", "wait_until_ready", 0.3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"url": "127.0.0.1:8000"}, "must start with http://"),
        ({"url": "http://127.0.0.1:99999"}, "a host and a valid port"),
        ({"url": "http://[::1"}, "a host and a valid port"),
        ({"url": "http://"}, "a host and a valid port"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"timeout": float("nan")}, "timeout must be above 0"),
        ({"retries": -1}, "retries must be 0 or more"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_wrong_arguments_are_refused(kind: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kind(**arguments)


def test_both_clients_have_the_same_surface() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert names(Client) == names(AsyncClient) >= {"rerank", "score", "rank_many", "events", "encode", "delete_user"}


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port whose queue of connections is full, so that connecting takes for ever."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        held = []
        for _ in range(3):
            held.append(socket.socket())
            held[-1].setblocking(False)
            held[-1].connect_ex(("127.0.0.1", port))
        yield port
        for each in held:
            each.close()


def test_endless_connecting_is_bounded(ask: Ask, silent_port: int) -> None:
    begin = time.monotonic()
    with pytest.raises((errors.ConnectionFailed, errors.TimedOut)):
        ask(f"http://127.0.0.1:{silent_port}", "models", options={"timeout": 0.4, "retries": 3})
    assert time.monotonic() - begin < 3


def test_headers_that_arrive_slowly_are_bounded() -> None:
    """Each line of the answer's head arrives within the time, and all of them do not."""

    def trickle(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            for _ in range(100):
                time.sleep(0.1)
                connection.sendall(b"A: b\r\n")

    begin = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,))
        thread.start()
        with pytest.raises(errors.TimedOut, match=r"0\.4 s"):
            async_ask(f"http://127.0.0.1:{listener.getsockname()[1]}", "models", options={"timeout": 0.4})
        assert time.monotonic() - begin < 4
        thread.join(20)


@pytest.mark.parametrize("name", ["Client", "AsyncClient", "Ranking", "SlatewiseError"])
def test_client_loads_little(name: str) -> None:
    """Neither the server's libraries nor numpy; and the package by itself loads not even httpx."""
    code = f"""
import sys, slatewise
assert "httpx" not in sys.modules
slatewise.{name}
heavy = {{"pydantic", "onnxruntime", "numpy", "fastapi", "pandas", "polars", "redis", "prometheus_client"}}
print(heavy & sys.modules.keys(), [n for n in sys.modules if n.startswith("slatewise.") and "client" not in n])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set() []\n"


def test_unknown_names_of_the_package_are_errors() -> None:
    import slatewise

    with pytest.raises(AttributeError, match="no attribute 'Cleint'"):
        slatewise.Cleint  # type: ignore[attr-defined]  # noqa: B018
    assert {"Client", "load"} <= {*dir(slatewise)}
