"""The drawn requests: sizes, users and histories."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from loadtest.traffic import visits
from loadtest.workload import Shape, Workload
from slatewise.schemas import RankRequest
from tests.conftest import Tiny

SMALL = Shape(6, 4)


@pytest.fixture
def workload(tiny: Tiny) -> Workload:
    return Workload(tiny.root, seed=1)


def parsed(bodies: list[bytes]) -> list[dict[str, Any]]:
    for body in bodies:
        RankRequest.model_validate_json(body)
    return [json.loads(body) for body in bodies]


def test_distinct_requests_have_distinct_users(workload: Workload) -> None:
    requests = parsed(workload.distinct(SMALL, 5, top_n=2) + workload.distinct(Shape(0, 1), 5))
    assert len({request["user"] for request in requests}) == 10
    assert {len(request["history"]["item_ids"]) for request in requests[:5]} == {6}
    assert {len(request["candidates"]["item_ids"]) for request in requests[:5]} == {4}
    assert {request.get("top_n") for request in requests} == {2, None}


def test_workload_with_same_seed_is_equal(tiny: Tiny) -> None:
    assert Workload(tiny.root, seed=3).distinct(SMALL, 2) == Workload(tiny.root, "tiny", seed=3).distinct(SMALL, 2)


def test_returning_users_send_the_same_history(workload: Workload) -> None:
    first, rest = map(parsed, workload.returning(SMALL, users=3, rounds=2))
    assert len(first) == 3 and len(rest) == 6
    known = {request["user"]: request for request in first}
    for request in rest:
        assert request["history"] == known[request["user"]]["history"]
        assert request["candidates"] != known[request["user"]]["candidates"]


def test_growing_users_send_one_more_event_each_round(workload: Workload) -> None:
    first, rest = map(parsed, workload.growing(SMALL, users=2, rounds=3))
    histories = {request["user"]: request["history"] for request in first}
    for k, request in enumerate(rest):
        before = histories[request["user"]]
        now = request["history"]
        assert len(now["item_ids"]) == SMALL.history + k // 2 + 1
        assert all(now[column][:-1] == before[column] for column in now)
        histories[request["user"]] = now


@pytest.mark.parametrize("offset", [True, False])
def test_sliding_windows_move_by_one_event(workload: Workload, offset: bool) -> None:
    first, rest = map(parsed, workload.sliding(SMALL, users=2, rounds=3, offset=offset))
    histories = {request["user"]: request["history"] for request in first}
    for request in rest:
        before = histories[request["user"]]
        now = request["history"]
        for column in ("item_ids", "actions", "timestamps"):
            assert len(now[column]) == SMALL.history
            assert now[column][:-1] == before[column][1:]
        assert ("offset" in now) == offset
        if offset:
            assert now["offset"] == before["offset"] + 1
        histories[request["user"]] = now


def test_endless_requests_stay_in_limits_and_users_return(workload: Workload) -> None:
    requests = parsed(list(itertools.islice(workload.endless(8, 5), 300)))
    events = {len(request["history"]["item_ids"]) for request in requests}
    candidates = {len(request["candidates"]["item_ids"]) for request in requests}
    assert (min(events), max(events)) == (0, 8)
    assert (min(candidates), max(candidates)) == (1, 5)
    assert 100 < len({request["user"] for request in requests}) < 200


def test_traffic_mixes_new_users_and_growing_histories(tiny: Tiny) -> None:
    longest: dict[str, list[str]] = {}
    grown = 0
    for request in itertools.islice(visits(Workload(tiny.root), deadline_ms=50), 600):
        head, _, body = request.partition(b"\r\n\r\n")
        parsed = RankRequest.model_validate_json(body)
        assert f"X-User-ID: {parsed.user}".encode() in head
        assert parsed.deadline_ms == 50 and parsed.user is not None
        before = longest.get(parsed.user, [])
        now = parsed.history.item_ids
        grown += 0 < len(before) < len(now) and now[: len(before)] == before
        longest[parsed.user] = now
    assert 0.3 * 600 < len(longest) < 0.9 * 600
    assert grown > 50
    assert any(user in tiny_users(tiny) for user in longest), "no user has a meta-embedding"


def tiny_users(tiny: Tiny) -> set[str]:
    return set(json.loads((tiny.folder / "users.json").read_text()))
