"""The calls of /admin: who may call them, and what each one does, on a real server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from slatewise.http import wrong_keys
from slatewise.settings import Settings
from tests.http.support import ask, assert_problem, sums
from tests.support.application import serve
from tests.support.blocked_engine import BlockedMethod
from tests.support.versions import HEADERS, KEY, command, done, example_of, publish, serving, state_of, wait_until

if TYPE_CHECKING:
    from tests.conftest import Tiny


@pytest.fixture
def body(tiny: Tiny) -> dict[str, Any]:
    return example_of(tiny.folder)


@pytest.mark.parametrize("settings", [{}, {"api_keys": "user-key"}, {"admin_key": KEY, "reload": "off"}])
def test_without_its_key_nothing_of_admin_exists(tiny: Tiny, settings: dict[str, Any]) -> None:
    with serve(Settings(bundles=tiny.root, **settings)) as client:
        for path in ("/admin", "/admin/", "/admin/rankers", "/admin/rankers/tiny/load"):
            for headers in ({}, HEADERS):
                assert_problem(client.get(path, headers=headers), 404)
                assert_problem(client.post(path, headers=headers, json={}), 404)
        assert "/admin" not in client.get("/openapi.json").text
        if "api_keys" not in settings:
            assert client.get("/models").json()["models"][0]["versions"] is None


def test_only_the_admin_key_opens_admin(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrong_keys, "MOST_TRIES", 1_000)
    with serving(root, api_keys="a-user-key") as client:
        near = (f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}")
        for value in ("", "Bearer", "Bearer a-user-key", *near, "Bearer \u00fc"):
            headers = {"Authorization": value.encode("latin-1")} if value else {}
            assert_problem(client.get("/admin/rankers", headers=headers), 401)
            assert_problem(client.post("/admin/rankers/tiny/load", headers=headers, content=b"{"), 401)
        assert client.get("/admin/rankers", headers=HEADERS).json()["mode"] == "admin"
        assert_problem(client.get("/models", headers=HEADERS), 401)
        document = client.get("/openapi.json").json()
        assert document["paths"]["/admin/rankers/{ranker}/switch"]["post"]["security"] == [{"admin": []}]
        assert document["components"]["securitySchemes"]["admin"]["scheme"] == "bearer"


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"[]", 422), (b'{"version": "x"}', 422), (b'{"version": -1}', 422), (b'{"other": 1}', 422)],
)
def test_wrong_body_of_a_command_is_a_problem(server: httpx.Client, content: bytes, status: int) -> None:
    headers = HEADERS | {"Content-Type": "application/json"}
    assert_problem(server.post("/admin/rankers/tiny/load", content=content, headers=headers), status)


def test_life_of_a_version(server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any]) -> None:
    """Loaded, served, rolled back, pinned, unloaded; each call twice, since each may be repeated."""
    publish(tiny.folder, root, 2)
    publish(tiny.folder, root, 3)
    for _ in range(2):
        state = done(server, "load", version=2)
        assert (state["version"], state["candidate"]["version"]) == (1, 2)
        assert ask(server, body, "/rerank")["version"] == 1
    assert_problem(command(server, "load", version=3), 409)
    for _ in range(2):
        state = done(server, "promote", version=2)
        assert (state["version"], state["previous"], state["candidate"]) == (2, 1, None)
        assert ask(server, body, "/rerank")["version"] == 2
    for _ in range(2):
        assert done(server, "switch", version=3)["version"] == 3
    for _ in range(2):
        state = done(server, "roll-back", version=3)
        assert (state["version"], state["previous"]) == (2, None)
        assert ask(server, body, "/rerank")["version"] == 2
    for _ in range(2):
        assert done(server, "pin", version=1)["pinned"]
    assert not done(server, "unpin")["pinned"]
    done(server, "load", version=2)
    for _ in range(2):
        assert done(server, "unload", version=2)["candidate"] is None
    assert state_of(server)["last_load"]["outcome"] == "loaded"
    assert server.get("/v2/models/tiny/versions/1").status_code == 200
    # Of one variant: other tests of this process have left series of other bundles.
    variant = server.get("/models/tiny").json()["default_variant"]
    series = f'slatewise_model_info{{ranker="tiny",variant="{variant}",version="%d"}} 1.0'
    lines = server.get("/metrics").text.splitlines()
    assert [series % version in lines for version in (1, 2, 3)] == [True, False, False]


def test_commands_that_do_not_fit_change_nothing(server: httpx.Client, tiny: Tiny, root: Path) -> None:
    assert_problem(command(server, "load", "none", version=1), 404)
    assert_problem(command(server, "switch", version=9), 404)
    assert_problem(command(server, "switch", "..", version=1), 404)
    for action in ("load", "switch", "pin"):
        assert "/version" in assert_problem(command(server, action), 422)["detail"]
    for action in ("promote", "canary", "shadow"):
        assert_problem(command(server, action, **({} if action == "promote" else {"share": 0.1})), 409)
    assert_problem(command(server, "roll-back"), 409)
    assert_problem(command(server, "unload", version=1), 409)
    assert_problem(command(server, "canary", version=1, share=0.6), 422)
    assert_problem(command(server, "canary", version=1, share=0.1), 409)
    state = state_of(server)
    assert (state["version"], state["candidate"], state["last_load"]) == (1, None, None)


def test_a_new_ranker_appears_and_is_unloaded(
    server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any]
) -> None:
    copy = publish(tiny.folder, root / "elsewhere", 4)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"ranker": "tiny"', '"ranker": "other"'))
    (root / "other").mkdir()
    copy.rename(root / "other" / "4")
    assert_problem(command(server, "load", "other", version=4), 404)
    assert done(server, "switch", "other", version=4)["version"] == 4
    assert ask(server, body, "/rerank", ranker="other")["version"] == 4
    assert {model["name"] for model in server.get("/models").json()["models"]} == {"tiny", "other"}
    for _ in range(2):
        assert done(server, "unload", "other", version=4)["version"] is None
    assert ask(server, body, "/rerank")["ranker"] == "tiny"
    assert_problem(server.post("/rerank", json=body | {"ranker": "other"}), 404)


def test_refused_version_keeps_the_old_one_and_says_why(
    server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any]
) -> None:
    folder = publish(tiny.folder, root, 2)
    (folder / "items.npy").write_bytes(b"broken")
    before = sums(server, 'slatewise_model_reloads_total{outcome="rejected"}')
    problem = assert_problem(command(server, "switch", version=2), 422)
    assert "items.npy does not have the manifest's sha256" in problem["detail"]
    assert ask(server, body, "/rerank")["version"] == 1
    attempt = state_of(server)["last_load"]
    assert (attempt["version"], attempt["outcome"]) == (2, "rejected") and "items.npy" in attempt["reason"]
    assert sums(server, 'slatewise_model_reloads_total{outcome="rejected"}') == [before[0] + 1]


def test_one_command_at_a_time(
    server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a version loads: requests are served, the same command joins it, another one gets 409."""
    publish(tiny.folder, root, 2)
    from slatewise.inference.engine import Engine

    entered, may_go = threading.Event(), threading.Event()
    original = Engine.__init__

    def slow_start(engine: Engine, *arguments: Any, **options: Any) -> None:
        entered.set()
        assert may_go.wait(30)
        original(engine, *arguments, **options)

    monkeypatch.setattr(Engine, "__init__", slow_start)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(command(server, "switch", version=2).status_code))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert entered.wait(30)
    problem = assert_problem(command(server, "unload"), 409)
    assert "switch tiny version 2" in problem["detail"]
    assert ask(server, body, "/rerank")["version"] == 1
    assert server.get("/admin/rankers", headers=HEADERS).json()["running"] == "switch tiny version 2"
    may_go.set()
    for thread in threads:
        thread.join(30)
    assert answers == [200, 200] and ask(server, body, "/rerank")["version"] == 2


def test_request_in_flight_ends_on_its_version_and_then_it_is_freed(
    server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tiny.folder, root, 2)
    done(server, "load", version=2)
    stop = BlockedMethod("set", monkeypatch)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask(server, body, "/rerank")["version"]))
    thread.start()
    assert stop.begun.wait(30)
    state = done(server, "promote")
    assert (state["version"], state["in_use"]) == (2, [1])
    stop.may_end.set()
    thread.join(30)
    assert found == [1]
    wait_until(lambda: state_of(server)["in_use"] == [], "the old version is freed")


def test_states_of_a_replaced_version_are_dropped(
    server: httpx.Client, tiny: Tiny, root: Path, body: dict[str, Any]
) -> None:
    """A history that was kept by one version is not used by another, also not by one with the same number."""
    user = {**body, "user": "kept"}
    assert ask(server, user, "/rerank")["history"]["cache"] == "miss"
    assert ask(server, user, "/rerank")["history"]["cache"] == "hit"
    kept = sums(server, "slatewise_history_cache_bytes ")
    publish(tiny.folder, root, 2)
    done(server, "switch", version=2)
    assert ask(server, user, "/rerank")["history"]["cache"] == "miss"
    wait_until(lambda: sums(server, "slatewise_history_cache_bytes ") == kept, "only the new state is kept")
