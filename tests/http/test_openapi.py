"""The OpenAPI document and the page /docs."""

from __future__ import annotations

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance


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
