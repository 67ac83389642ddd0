"""Requests, checks and metrics for the tests of this folder."""

from __future__ import annotations

import time
from typing import Any

import httpx
from pydantic import TypeAdapter

from slatewise.schemas import Problem, RankResponse

BOUND = 1e-5


RESPONSE = TypeAdapter(RankResponse)


def ask(client: httpx.Client, body: dict[str, Any], path: str = "/score", **more: Any) -> dict[str, Any]:
    answer = client.post(path, json=body | more)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def by_item(answer: dict[str, Any]) -> dict[str, float]:
    return dict(zip(answer["results"]["item_ids"], answer["results"]["scores"], strict=True))


def assert_problem(answer: httpx.Response, *allowed: int) -> dict[str, Any]:
    assert answer.status_code in allowed, f"{answer.status_code}: {answer.text[:300]}"
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    problem = Problem.model_validate(body)
    assert problem.status == answer.status_code
    assert problem.error == problem.message == problem.detail
    assert "Traceback" not in answer.text
    return body


def assert_alive(client: httpx.Client) -> None:
    assert client.get("/livez").status_code == 200


SHAPES = [
    (0, 1, None, "dot"),
    (10, 24, None, "point"),
    (50, 24, "new", "set"),
    (40, 200, "kept", "set"),
    (128, 1000, None, "set"),
    (128, 2000, "kept", "point"),
]


def shaped(example: dict[str, Any], events: int, n: int, user: str | None, exit: str) -> dict[str, Any]:
    """The example with another number of events and candidates."""
    history = {name: (column * 4)[:events] for name, column in example["history"].items()} | {
        "timestamps": list(range(10**9, 10**9 + events))
    }
    ids = (example["candidates"]["item_ids"] * 100)[:n]
    body = {name: value for name, value in example.items() if name != "user"} | {
        "history": history,
        "candidates": {"item_ids": ids},
        "exit": exit,
    }
    return body if user is None else body | {"user": user}


def sums(client: httpx.Client, *names: str) -> list[float]:
    """Values of metrics, summed over all labels."""
    lines = client.get("/metrics").text.splitlines()
    return [sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)) for name in names]


def wait_for(client: httpx.Client, name: str, value: float) -> None:
    give_up = time.monotonic() + 30
    while sums(client, name) != [value]:
        assert time.monotonic() < give_up, f"{name} is {sums(client, name)}, not {value}"
        time.sleep(0.02)
