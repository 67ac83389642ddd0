"""POST /events, /feedback and /encode, DELETE /users: rankings by stored histories, and the shapes of others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

import boto3
import httpx
import numpy as np
import pytest
import redis
from botocore.config import Config
from botocore.exceptions import ClientError

from slatewise.bundle.ranker import Ranker
from slatewise.settings import Settings
from slatewise.store.generations import Generations
from slatewise.store.push import push
from tests.conftest import Tiny
from tests.http.support import BOUND, ask, assert_problem, by_item, sums
from tests.support.application import serve

GENEROUS_MS = 20_000.0  # a time budget that a busy machine does not exceed by chance
NUMBERS = count()


@pytest.fixture
def user() -> str:
    """A user without events."""
    return f"user-of-events-{next(NUMBERS)}"


@pytest.fixture(scope="module")
def replicas(tiny: Tiny, redis_port: int) -> Iterator[list[httpx.Client]]:
    """Two servers with one Redis."""
    settings = Settings(
        bundles=tiny.root,
        redis_url=f"redis://127.0.0.1:{redis_port}/0",  # type: ignore[arg-type]
        redis_timeout_ms=GENEROUS_MS,
        stored_history_events=300,
    )
    with serve(settings) as first, serve(settings) as second:
        yield [first, second]


@pytest.fixture(params=["embedded", "redis"])
def server(request: pytest.FixtureRequest, client: httpx.Client) -> httpx.Client:
    if request.param == "embedded":
        return client
    found: httpx.Client = request.getfixturevalue("replicas")[0]
    return found


def rows(user: str, history: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("item_id", "action", "timestamp")
    columns = (history["item_ids"], history["actions"], history["timestamps"])
    return [{"user": user, **dict(zip(names, row, strict=True))} for row in zip(*columns, strict=True)]


def long_history(example: dict[str, Any], events: int, first: int = 0) -> dict[str, Any]:
    """Events number `first` to `first + events` of an endless history."""
    ids, actions = example["history"]["item_ids"], example["history"]["actions"]
    numbers = range(first, first + events)
    return {
        "item_ids": [ids[k % len(ids)] for k in numbers],
        "actions": [actions[k % len(ids)] for k in numbers],
        "timestamps": [10**9 + 1000 * k for k in numbers],
    }


def send(client: httpx.Client, events: list[dict[str, Any]] | dict[str, Any]) -> dict[str, int]:
    answer = client.post("/events", json={"events": events} if isinstance(events, list) else events)
    assert answer.status_code == 202, answer.text
    counts: dict[str, int] = answer.json()
    return counts


def without_history(example: dict[str, Any], user: str) -> dict[str, Any]:
    rest = {name: value for name, value in example.items() if name != "history"}
    return rest | {"user": user, "request_time": 2e9}


def test_a_stored_history_scores_as_the_same_history_sent(
    server: httpx.Client, example: dict[str, Any], user: str
) -> None:
    events = len(example["history"]["item_ids"])
    assert send(server, rows(user, example["history"])) == {"accepted": events, "duplicate": 0, "dropped": 0}
    body = without_history(example, user)
    stored = ask(server, body)
    assert stored["history"]["source"] == "stored" and stored["degraded"] == []
    sent = ask(server, body, user="another", history=example["history"])
    assert sent["history"]["source"] == "request"
    assert stored["results"] == sent["results"]
    for name in ("used", "dropped", "unknown"):
        assert stored["history"][name] == sent["history"][name]


def test_a_sliding_stored_window_scores_as_the_whole_history(
    server: httpx.Client, ranker: Ranker, example: dict[str, Any], user: str
) -> None:
    """The server keeps 300 to 512 events of 700. Events come one by one at the end, and the kept state extends."""
    used = ranker.manifest.limits.history_used
    send(server, rows(user, long_history(example, 600)))
    body = without_history(example, user)
    ask(server, body)
    results = []
    for total in range(601, 701, 9):
        send(server, rows(user, long_history(example, 9, total - 1)))
        stored = ask(server, body)
        sent = ask(server, body, user="sliding", history=long_history(example, total + 8))
        assert stored["history"]["used"] == sent["history"]["used"] <= used
        for item, score in by_item(sent).items():
            assert by_item(stored)[item] == pytest.approx(score, abs=BOUND)
        results.append(stored["history"]["cache"])
    assert results.count("extended") >= len(results) - 3, results


def test_an_absent_history_differs_from_an_empty_one(server: httpx.Client, example: dict[str, Any], user: str) -> None:
    send(server, rows(user, example["history"]))
    body = without_history(example, user)
    for history in ({}, {"item_ids": []}):
        empty = ask(server, body, history=history)
        assert (empty["history"]["source"], empty["history"]["used"]) == ("request", 0)
    anonymous = {name: value for name, value in body.items() if name != "user"}
    assert ask(server, anonymous)["history"]["source"] == "none"
    unknown = ask(server, body, user=f"{user}-unknown")
    assert (unknown["history"]["source"], unknown["history"]["used"], unknown["degraded"]) == ("none", 0, [])


def test_one_event_and_repeats(server: httpx.Client, example: dict[str, Any], user: str) -> None:
    one = {"user": user, "item_id": 1, "event_id": "e1"}
    begin = time.time()
    assert send(server, one) == {"accepted": 1, "duplicate": 0, "dropped": 0}
    assert send(server, one | {"item_id": 2}) == {"accepted": 0, "duplicate": 1, "dropped": 0}
    timed = {"user": user, "item_id": 3, "timestamp": begin + 60, "action": "view", "request_id": "r-1"}
    assert send(server, [timed, timed]) == {"accepted": 1, "duplicate": 1, "dropped": 0}
    assert ask(server, without_history(example, user))["history"]["used"] == 2


def test_an_event_is_in_the_next_request_of_any_replica(
    replicas: list[httpx.Client], example: dict[str, Any], user: str
) -> None:
    body = without_history(example, user)
    seconds = []
    for k in range(1, 21):
        send(replicas[k % 2], {"user": user, "item_id": k, "timestamp": 1e9 + k})
        begin = time.perf_counter()
        assert ask(replicas[1 - k % 2], body)["history"]["used"] == k
        seconds.append(time.perf_counter() - begin)
    assert sorted(seconds)[10] < 0.1


def test_concurrent_events_of_one_user_are_all_stored(server: httpx.Client, example: dict[str, Any], user: str) -> None:
    events = [{"user": user, "item_id": k, "timestamp": 1e9 + k} for k in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert sum(counts["accepted"] for counts in pool.map(lambda each: send(server, each), events)) == 40
    assert ask(server, without_history(example, user))["history"]["used"] == min(40, 128)


WRONG: list[tuple[Any, str]] = [
    ({}, "/user"),
    ({"user": "u"}, "/item_id"),
    ({"user": "u", "item_id": ""}, "/item_id"),
    ({"user": "u", "item_id": "i", "timestamp": 1_700_000_000_000}, "/timestamp"),
    ({"user": "u", "item_id": "i", "timestamp": 9e9}, "/timestamp"),
    ({"user": "u", "item_id": "i", "timestamp": 10**400}, "/timestamp"),
    ({"user": 10**400, "item_id": "i"}, "/user"),
    ({"user": "u", "item_id": "i", "timestamp": "now"}, "/timestamp"),
    ({"user": "u", "item_id": "i", "action": 5}, "/action"),
    ({"user": "u", "item_id": "i", "request_id": "a b"}, "/request_id"),
    ({"user": "u", "item_id": "i", "ranker": "tiny"}, "/ranker"),
    ({"events": []}, "/events"),
    ({"events": "e"}, "/events"),
    ({"events": [{"user": "u", "item_id": "i"}], "user": "u"}, "/user"),
    ({"events": [{"user": "u"}]}, "/events/0/item_id"),
    ({"events": [{"user": "u", "item_id": "i"}] * 1_001}, "/events"),
]


@pytest.mark.parametrize(("body", "pointer"), WRONG)
def test_wrong_events_are_refused_by_member(client: httpx.Client, body: Any, pointer: str) -> None:
    problem = assert_problem(client.post("/events", json=body), 422)
    assert problem["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    ("time", "text"),
    [
        (1_700_000_000_000, "these look like milliseconds: divide them by 1,000"),
        ("2026-01-31T12:00:00Z", "convert this ISO 8601 text"),
        ("1700000000", "remove the quotes"),
        ("now", "unix seconds are wanted"),
    ],
)
def test_time_in_another_unit_is_named(client: httpx.Client, time: Any, text: str) -> None:
    event = {"user": "u", "item_id": "i", "timestamp": time}
    history = {"item_ids": ["i"], "timestamps": [time]}
    for path, body, pointer in (
        ("/events", event, "/timestamp"),
        ("/events", {"events": [event]}, "/events/0/timestamp"),
        ("/encode", {"user": "u", "history": history}, "/history/timestamps/0"),
    ):
        (fault,) = assert_problem(client.post(path, json=body), 422)["errors"]
        assert fault["pointer"] == pointer and text in fault["detail"], fault
    body = {"sessionId": "s", "eventList": [{"eventType": "view", "sentAt": time, "itemId": "i"}]}
    assert text in client.post("/events", json=body).json()["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1", b"\xff", b'{"user": NaN}'])
@pytest.mark.parametrize("path", ["/events", "/feedback", "/encode"])
def test_bodies_that_are_not_json_are_refused(client: httpx.Client, body: bytes, path: str) -> None:
    assert_problem(client.post(path, content=body, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize("body", [[], 5, True, "text", [1]])
def test_json_of_another_kind_is_refused(client: httpx.Client, body: Any) -> None:
    assert_problem(client.post("/events", json=body), 422)
    assert_problem(client.post("/encode", json=body), 422)
    if body != []:
        assert_problem(client.post("/feedback", json=body), 422)


def test_bodies_outside_their_limits_are_refused(client: httpx.Client) -> None:
    assert_problem(client.post("/events", content=b" " * 1_000_001, headers={"Content-Type": "application/json"}), 413)
    assert_problem(client.post("/events", content=b"{}", headers={"Content-Type": "text/plain"}), 415)


# PutEvents of Amazon Personalize


@pytest.fixture
def personalize(server: httpx.Client) -> Any:
    return boto3.client(
        "personalize-events",
        endpoint_url=str(server.base_url),
        region_name="eu-west-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=Config(retries={"total_max_attempts": 1}, proxies={}),
    )


def test_boto3_puts_events(personalize: Any, server: httpx.Client, example: dict[str, Any], user: str) -> None:
    events = [
        {"eventType": "view", "sentAt": 1e9 + k, "itemId": str(k), "eventId": f"e{k}", "properties": '{"a": "b"}'}
        for k in range(3)
    ]
    no_item = {"eventType": "open", "sentAt": 1e9}
    for _ in range(2):
        answer = personalize.put_events(trackingId="t", userId=user, sessionId="s", eventList=[*events, no_item])
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert ask(server, without_history(example, user))["history"]["used"] == 3
    personalize.put_events(trackingId="t", sessionId=f"{user}-session", eventList=events[:1])
    assert ask(server, without_history(example, f"{user}-session"))["history"]["used"] == 1


def test_boto3_raises_the_errors_of_aws(personalize: Any) -> None:
    future = [{"eventType": "view", "sentAt": 9e9, "itemId": "1"}]
    with pytest.raises(ClientError, match="unix seconds") as raised:
        personalize.put_events(trackingId="t", userId="u", sessionId="s", eventList=future)
    assert raised.value.response["Error"]["Code"] == "InvalidInputException"
    assert raised.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


# Feedback of Metarank


def test_metarank_feedback_is_taken(server: httpx.Client, example: dict[str, Any], user: str) -> None:
    interaction = {
        "event": "interaction",
        "id": "0f4c0036-04fb-4409-b2c6-7163a59f6b7d",
        "ranking": "81f46c34-a4bb-469c-8708-f8127cd67d27",
        "timestamp": "1599391467000",
        "user": user,
        "session": "session1",
        "type": "purchase",
        "item": "1",
        "fields": [{"name": "count", "value": 1}],
    }
    ranking = {"event": "ranking", "id": "81f46c34", "timestamp": 1599391460000, "user": user, "items": [{"id": "1"}]}
    about = [
        {"event": "item", "id": "i", "item": "1", "timestamp": "2020-09-06T11:24:27Z", "fields": []},
        {"event": "user", "id": "j", "user": user, "timestamp": "1599391467000", "fields": []},
    ]
    one = server.post("/feedback", json=interaction)
    assert one.status_code == 200, one.text
    assert {**one.json(), "tookMillis": 0} == {
        "accepted": 1,
        "status": "ok",
        "tookMillis": 0,
        "updated": 1,
        "ignored": 0,
    }
    # curl -d sends this type
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    later = interaction | {"id": "2", "timestamp": "2020-09-06T11:24:28Z", "item": 2}
    listed = json.dumps([interaction, later, ranking, *about])
    many = server.post("/feedback", content=listed, headers=form)
    assert many.status_code == 200, many.text
    assert (many.json()["accepted"], many.json()["ignored"]) == (5, 2)
    assert ask(server, without_history(example, user))["history"]["used"] == 2, "what was shown is no history"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"event": "other", "id": "1"}, "/0/event"),
        ({"event": "interaction", "id": "1", "item": "1", "type": "t"}, "/0/user"),
        ({"event": "interaction", "id": "1", "user": "u"}, "/0/item"),
        ({"event": "interaction", "timestamp": "yesterday", "user": "u", "item": "1", "type": "t"}, "/0/timestamp"),
        ({"event": "interaction", "timestamp": 10**400, "user": "u", "item": "1", "type": "t"}, "/0/timestamp"),
        ({"event": "interaction", "timestamp": "9" * 400, "user": "u", "item": "1", "type": "t"}, "/0/timestamp"),
        ({"event": "interaction", "timestamp": True, "user": "u", "item": "1", "type": "t"}, "/0/timestamp"),
    ],
)
def test_wrong_feedback_is_refused(client: httpx.Client, body: dict[str, Any], pointer: str) -> None:
    problem = assert_problem(client.post("/feedback", json=body), 422)
    assert problem["errors"][0]["pointer"] == pointer


def test_items_of_feedback_count_as_events(client: httpx.Client) -> None:
    """Otherwise a body of a megabyte is 60,000 events."""
    shown = {"event": "ranking", "id": "r", "user": "u", "items": [{"id": "1"}] * 600}
    assert client.post("/feedback", json=shown).status_code == 200
    assert "1200 events, limit 1000" in assert_problem(client.post("/feedback", json=[shown, shown]), 422)["detail"]


# Encoding ahead


def test_the_request_after_encode_is_a_hit(server: httpx.Client, example: dict[str, Any], user: str) -> None:
    send(server, rows(user, example["history"]))
    first = server.post("/encode", json={"user": user})
    assert first.status_code == 200, first.text
    answer = first.json()
    assert answer["history"]["cache"] == "miss" and answer["history"]["source"] == "stored"
    assert answer["history"]["used"] == len(example["history"]["item_ids"])
    body = without_history(example, user)
    assert ask(server, body)["history"]["cache"] == "hit"
    again = server.post("/encode", json={"user": user, "ranker": "tiny", "variant": answer["variant"]}).json()
    assert again["history"]["cache"] == "hit"


def test_encode_takes_a_history_or_none(client: httpx.Client, example: dict[str, Any], user: str) -> None:
    given = client.post("/encode", json={"user": user, "history": example["history"]}).json()
    assert given["history"]["source"] == "request" and given["history"]["cache"] == "miss"
    assert ask(client, example, user=user)["history"]["cache"] == "hit"
    nothing = client.post("/encode", json={"user": f"{user}-new"})
    assert nothing.json()["history"] == {"used": 0, "dropped": 0, "cache": "none", "source": "none"}


def test_wrong_encodings_are_refused(client: httpx.Client) -> None:
    assert_problem(client.post("/encode", json={"history": {}}), 422)
    assert_problem(client.post("/encode", json={"user": "u", "ranker": "other"}), 404)
    assert_problem(client.post("/encode", json={"user": "u", "variant": "other"}), 404)
    long = {"item_ids": ["1"] * 1_001}
    assert_problem(client.post("/encode", json={"user": "u", "history": long}), 422)
    assert_problem(client.post("/encode", json={"user": "u", "more": 1}), 422)


def test_events_start_an_encoding_if_set(tiny: Tiny, example: dict[str, Any]) -> None:
    with serve(Settings(bundles=tiny.root, encode_on_events=True)) as server:
        before = sums(server, "slatewise_history_events_encoded_total")
        send(server, rows("u", example["history"]))
        give_up = time.monotonic() + 10
        while sums(server, "slatewise_history_events_encoded_total") == before:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        assert ask(server, without_history(example, "u"))["history"]["cache"] == "hit"


# Deletion


def test_deletion_removes_history_state_and_vector_everywhere(
    replicas: list[httpx.Client], redis_port: int, ranker: Ranker, example: dict[str, Any], user: str
) -> None:
    body = without_history(example, user)
    with redis.Redis(port=redis_port) as store:
        vectors = np.ones((2, ranker.manifest.meta_size), np.float32)
        push(Generations(store, ranker.name, ranker.manifest.space), [user, "other"], vectors)
        send(replicas[0], rows(user, example["history"]))
        give_up = time.monotonic() + 10
        for replica in replicas:
            while ask(replica, body)["meta_embedding"]["status"] != "hit":
                assert time.monotonic() < give_up
                time.sleep(0.05)
            assert ask(replica, body, history=example["history"])["history"]["cache"] == "hit"
        assert replicas[0].delete(f"/users/{user}").status_code == 204
        deleted = time.monotonic()
        assert not [key for key in store.keys(f"*{user}*") if b":history:" not in key]
        assert example["history"]["item_ids"][0].encode() not in store.get(f"slatewise:history:{{{user}}}")
    here = ask(replicas[0], body, history=example["history"])
    assert here["history"]["cache"] == "miss" and here["meta_embedding"]["status"] == "default"
    assert ask(replicas[1], body)["history"]["source"] == "none"
    time.sleep(max(0.0, deleted + 2.0 - time.monotonic()))  # the documented bound
    there = ask(replicas[1], body, history=example["history"])
    assert there["history"]["cache"] == "miss" and there["meta_embedding"]["status"] == "default"
    assert ask(replicas[1], body, user="other")["meta_embedding"]["status"] == "hit"
    send(replicas[1], {"user": user, "item_id": "1"})
    assert ask(replicas[0], body)["history"]["used"] == 1, "the user may come back"


@pytest.mark.parametrize("name", ["never seen", "a/b", "\u00e9", "u" * 256, "a%0Ab", "a%0A", "%00"])
def test_deletion_of_any_user_is_204(server: httpx.Client, name: str) -> None:
    for _ in range(2):
        answer = server.delete(f"/users/{name}")
        assert (answer.status_code, answer.content) == (204, b"")


def test_deletion_of_what_is_no_user_is_refused(client: httpx.Client) -> None:
    assert_problem(client.delete("/users/" + "u" * 257), 422)
    assert_problem(client.delete("/users/caf%E9"), 422)
    assert client.delete("/users/").status_code in (404, 422)


def test_deletion_takes_line_breaks_as_they_are(server: httpx.Client, example: dict[str, Any], user: str) -> None:
    """The router's own parameter of a path drops a line break at the end, which names another user."""
    for name in (user, f"{user}\n"):
        send(server, {"user": name, "item_id": "1"})
    assert server.delete(f"/users/{user}%0A").status_code == 204
    body = without_history(example, user)
    assert ask(server, body)["history"]["used"] == 1
    assert ask(server, body, user=f"{user}\n")["history"]["used"] == 0


# Faults of the store, limits


def test_a_store_fault_costs_the_history_alone(
    tiny: Tiny, example: dict[str, Any], start_redis: Callable[[int | None], AbstractContextManager[int]]
) -> None:
    body = without_history(example, "u")
    with start_redis(None) as port:
        settings = Settings(
            bundles=tiny.root,
            redis_url=f"redis://127.0.0.1:{port}/0",  # type: ignore[arg-type]
            redis_timeout_ms=500.0,
        )
        with serve(settings) as server:
            send(server, rows("u", example["history"]))
            assert ask(server, body)["history"]["source"] == "stored"
            with redis.Redis(port=port) as store:
                store.execute_command("CLIENT", "PAUSE", "60000", "ALL")
            begin = time.perf_counter()
            silent = ask(server, body)
            assert time.perf_counter() - begin < 5
            assert silent["history"]["source"] == "none" and "store_error" in silent["degraded"]
            assert silent["exit"] != "input_order" and silent["results"]["scores"]
            given = ask(server, body, history=example["history"])
            assert given["history"]["source"] == "request"
            problem = assert_problem(server.post("/events", json={"user": "u", "item_id": "1"}), 503)
            assert problem["type"].endswith("store-fault")
            assert_problem(server.delete("/users/u"), 503)


def test_too_many_waiting_events_are_429(
    tiny: Tiny, start_redis: Callable[[int | None], AbstractContextManager[int]]
) -> None:
    with start_redis(None) as port:
        settings = Settings(
            bundles=tiny.root,
            redis_url=f"redis://127.0.0.1:{port}/0",  # type: ignore[arg-type]
            max_events_waiting=2,
        )
        with serve(settings) as server, redis.Redis(port=port) as store, ThreadPoolExecutor(8) as pool:
            send(server, {"user": "u", "item_id": "1"})
            store.execute_command("CLIENT", "PAUSE", "700", "ALL")
            answers = list(
                pool.map(lambda k: server.post("/events", json={"user": "u", "item_id": k}).status_code, range(8))
            )
            assert 429 in answers and set(answers) <= {202, 429, 503}


def test_events_need_a_key_if_keys_are_set(tiny: Tiny) -> None:
    with serve(Settings(bundles=tiny.root, api_keys="k")) as server:  # type: ignore[arg-type]
        for method, path in (("POST", "/events"), ("POST", "/feedback"), ("POST", "/encode"), ("DELETE", "/users/u")):
            assert_problem(server.request(method, path, json={}), 401)
        send_with_key = server.post(
            "/events", json={"user": "u", "item_id": "1"}, headers={"Authorization": "Bearer k"}
        )
        assert send_with_key.status_code == 202
