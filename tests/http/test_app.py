"""The middleware stack and the hot-route table."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.types import ASGIApp, Receive, Scope, Send

from slatewise.bundle.ranker import Ranker
from slatewise.http.app import ROUTES
from slatewise.http.auth import RequireKey
from slatewise.http.head import AnswerHead
from slatewise.http.hot_routes import HotRoutes
from slatewise.http.whole_bodies import WholeBodies
from slatewise.main import build_app
from slatewise.ranking.pipeline import Pipeline
from slatewise.settings import Settings

PATHS = [("POST", "/rerank"), ("POST", "/score"), ("GET", "/rerank"), ("GET", "/models"), ("GET", "/metrics")]
REST = [("GET", "/no-such-path"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/livez"), ("GET", "/readyz")]
OPEN = ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json")
BODY = {"candidates": {"item_ids": ["1"]}}


def app_of(ranker: Ranker, **settings: Any) -> FastAPI:
    return build_app(Settings(**settings), {ranker.name: ranker})


def ask(app: FastAPI, *requests: tuple[str, str], **headers: str) -> list[httpx.Response]:
    """Send the (method, path) pairs, all with the same small body. Return the responses."""

    async def main() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            return [
                await client.request(method, f"http://here{path}", json=BODY, headers=headers)
                for method, path in requests
            ]

    return asyncio.run(main())


class Spy:
    """Middleware that notes each request and the status of its response."""

    def __init__(self, app: ASGIApp, seen: list[tuple[str, str, int]]) -> None:
        self.app = app
        self.seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.seen.append((scope["method"], scope["path"], message["status"]))
            await send(message)

        await self.app(scope, receive, noting if scope["type"] == "http" else send)


def test_outermost_middleware_sees_every_route(ranker: Ranker) -> None:
    app = app_of(ranker)
    seen: list[tuple[str, str, int]] = []
    app.add_middleware(Spy, seen=seen)  # type: ignore[arg-type]
    answers = ask(app, *PATHS, *REST)
    assert [answer.status_code for answer in answers] == [200, 200, 405, 200, 200, 404, 200, 200, 200, 200]
    assert seen == [(m, p, a.status_code) for (m, p), a in zip(PATHS + REST, answers, strict=True)]


def test_outermost_middleware_sees_refused_requests(ranker: Ranker) -> None:
    app = app_of(ranker, api_keys="key")
    seen: list[tuple[str, str, int]] = []
    app.add_middleware(Spy, seen=seen)  # type: ignore[arg-type]
    ask(app, *PATHS)
    assert seen == [(m, p, 200 if p in OPEN else 401) for m, p in PATHS]


def test_key_is_required_on_every_route_that_is_not_open(ranker: Ranker) -> None:
    app = app_of(ranker, api_keys="key")
    for path, answer in zip(PATHS + REST, ask(app, *PATHS, *REST), strict=True):
        assert (answer.status_code == 401) == (path[1] not in OPEN)
    for answer in ask(app, *PATHS, *REST, Authorization="Bearer key"):
        assert answer.status_code in (200, 404, 405)


def test_authentication_runs_before_the_hot_routes(ranker: Ranker) -> None:
    assert [middleware.cls for middleware in app_of(ranker).user_middleware] == [
        RequireKey,
        WholeBodies,
        HotRoutes,
        AnswerHead,
    ]


def test_hot_routes_are_the_documented_ranking_routes(ranker: Ranker) -> None:
    app = app_of(ranker)
    paths = app.openapi()["paths"]
    for dialect in ROUTES.dialects:
        schema = paths[dialect.path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{dialect.body.__name__}"}


def test_hot_route_adds_no_key_to_the_scope(ranker: Ranker) -> None:
    app = app_of(ranker)
    keys: set[str] = set()

    class Keys:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)
            keys.update(scope)

    app.add_middleware(Keys)
    ask(app, ("POST", "/rerank"), ("GET", "/livez"))
    assert not [key for key in keys if "slatewise" in key]


def count(endpoint: str, code: str) -> float:
    labels = {"endpoint": endpoint, "ranker": "", "version": "", "variant": "", "code": code}
    return REGISTRY.get_sample_value("slatewise_requests_total", labels) or 0.0


def test_request_without_key_is_counted_by_endpoint(ranker: Ranker) -> None:
    app = app_of(ranker, api_keys="key")
    before = [count(path, "401") for path in ("/rerank", "/score", "/models", "/no-such-path")]
    ask(app, ("POST", "/rerank"), ("POST", "/score"), ("GET", "/models"), ("GET", "/no-such-path"))
    after = [count(path, "401") for path in ("/rerank", "/score", "/models", "/no-such-path")]
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 1, 0, 0], "paths are not a closed list"


def test_calls_of_users_are_counted_by_route_and_status(client: httpx.Client) -> None:
    event = {"user": "counted/user", "item_id": "1"}
    for method, path, body, template, status in (
        ("POST", "/events", event, "/events", 202),
        ("POST", "/events", {"eventList": []}, "/events", 400),
        ("POST", "/feedback", [], "/feedback", 200),
        ("POST", "/encode", {"user": "counted/user", "ranker": "none"}, "/encode", 404),
        ("DELETE", "/users/counted/user", None, "/users/{user}", 204),
        ("DELETE", "/users/", None, "/users/{user}", 422),
    ):
        before = count(template, str(status))
        answer = client.request(method, path, json=body)
        assert answer.status_code == status, answer.text
        assert count(template, str(status)) == before + 1


def test_head_is_get_without_the_body(client: httpx.Client) -> None:
    for path in ("/livez", "/readyz", "/models", "/", "/no-such-path", "/rerank", "/v2/health/live"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code and head.content == b"" != get.content
        for name in ("content-type", "content-length", "etag", "allow"):
            assert head.headers.get(name) == get.headers.get(name)
    assert {client.head(path).status_code for path in ("/livez", "/readyz", "/models", "/")} == {200}


def test_head_needs_a_key_where_get_does(ranker: Ranker) -> None:
    answers = ask(app_of(ranker, api_keys="key"), ("HEAD", "/models"), ("HEAD", "/livez"))
    assert [(answer.status_code, answer.content) for answer in answers] == [(401, answers[0].content), (200, b"")]


def test_unexpected_error_is_a_problem_with_the_request_id(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Pipeline, "rank", fail)
    with caplog.at_level(logging.ERROR, "slatewise"):
        (answer,) = ask(app_of(ranker), ("POST", "/score"), **{"X-Request-ID": "r-1"})
    assert (answer.status_code, answer.json()["request_id"], answer.headers["X-Request-ID"]) == (500, "r-1", "r-1")
    assert "secret" not in answer.text and "ZeroDivisionError" in caplog.text
