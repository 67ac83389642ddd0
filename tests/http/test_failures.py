"""`slatewise_requests_failed_total`: what counts against the objective of availability, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from slatewise.bundle.loader import load_rankers
from slatewise.bundle.ranker import Ranker
from slatewise.errors import Overloaded, RankingError, StoreFault
from slatewise.http.app import ROUTES
from slatewise.main import build_app
from slatewise.metrics import FAILURES
from slatewise.settings import Settings
from tests.conftest import DEMO

BODY: dict[str, Any] = {"candidates": {"item_ids": ["1", "2"]}}
TEI: dict[str, Any] = {"query": "u", "texts": ["1", "2"]}
STRICT = BODY | {"allow_degraded": False}
PATHS = [*(dialect.path for dialect in ROUTES.dialects), "/events", "/feedback", "/encode"]


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    """That of the demo: nothing here depends on what it ranks."""
    return load_rankers(DEMO, ("fp32",))["movielens"]


def failed(endpoint: str) -> dict[str, float | None]:
    name = "slatewise_requests_failed_total"
    return {code: REGISTRY.get_sample_value(name, {"endpoint": endpoint, "code": code}) for code in FAILURES}


@pytest.mark.parametrize("path", PATHS)
def test_series_of_every_route_exist_before_a_failure(path: str) -> None:
    """increase() does not see the first increase of a new series."""
    assert None not in failed(path).values()


@pytest.mark.parametrize(
    ("deadline_ms", "more", "headers", "counts"),
    [
        (0.001, {}, {}, True),
        (0.001, {"deadline_ms": 0.001}, {}, False),
        (0.0, {"deadline_ms": 0.001}, {}, False),
        (0.0, {}, {"X-Request-Timeout-Ms": "0.001"}, False),
    ],
)
def test_deadline_of_the_server_counts_and_of_the_client_not(
    ranker: Ranker, deadline_ms: float, more: dict[str, Any], headers: dict[str, str], counts: bool
) -> None:
    with TestClient(build_app(Settings(threads=1, deadline_ms=deadline_ms), {ranker.name: ranker})) as client:
        before = failed("/rerank")
        assert client.post("/rerank", json=STRICT | more, headers=headers).status_code == 504
        after = failed("/rerank")
    assert [after[code] != before[code] for code in FAILURES] == [False, False, False, counts]


@pytest.mark.parametrize(
    ("path", "body", "error", "status", "failure"),
    [
        ("/rerank", BODY, RankingError("broken"), 500, "500"),
        ("/rerank", BODY, Overloaded("too much"), 429, "429"),
        ("/tei/rerank", TEI, RankingError("broken"), 424, "500"),  # as the call has it
        ("/rerank", {}, None, 422, ""),
        ("/rerank", BODY, None, 200, ""),
    ],
)
def test_failure_is_counted_by_its_native_status(
    ranker: Ranker, path: str, body: dict[str, Any], error: RankingError | None, status: int, failure: str
) -> None:
    app = build_app(Settings(threads=1), {ranker.name: ranker})
    with TestClient(app) as client:
        if error is not None:

            async def broken(*_: object) -> None:
                raise error

            app.state.pipeline.rank = broken
        before = failed(path)
        assert client.post(path, json=body).status_code == status
        after = failed(path)
    assert [code for code in FAILURES if after[code] != before[code]] == [failure] * bool(failure)


def test_events_that_are_not_stored_count(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    app = build_app(Settings(threads=1), {ranker.name: ranker})
    with TestClient(app) as client:

        async def broken(*_: object) -> None:
            raise StoreFault("Redis is away")

        monkeypatch.setattr(app.state.events, "submit", broken)
        before = failed("/events")
        assert client.post("/events", json={"user": "u", "item_id": "1"}).status_code == 503
        after = failed("/events")
    assert [after[code] != before[code] for code in FAILURES] == [False, False, True, False]


def test_key_above_its_limit_is_no_failure(ranker: Ranker, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("k rate=0.001\n")
    app = build_app(Settings(threads=1, api_keys_file=str(tmp_path / "keys")), {ranker.name: ranker})
    with TestClient(app, headers={"Authorization": "Bearer k"}) as client:
        before = failed("/rerank")
        assert [client.post("/rerank", json=BODY).status_code for _ in range(3)] == [200, 429, 429]
        assert failed("/rerank") == before
