"""API keys."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY

from slatewise.settings import Settings
from tests.conftest import Tiny
from tests.http.support import (
    assert_problem,
)
from tests.support.application import serve


def test_api_key_is_required_except_on_open_paths(tiny: Tiny, example: dict[str, Any]) -> None:
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
