"""The OpenAPI document and the page /docs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openapi_spec_validator import validate
from playwright.sync_api import Browser
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from slatewise.bundle.ranker import Ranker
from slatewise.http import app as application
from slatewise.http.openapi import EXAMPLE, example_request
from slatewise.main import build_app
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from tests.conftest import Tiny
from tests.support.application import serve


def test_generated_requests_conform_to_the_openapi_document(client: httpx.Client) -> None:
    """Schemathesis, for every operation: no undocumented status or content type, no server error, no bad data accepted.

    Valid data may be refused: a schema cannot express equal lengths of columns, or the heads of a ranker.
    """
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json", wait_for_schema=5)
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def holds(case: schemathesis.Case) -> None:
            answer = case.call_and_validate(excluded_checks=[positive_data_acceptance, not_a_server_error])
            assert answer.status_code in (
                200,
                202,
                204,
                400,
                404,
                405,
                406,
                408,
                411,
                413,
                415,
                422,
                503,
                504,
            )  # 500 is documented, too, but must not happen

        holds()


def test_docs_page_loads_nothing_from_other_hosts(client: httpx.Client) -> None:
    page = client.get("/docs").text
    assert "://" not in page.replace("http://www.w3.org", "")
    for path in ("swagger-ui-bundle.js", "swagger-ui.css"):
        found = next(part for part in page.split('"') if part.endswith(path))
        assert client.get(found).status_code == 200


def document_of(ranker: Ranker, **settings: Any) -> dict[str, Any]:
    with TestClient(build_app(Settings(**settings), {ranker.name: ranker})) as client:
        document: dict[str, Any] = client.get("/openapi.json").json()
    validate(document)
    return document


@pytest.mark.parametrize("keys", ["", "key"])
def test_example_works_as_it_stands(ranker: Ranker, keys: str) -> None:
    app = build_app(Settings(api_keys=keys), {ranker.name: ranker})  # type: ignore[arg-type]
    with TestClient(app, headers={"Authorization": "Bearer key"}) as client:
        paths = client.get("/openapi.json").json()["paths"]
        for path in ("/rerank", "/score"):
            example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
            answer = client.post(path, json=example)
            assert answer.status_code == 200 and len(answer.json()["results"]["scores"]) >= 3
            shown = json.dumps(ranker.manifest.example["user"]) in json.dumps(example)
            assert shown == (not keys), "an open page shows nothing of the bundle"


def test_example_names_a_ranker_if_several_are_served(ranker: Ranker) -> None:
    other = dataclasses.replace(ranker, manifest=ranker.manifest.model_copy(update={"ranker": "other"}))
    for show_data in (False, True):
        example = example_request((other, ranker), show_data)
        assert example["ranker"] == "other"
        RankRequest.model_validate(example)
    assert "ranker" not in example_request((ranker,), False) and example_request((), True) == EXAMPLE


def test_document_with_keys_has_a_security_scheme(ranker: Ranker) -> None:
    document = document_of(ranker, api_keys="key")
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["security"] == [{"key": []}]
    opened = {path for path, item in document["paths"].items() for one in item.values() if one.get("security") == []}
    assert opened == {"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}
    document = document_of(ranker)
    assert "security" not in document and "securitySchemes" not in document["components"]


def test_document_is_completed_once(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, before a request can come: building it would hold the event loop."""
    calls: list[Any] = []
    complete = application.complete
    monkeypatch.setattr(application, "complete", lambda *given: calls.append(complete(*given)))
    app = build_app(Settings(api_keys="key"), {ranker.name: ranker})  # type: ignore[arg-type]
    with TestClient(app) as client:
        assert len(calls) == 1 and app.openapi_schema
        first, second = (client.get("/openapi.json").json() for _ in range(2))
    assert first == second and len(calls) == 1


def test_operation_ids_are_names_for_clients(ranker: Ranker) -> None:
    document = document_of(ranker)
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert {"rerank", "score", "list_models", "show_model", "livez", "readyz", "metrics"} <= set(names)
    assert len(names) == len(set(names)) and all(name.isidentifier() for name in names)


def test_request_is_tried_out_on_the_page_with_a_key(browser: Browser, tiny: Tiny) -> None:
    """As a person does: Authorize, Try it out, Execute. Before the key the same call is refused."""
    with (
        serve(Settings(bundles=tiny.root, api_keys="the-key")) as client,  # type: ignore[arg-type]
        browser.new_page() as page,
    ):
        page.goto(f"{client.base_url}/docs")
        page.locator("#operations-default-rerank .opblock-summary").click()
        page.locator("#operations-default-rerank .try-out__btn").click()
        for key, status in ((None, "401"), ("the-key", "200")):
            if key is not None:
                page.locator(".scheme-container .authorize").click()
                page.locator(".modal-ux input").fill(key)
                page.locator(".modal-ux button.authorize").click()
                page.locator(".modal-ux button.btn-done").click()
            page.locator("#operations-default-rerank .execute").click()
            row = page.locator("#operations-default-rerank .live-responses-table .response-col_status", has_text=status)
            row.wait_for(timeout=20_000)
        assert (
            '"results"'
            in page.locator(
                "#operations-default-rerank .live-responses-table .response-col_description"
            ).last.inner_text()
        )
