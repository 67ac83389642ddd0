"""The real libraries ask the served demo: same order as the native call, and errors as each library raises them.

The libraries run in child processes, so that their warnings and their event loops stay there.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from slatewise.ranking.pipeline import Pipeline
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.http.calls.support import COHERE_7, DOCUMENT, FILMS, KEY, MODEL, PAST, USER, Child, native_order
from tests.support.application import serve

HOLDER = "holds-the-only-place"


@pytest.fixture(scope="module")
def busy() -> Iterator[str]:
    """The address of a server whose only place is taken, by a request that is not answered."""
    settings = Settings(bundles=DEMO, api_keys=KEY, max_in_flight=1)  # type: ignore[arg-type]
    body = json.dumps({"user": HOLDER, "candidates": {"item_ids": ["1"]}})
    head = f"POST /rerank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    rank = Pipeline.rank

    async def hold(pipeline: Pipeline, request: RankRequest, *arguments: Any, **options: Any) -> Any:
        if request.user == HOLDER:
            await asyncio.Event().wait()
        return await rank(pipeline, request, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, serve(settings) as client:
        patch.setattr(Pipeline, "rank", hold)
        with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
            connection.sendall((head + body).encode())
            while "slatewise_requests_in_flight 1.0" not in client.get("/metrics").text:
                pass
            yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="module")
def found(demo: httpx.Client, busy: str) -> dict[str, Any]:
    """What the libraries returned or raised, by child process. All children run at the same time."""
    given = {
        "url": str(demo.base_url).rstrip("/"),
        "busy": busy,
        "key": KEY,
        "model": MODEL,
        "user": USER,
        "films": FILMS,
        "history": json.dumps(PAST),
        "late": json.dumps({"user": USER, "deadline_ms": 0.001, "allow_degraded": False}),
        "soon": json.dumps({"user": USER, "deadline_ms": 0.001}),
    }
    examples = examples_of_the_document(demo)
    children = {
        "litellm": Child("ask_litellm.py", given | {"examples": examples["litellm"]}),
        "cohere 5": Child("ask_cohere.py", given | {"examples": examples["cohere"]}),
        "cohere 7": Child("ask_cohere.py", given | {"examples": examples["cohere"]}, first_on_path=COHERE_7),
        "others": Child("ask_others.py", given | {"examples": examples["others"]}),
    }
    return {name: child.result() for name, child in children.items()}


def examples_of_the_document(demo: httpx.Client) -> dict[str, list[str]]:
    """The Python examples of docs/calls.md for the address of the demo, by the child process that has their library."""
    found: dict[str, list[str]] = {"litellm": [], "cohere": [], "others": []}
    text = DOCUMENT.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{demo.base_url.port}")
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        libraries = set(re.findall(r"^(?:import|from) (\w+)", example, re.MULTILINE))
        child = "litellm" if libraries & {"litellm", "rerankers"} else "cohere" if "cohere" in libraries else "others"
        found[child].append(example)
    return found


def test_examples_of_the_document_print_the_native_order(
    found: dict[str, Any], plain: list[str], past: list[str]
) -> None:
    assert found["litellm"]["examples"] == [str(plain[:3])] * 2
    for version in ("cohere 5", "cohere 7"):
        assert found[version]["examples"] == [str(plain[:3]), str(past[:3])]
    assert found["others"]["examples"] == [str(plain[:3])] * 3


@pytest.fixture(scope="module")
def plain(demo: httpx.Client) -> list[str]:
    return native_order(demo)


@pytest.fixture(scope="module")
def past(demo: httpx.Client) -> list[str]:
    return native_order(demo, **PAST)


def test_orders_to_compare_differ_from_the_input(plain: list[str], past: list[str]) -> None:
    assert plain != FILMS and past != FILMS and plain[:3] != past[:3]


@pytest.mark.parametrize("version", ["5", "7"])
def test_cohere_returns_the_native_order(
    found: dict[str, Any], plain: list[str], past: list[str], version: str
) -> None:
    asked = found[f"cohere {version}"]
    assert asked["version"].split(".")[0] == version
    assert asked["async"] == {"v1": past, "v2": past}
    assert asked["objects"] == plain
    for name in ("v1", "v2"):
        client = asked[name]
        assert client["plain"] == plain and client["history"] == past and client["top"] == plain[:2]
        assert client["scores"] == sorted(client["scores"], reverse=True) and client["units"] == 1
        assert client["models"] == [MODEL]
        assert "no model scored this request" in client["degraded"][0]


@pytest.mark.parametrize("version", ["5", "7"])
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_cohere_raises_the_class_of_each_status(found: dict[str, Any], version: str, name: str) -> None:
    client = found[f"cohere {version}"][name]
    for case, expected in {
        "empty": ("UnprocessableEntityError", 422, "/documents: "),
        "type": ("UnprocessableEntityError", 422, "/documents/1: must be the id of an item"),
        "many": ("UnprocessableEntityError", 422, "/documents: 5000 candidates, limit 4096"),
        "model": ("NotFoundError", 404, f"no such ranker; served: {MODEL}"),
        "key": ("UnauthorizedError", 401, "an `Authorization: Bearer`"),
        "busy": ("TooManyRequestsError", 429, "more than 1 requests are in flight"),
        "deadline": ("GatewayTimeoutError", 504, "not done within"),
    }.items():
        raised, status, message, retry_after = client[case]
        assert (raised, status) == expected[:2] and message.startswith(expected[2]), case
        assert retry_after == ("1" if status == 429 else None)


def test_litellm_returns_the_native_order(found: dict[str, Any], plain: list[str], past: list[str]) -> None:
    asked = found["litellm"]
    for provider in ("cohere", "jina_ai", "hosted_vllm", "huggingface"):
        assert asked[provider] == plain, provider
    assert asked["history"] == past
    assert asked["infinity"][0] == "APIConnectionError", "docs/calls.md says that this provider does not work"


def test_litellm_raises_its_own_errors(found: dict[str, Any]) -> None:
    asked = found["litellm"]
    assert asked["key"] == ["AuthenticationError", 401]
    assert asked["empty"] == asked["many"] == ["BadRequestError", 422]
    assert asked["busy"] == ["RateLimitError", 429]
    assert asked["deadline"] == ["Timeout", 504]


def test_rerankers_returns_the_native_order(found: dict[str, Any], plain: list[str]) -> None:
    for provider, order in found["litellm"]["rerankers"].items():
        assert order == plain, provider


def test_langchain_returns_the_native_order(found: dict[str, Any], plain: list[str], past: list[str]) -> None:
    assert found["others"]["langchain"] == {"objects": plain, "texts": past, "pages": plain}


def test_boto3_returns_the_native_order(found: dict[str, Any], plain: list[str]) -> None:
    assert found["others"]["aws"]["plain"] == plain
    assert found["others"]["aws"]["many"] == 1000, "AWS stops at 500"


def test_boto3_raises_the_exceptions_of_aws(found: dict[str, Any]) -> None:
    asked = found["others"]["aws"]
    for case in ("too many", "empty"):
        assert asked[case] == ["InvalidInputException", "InvalidInputException", 400]
    assert asked["model"] == ["ResourceNotFoundException", "ResourceNotFoundException", 404]
    assert asked["key"] == ["ClientError", "UnrecognizedClientException", 403]
    assert asked["busy"] == ["ClientError", "ThrottlingException", 429]


def test_tritonclient_returns_the_native_order(found: dict[str, Any], plain: list[str], past: list[str]) -> None:
    asked = found["others"]["oip"]
    for case in ("binary", "json", "by version", "packed"):
        assert asked[case] == plain, case
    for case in ("history", "history json"):
        assert asked[case] == past, case
    assert asked["mixed"] == [plain, "r1", [len(FILMS)]]


def test_tritonclient_sees_health_and_metadata(found: dict[str, Any]) -> None:
    asked = found["others"]["oip"]
    assert asked["health"] == [True, True] and asked["ready"] == [True, True, False, False]
    assert asked["server"]["name"] == "slatewise" and asked["server"]["extensions"] == ["binary_tensor_data"]
    assert asked["model"]["name"] == MODEL and asked["version"]
    names = {tensor["name"] for tensor in asked["model"]["inputs"]}
    assert {"user", "candidates.item_ids", "history.item_ids", "features.year", "fields.genres"} <= names


def test_tritonclient_raises_with_status_and_text(found: dict[str, Any]) -> None:
    asked = found["others"]["oip"]
    for case, status, text in (
        ("unknown version", "404", "no such version; served: "),
        ("empty", "422", "candidates.item_ids/0: "),
        ("type", "422", "candidates.item_ids/0: "),
        ("many", "422", "candidates.item_ids: 5000 values, limit 4096"),
        ("input", "422", "inputs: unknown name; known: user, "),
        ("deadline", "504", "not done within"),
        ("key", "401", "with a valid key is needed"),
        ("busy", "429", "more than 1 requests are in flight"),
    ):
        raised, found_status, message = asked[case]
        assert (raised, found_status) == ("InferenceServerException", status) and text in message, case
