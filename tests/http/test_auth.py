"""API keys."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from slatewise.bundle.ranker import Ranker
from slatewise.http import wrong_keys
from slatewise.http.auth import RequireKey
from slatewise.http.keys import Keys
from slatewise.main import build_app
from slatewise.settings import Settings
from tests.conftest import Tiny
from tests.http.support import (
    assert_problem,
)
from tests.support.application import serve

PAGES = (
    "/",
    "/docs",
    "/docs/oauth2-redirect",
    "/openapi.json",
    "/static-offline-docs/swagger-ui-bundle.js",
    "/static-offline-docs/swagger-ui.css",
)


def test_api_key_is_required_except_on_open_paths(
    tiny: Tiny, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrong_keys, "MOST_TRIES", 1_000)

    def refused() -> float:
        return REGISTRY.get_sample_value("slatewise_rejected_total", {"reason": "key"}) or 0.0

    with serve(Settings(bundles=tiny.root, api_keys="first, second")) as client:  # type: ignore[arg-type]
        for path in ("/livez", "/readyz", "/metrics", *PAGES):
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
            for path in ("/models", "/no-such-path", "/doc", "/docsx", "/static-offline-docs", "/page"):
                assert_problem(client.get(path, headers=raw), 401)
        for key in ("first", "second"):
            assert client.post("/score", json=example, headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_setting_closes_the_pages(ranker: Ranker) -> None:
    app = build_app(Settings(api_keys="key", open_pages=False), {ranker.name: ranker})  # type: ignore[arg-type]
    with TestClient(app) as client:
        for path in PAGES:
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer key"}).status_code == 200
        assert client.get("/livez").status_code == 200


def test_open_path_with_a_slash_stands_for_all_below() -> None:
    async def app(*_: object) -> None: ...

    layer = RequireKey(app, Keys(["key"]), (), ("/", "/docs", "/static/"))
    assert all(map(layer.is_open, ("/", "/docs", "/static/a", "/static/a/b", "/static/")))
    assert not any(map(layer.is_open, ("", "/rerank", "/docs/", "/docs/a", "/static", "/statics/a", "//static/a")))
