"""The limits of a key: requests in flight, requests a second, priority; on every call, before the body is read."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from slatewise.bundle.loader import load_rankers
from slatewise.bundle.ranker import Ranker
from slatewise.errors import TooManyRequests
from slatewise.http import callers, reread
from slatewise.http.callers import Caller, Limits, read_limits
from slatewise.http.keys import Keys, KeysError
from slatewise.main import build_app
from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.http.support import assert_problem
from tests.http.test_keys import digest, wait_until
from tests.support.application import serve
from tests.support.attacks import HOST, head

BODY: dict[str, Any] = {"candidates": {"item_ids": ["1", "2"]}}
CALLS: dict[str, dict[str, Any] | None] = {
    "/rerank": BODY,
    "/score": BODY,
    "/v2/rerank": {"model": "movielens", "query": "{}", "documents": ["1", "2"]},
    "/events": {"user": "u", "item_id": "1", "action": "like"},
    "/encode": {"user": "u", "history": {"item_ids": ["1"]}},
    "/models": None,  # a GET
}


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    """That of the demo: nothing here depends on what it ranks."""
    return load_rankers(DEMO, ("fp32",))["movielens"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def rejected(reason: str) -> float:
    return REGISTRY.get_sample_value("slatewise_rejected_total", {"reason": reason}) or 0.0


def counted(key: str, result: str) -> float | None:
    return REGISTRY.get_sample_value("slatewise_key_requests_total", {"key": key, "result": result})


# The file


def keys_of(tmp_path: Path, text: str, **default: Any) -> Keys:
    path = tmp_path / "keys"
    path.write_text(text)
    return Keys([], str(path), default=Limits(**default))


def limits_of(keys: Keys, key: str) -> Limits:
    caller = keys.find(key.encode())
    assert caller is not None
    return caller.limits


def test_line_states_limits_and_the_settings_the_rest(tmp_path: Path) -> None:
    text = f"plain\n{digest('shop')} in_flight=32 rate=0.5\tpriority=-5  name=shop-1\nfree in_flight=0 rate=0\n"
    keys = keys_of(tmp_path, text, in_flight=7, rate=3.0, priority=1)
    assert limits_of(keys, "plain") == Limits(7, 3.0, 1)
    assert limits_of(keys, "shop") == Limits(32, 0.5, -5, "shop-1")
    assert limits_of(keys, "free") == Limits(0, 0.0, 1)
    assert len(keys) == 3


WRONG = ("in_flight", "in_flight=", "in_flight=-1", "in_flight=1.5", "rate=nan", "rate=1e9", "rate=-1", "priority=101")


@pytest.mark.parametrize(
    "words", [*WRONG, "priority=1.0", "name=", "name=a/b", "name=" + "x" * 65, "other=1", "# shop", "rate=1 rate=2"]
)
def test_wrong_limits_are_refused_without_repeating_them(tmp_path: Path, words: str) -> None:
    with pytest.raises(KeysError, match=r"^SLATEWISE_API_KEYS_FILE: .*, line 2: behind a key may stand") as refused:
        keys_of(tmp_path, f"first\nmykey {words}\n")
    assert "mykey" not in str(refused.value) and words.split()[0] not in str(refused.value).split("behind")[0]


def test_key_with_two_different_limits_is_refused(tmp_path: Path) -> None:
    assert len(keys_of(tmp_path, f"a rate=1\n{digest('a')} rate=1.0\n")) == 1
    with pytest.raises(KeysError, match="line 2: an earlier line has the same key with other limits"):
        keys_of(tmp_path, f"a rate=1\n{digest('a')} rate=2\n")


# Counting


def test_requests_in_flight_are_limited_until_they_leave() -> None:
    caller = Caller(Limits(in_flight=2))
    before = rejected("key_in_flight")
    caller.enter()
    caller.enter()
    with pytest.raises(TooManyRequests, match=r"more than 2 requests of this key.*higher limit.*\(in_flight\)"):
        caller.enter()
    assert rejected("key_in_flight") == before + 1
    caller.leave()
    caller.enter()
    assert caller.in_flight == 2


@pytest.mark.parametrize(("rate", "at_once"), [(200, 200), (3, 3), (1, 1), (0.25, 1)])
def test_rate_allows_the_requests_of_a_second_at_once(
    monkeypatch: pytest.MonkeyPatch, rate: float, at_once: int
) -> None:
    now = 1e6
    monkeypatch.setattr(callers.time, "monotonic", lambda: now)
    caller = Caller(Limits(rate=rate))

    def admitted(tries: int) -> int:
        count = 0
        for _ in range(tries):
            try:
                caller.enter()
                count += 1
            except TooManyRequests as error:
                wait = int(error.headers["Retry-After"])
                assert wait == max(1, -(-1 // rate))
        return count

    assert admitted(at_once + 5) == at_once
    now += 1 / rate
    assert admitted(5) == 1
    now += 3_600
    assert admitted(at_once + 5) == at_once, "an hour of silence saves no more"


def test_named_key_is_counted_and_logged_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    caller = Caller(read_limits(["rate=1", "name=shop"], Limits()))
    caller.enter()
    for _ in range(3):
        with pytest.raises(TooManyRequests):
            caller.enter()
    assert (counted("shop", "admitted"), counted("shop", "rate")) == (1.0, 3.0)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1 and lines[0].startswith(
        "requests of the key shop are refused: more than 1 requests a second"
    )


def test_series_of_named_keys_exist_before_a_request(tmp_path: Path) -> None:
    keys_of(tmp_path, "a name=early\nb\n")
    assert [counted("early", result) for result in ("admitted", "in_flight", "rate")] == [0.0, 0.0, 0.0]
    assert counted("", "admitted") is None


# On the server


@pytest.mark.parametrize("path", CALLS)
def test_limit_of_a_key_holds_for_every_call(tmp_path: Path, ranker: Ranker, path: str) -> None:
    (tmp_path / "keys").write_text("slow rate=0.001\nother\n")
    settings = Settings(api_keys_file=str(tmp_path / "keys"), threads=1)
    body = CALLS[path]
    with TestClient(build_app(settings, {ranker.name: ranker})) as client:

        def ask(key: str) -> httpx.Response:
            if body is None:
                return client.get(path, headers=bearer(key))
            return client.post(path, json=body, headers=bearer(key))

        assert ask("slow").is_success
        before = rejected("key_rate")
        refused = ask("slow")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1000")
        assert "more than 0.001 requests a second come with this key" in refused.text
        assert rejected("key_rate") == before + 1
        if path != "/v2/rerank":  # which has the errors of Cohere
            assert assert_problem(refused, 429)["type"] == "urn:slatewise:problem:too-many-requests"
        assert all(ask("other").is_success for _ in range(3))
        assert client.get("/readyz", headers=bearer("slow")).status_code == 200, "probes need no key"


def test_default_limit_holds_for_keys_of_the_settings(ranker: Ranker) -> None:
    settings = Settings(api_keys="a,b", key_max_rate=0.001, threads=1)  # type: ignore[arg-type]
    with TestClient(build_app(settings, {ranker.name: ranker})) as client:
        for key in ("a", "b"):
            codes = [client.post("/rerank", json=BODY, headers=bearer(key)).status_code for _ in range(2)]
            assert codes == [200, 429]


def test_key_above_its_limit_is_answered_unread(tmp_path: Path) -> None:
    """A request is in flight from its headers on. The next one of its key is refused before its body arrives."""
    (tmp_path / "keys").write_text("shop in_flight=1\nother\n")
    content = json.dumps(BODY).encode()
    with serve(Settings(bundles=DEMO, variants="fp32", api_keys_file=str(tmp_path / "keys"))) as client:
        port = client.base_url.port or 0
        key = b"Authorization: Bearer shop\r\n"
        with socket.create_connection((HOST, port)) as first, socket.create_connection((HOST, port)) as second:
            first.settimeout(20)
            second.settimeout(20)
            first.sendall(head(headers=key, length=len(content)) + content[:5])
            while client.get("/models", headers=bearer("shop")).status_code == 200:
                time.sleep(0.01)
            second.sendall(head(headers=key, length=len(content)))
            assert second.recv(4096).startswith(b"HTTP/1.1 429 ")
            assert client.post("/rerank", json=BODY, headers=bearer("other")).status_code == 200
            first.sendall(content[5:])
            answer = http.client.HTTPResponse(first)
            answer.begin()
            assert answer.status == 200
        wait_until(lambda: client.post("/rerank", json=BODY, headers=bearer("shop")).status_code == 200)


def test_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("shop in_flight=1\n")
    with serve(Settings(bundles=DEMO, variants="fp32", api_keys_file=str(tmp_path / "keys"))) as client:
        with socket.create_connection((HOST, client.base_url.port or 0)) as gone:
            gone.sendall(head(headers=b"Authorization: Bearer shop\r\n", length=100) + b"{")
            wait_until(lambda: client.get("/models", headers=bearer("shop")).status_code == 429)
        wait_until(lambda: client.get("/models", headers=bearer("shop")).status_code == 200)


def test_key_that_stays_keeps_its_counts(tmp_path: Path, ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another key comes, and while its own limits change."""
    monkeypatch.setattr(reread, "LOOK_SECONDS", 0.05)
    path = tmp_path / "keys"
    path.write_text("shop rate=0.001 name=before\n")
    settings = Settings(api_keys_file=str(path), threads=1)
    with TestClient(build_app(settings, {ranker.name: ranker})) as client:

        def status(key: str) -> int:
            return client.get("/models", headers=bearer(key)).status_code

        assert [status("shop"), status("shop")] == [200, 429]
        path.write_text("shop rate=0.001 name=after\nnew\n")
        wait_until(lambda: status("new") == 200)
        assert status("shop") == 429
        assert counted("after", "rate") == 1.0
        path.write_text("shop rate=1 rate=2\nnewest\n")  # cannot be used
        wait_until(lambda: 'slatewise_files_stale{kind="api_keys"} 1.0' in client.get("/metrics").text)
        assert (status("shop"), status("new"), status("newest")) == (429, 200, 401)


@pytest.mark.parametrize(
    ("settings", "key", "asked", "given"),
    [
        ({}, "", -100, 0),  # attack-6: a client without a key
        ({}, "", 7, 7),
        ({"most_important_priority": -100}, "", -100, -100),
        ({"most_important_priority": 5}, "", None, 5),
        ({"file": True}, "plain", -100, 0),
        ({"file": True}, "vip", -100, -10),
        ({"file": True}, "vip", -9, -9),
        ({"file": True}, "batch", 0, 20),
        ({"file": True, "most_important_priority": 3}, "plain", 0, 3),
    ],
)
def test_priority_is_bounded_by_the_key(
    tmp_path: Path, ranker: Ranker, settings: dict[str, Any], key: str, asked: int | None, given: int
) -> None:
    (tmp_path / "keys").write_text("plain\nvip priority=-10\nbatch priority=20\n")
    if settings.get("file"):
        settings = settings | {"api_keys_file": str(tmp_path / "keys")}
    app = build_app(Settings(threads=1, **{k: v for k, v in settings.items() if k != "file"}), {ranker.name: ranker})
    seen: set[int] = set()
    with TestClient(app) as client:
        workers = app.state.pipeline.workers
        submit = workers.submit

        def spy(chunks: Any, priority: int = 0) -> Any:
            seen.add(priority)
            return submit(chunks, priority)

        workers.submit = spy
        body = BODY if asked is None else BODY | {"priority": asked}
        assert client.post("/rerank", json=body, headers=bearer(key) if key else {}).status_code == 200
    assert seen == {given}
