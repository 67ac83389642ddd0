"""A canary and a shadow on a real server: who gets which version, and when it ends."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from slatewise.ranking.shadow import kendall_tau
from tests.http.support import assert_problem, sums
from tests.support.bundle_copy import Copy
from tests.support.versions import (
    FAILS,
    command,
    done,
    example_of,
    failing,
    publish,
    shuffled,
    slow,
    state_of,
    wait_until,
)

if TYPE_CHECKING:
    from tests.conftest import Tiny


@pytest.fixture
def body(tiny: Tiny) -> dict[str, Any]:
    """A request with 40 events and 20 candidates, of no user."""
    example = {name: value for name, value in example_of(tiny.folder).items() if name != "user"}
    history = {name: (column * 9)[:40] for name, column in example["history"].items() if name != "timestamps"}
    candidates = {"item_ids": (example["candidates"]["item_ids"] * 5)[:20]}
    return example | {"history": history, "candidates": candidates, "exit": "set"}


class Sessions:
    """Users who ask again and again, and the versions that each of them saw, in order."""

    def __init__(self, client: httpx.Client, body: dict[str, Any], users: int) -> None:
        self.client = client
        self.body = body
        self.users = users
        self.asked = 0
        self.seen: dict[str, list[int]] = defaultdict(list)
        self.statuses: set[int] = set()

    def ask(self) -> None:
        user = f"user-{self.asked % self.users}"
        self.asked += 1
        answer = self.client.post("/rerank", json=self.body | {"user": user})
        self.statuses.add(answer.status_code)
        if answer.status_code == 200:
            self.seen[user].append(answer.json()["version"])

    def ask_all(self, times: int = 1) -> dict[str, set[int]]:
        """Return the versions that each user saw in these requests."""
        before = {user: len(versions) for user, versions in self.seen.items()}
        for _ in range(times * self.users):
            self.ask()
        return {user: set(versions[before.get(user, 0) :]) for user, versions in self.seen.items()}

    def changes(self, user: str) -> int:
        seen = self.seen[user]
        return sum(a != b for a, b in itertools.pairwise(seen))


def test_a_user_sees_one_version_until_the_canary_ends(
    server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any]
) -> None:
    publish(tiny.folder, root, 2)
    sessions = Sessions(server, body, 40)
    assert done(server, "canary", version=2, share=0.2)["candidate"]["canary"] == 0.2
    first = sessions.ask_all(2)
    assert all(len(versions) == 1 for versions in first.values())
    some = {user for user, versions in first.items() if versions == {2}}
    assert 2 <= len(some) <= 16
    done(server, "canary", share=0.5)
    more = {user for user, versions in sessions.ask_all().items() if versions == {2}}
    assert some < more and len(more) <= 32
    assert done(server, "roll-back", version=2)["candidate"] is None
    assert set().union(*sessions.ask_all(2).values()) == {1}
    assert max(map(sessions.changes, more - some)) == 2 and {sessions.changes(user) for user in some} == {1}
    assert sessions.statuses == {200}


def test_requests_without_a_user_go_by_their_id(
    server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any]
) -> None:
    publish(tiny.folder, root, 2)
    done(server, "canary", version=2, share=0.5)

    def version(request_id: str) -> int:
        found: int = server.post("/rerank", json=body | {"id": request_id}).json()["version"]
        return found

    found = [version(f"r{k}") for k in range(30)]
    assert found == [version(f"r{k}") for k in range(30)] and set(found) == {1, 2}
    assert done(server, "promote")["version"] == 2
    assert {version(f"r{k}") for k in range(5)} == {2}


WORSE: dict[str, tuple[Callable[[Copy], None], str]] = {
    "failing": (failing, "more failed answers"),
    "slow": (slow, "times as long"),
    "shuffled": (shuffled, "overlap of the first ten"),
}


@pytest.mark.parametrize("how", WORSE)
def test_worse_version_is_stopped_within_a_thousand_requests(
    server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any], how: str
) -> None:
    """And its users go back once."""
    change, reason = WORSE[how]
    publish(tiny.folder, root, 2, change)
    if how == "failing":
        body["history"] = {name: column[:FAILS] for name, column in body["history"].items()}
    if how == "shuffled":
        body["candidates"] = {"item_ids": [*example_of(tiny.folder)["candidates"]["item_ids"]]}
    sessions = Sessions(server, body, 50)
    done(server, "load", version=2)
    if how == "shuffled":
        done(server, "shadow", share=0.5)
    done(server, "canary", share=0.3, bounds={"overlap": 0.9} if how == "shuffled" else None)
    while state_of(server)["candidate"] and sessions.asked < 1000:
        sessions.ask()
    state = state_of(server)
    assert state["stopped"] and reason in state["stopped"], f"{sessions.asked} requests"
    assert (state["candidate"], state["version"]) == (None, 1)
    assert set().union(*sessions.ask_all().values()) == {1}
    assert max(map(sessions.changes, sessions.seen)) <= 1
    assert sessions.statuses <= ({200, 500} if how == "failing" else {200})
    kind = {"failing": "failed", "slow": "latency", "shuffled": "agreement"}[how]
    assert sums(server, f'slatewise_canary_stops_total{{ranker="tiny",reason="{kind}"}}')[0] >= 1
    assert sums(server, 'slatewise_canary_share{ranker="tiny"}') == [0]


def test_equal_version_is_not_stopped_and_agrees(
    server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any]
) -> None:
    publish(tiny.folder, root, 2)
    done(server, "load", version=2)
    done(server, "shadow", share=1.0)
    done(server, "canary", share=0.5)
    names = ["topk_overlap_ratio_sum", "kendall_tau_count", 'kendall_tau_bucket{le="0.95",', "score_shift_count"]
    names += ['score_shift_bucket{le="0.01",', 'score_shift_bucket{le="-0.01",']
    names = [f"slatewise_shadow_{name}" for name in names]
    compared = 'slatewise_shadow_requests_total{ranker="tiny",result="compared"}'
    before = sums(server, compared, *names)
    sessions = Sessions(server, body, 40)
    sessions.ask_all(7)
    wait_until(lambda: sums(server, compared)[0] >= before[0] + 10, "ten comparisons")
    state = state_of(server)
    assert state["stopped"] is None and state["candidate"]["answers"] > 50
    count, *found = np.subtract(sums(server, compared, *names), before).tolist()
    # A sum of ratios is no whole number when earlier tests of this process added to it.
    assert found == pytest.approx([count, count, 0, count, count, 0])
    assert sums(server, "slatewise_shadow_latency_ratio_count")[0] > 0
    assert_problem(command(server, "load", version=3), 409, 404)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 30])
def test_kendall_tau_equals_the_slow_reference(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.integers(0, 6, (2, n)).astype(float)
    agree = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i in range(n) for j in range(i))
    ties = [sum(v[i] != v[j] for i in range(n) for j in range(i)) for v in (x, y)]
    expected = agree / math.sqrt(ties[0] * ties[1]) if all(ties) else math.nan
    assert kendall_tau(x, y) == pytest.approx(expected, nan_ok=True)
    if n > 3:
        distinct = rng.permutation(n).astype(float)
        assert kendall_tau(distinct, distinct) == pytest.approx(1) and kendall_tau(
            distinct, -distinct
        ) == pytest.approx(-1)
