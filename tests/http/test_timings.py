"""Request counts and stage times, in responses and in the metrics."""

from __future__ import annotations

import statistics
from typing import Any

import httpx
import pytest

from tests.http.support import (
    SHAPES,
    ask,
    shaped,
    sums,
)


def test_metrics_count_each_request_and_stage_once(client: httpx.Client, example: dict[str, Any]) -> None:
    def value(name: str) -> float:
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in client.get("/metrics").text.splitlines() if line.startswith(name)
        )

    requests = 'slatewise_requests_total{code="200",endpoint="/rerank",ranker="tiny",variant="fp32",version="1"}'
    names = [
        requests,
        *(
            f'slatewise_stage_duration_seconds_count{{stage="{s}"}}'
            for s in ("parse", "features", "score", "serialize")
        ),
    ]
    before = {name: value(name) for name in names}
    for k in range(3):
        ask(client, example, "/rerank", user=f"metrics-{k}")
    assert {name: value(name) - before[name] for name in names} == dict.fromkeys(names, 3.0)
    refused = 'slatewise_requests_total{code="422"'
    count = value(refused)
    client.post("/rerank", json={})
    assert value(refused) - count == 1
    assert value("slatewise_requests_in_flight ") == 0


@pytest.mark.parametrize(("events", "n", "user", "exit"), SHAPES)
def test_stages_of_a_response_add_up_to_its_total(
    client: httpx.Client, example: dict[str, Any], events: int, n: int, user: str | None, exit: str
) -> None:
    """Within 5 % in the median: the machine may pause a request between its last lap and its total."""
    missing = []
    for k in range(15):
        answer = ask(client, shaped(example, events, n, f"adds-up-{events}-{k}" if user == "new" else user, exit))
        timings = answer["timings_ms"]
        total = timings.pop("total")
        assert min(timings.values()) >= 0 and answer["exit"] == exit
        assert sum(timings.values()) <= total + 0.001 * len(timings)  # each stage is rounded
        missing.append(1 - sum(timings.values()) / total)
    assert statistics.median(missing) <= 0.05


def test_stage_histograms_add_up_to_the_duration_histogram(client: httpx.Client, example: dict[str, Any]) -> None:
    names = (
        "slatewise_stage_duration_seconds_sum",
        "slatewise_request_duration_seconds_sum",
        "slatewise_request_duration_seconds_count",
    )
    before = sums(client, *names)
    for k in range(5):
        for events, n, user, exit in SHAPES:
            ask(client, shaped(example, events, n, f"histograms-{k}" if user == "new" else user, exit))
    stages, durations, count = (after - old for after, old in zip(sums(client, *names), before, strict=True))
    assert count == 5 * len(SHAPES)
    assert 0.95 * durations <= stages <= durations * (1 + 1e-9)
