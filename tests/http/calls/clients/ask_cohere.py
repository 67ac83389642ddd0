"""Child process of `test_clients.py`: asks with cohere, version 5 or 7, and prints what it returned or raised."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import cohere

from examples import run_examples

OPTIONS: Any = {"max_retries": 0}


def attempt(call: Callable[[], Any]) -> Any:
    """The order of the films, or the name, status and message of the error."""
    try:
        return order(call())
    except cohere.core.api_error.ApiError as error:
        retry = (error.headers or {}).get("retry-after")
        return [type(error).__name__, error.status_code, error.body["message"], retry]


def order(answer: Any) -> list[str]:
    return [films[result.index] for result in answer.results]


given = json.load(sys.stdin)
films, user, history, model = given["films"], given["user"], given["history"], given["model"]


def clients(key: str = given["key"], url: str = given["url"]) -> dict[str, Any]:
    return {
        "v1": cohere.Client(api_key=key, base_url=url),
        "v2": cohere.ClientV2(api_key=key, base_url=url),
    }


async def ask_async() -> dict[str, Any]:
    found = {}
    for name, kind in (("v1", cohere.AsyncClient), ("v2", cohere.AsyncClientV2)):
        client = kind(api_key=given["key"], base_url=given["url"])
        found[name] = order(await client.rerank(model=model, query=history, documents=films, request_options=OPTIONS))
    return found


def ask_all(client: Any) -> dict[str, Any]:
    def ask(query: str = user, documents: list[Any] = films, model: str = model, **more: Any) -> Any:
        options = {"request_options": OPTIONS} | more
        return client.rerank(model=model, query=query, documents=documents, **options)

    whole = ask()
    return {
        "plain": order(whole),
        "scores": [result.relevance_score for result in whole.results],
        "units": whole.meta.billed_units.search_units,
        "history": attempt(lambda: ask(history)),
        "top": attempt(lambda: ask(top_n=2)),
        "empty": attempt(lambda: ask(documents=[])),
        "type": attempt(lambda: ask(documents=["1", 1.5])),
        "many": attempt(lambda: ask(documents=["1"] * 5000)),
        "model": attempt(lambda: ask(model="none")),
        "deadline": attempt(lambda: ask(given["late"])),
        "degraded": ask(given["soon"]).meta.warnings,
        "models": [entry.name for entry in client.models.list().models],
    }


def ask_once(client: Any, documents: list[Any] = films) -> Any:
    return attempt(lambda: client.rerank(model=model, query=user, documents=documents, request_options=OPTIONS))


found: dict[str, Any] = {"version": cohere.__version__, "async": asyncio.run(ask_async())}
for name, client in clients().items():
    found[name] = ask_all(client)
    found[name]["key"] = ask_once(clients(key="wrong")[name])
    found[name]["busy"] = ask_once(clients(url=given["busy"])[name])
found["objects"] = ask_once(clients()["v1"], [{"id": film} for film in films])
found["examples"] = run_examples(given["examples"])
print(json.dumps(found))
