"""CPU time of the metrics: python -m loadtest.observability.metrics_cost [--bundles build/bundles]

Runs the application in this process without a socket, one request at a time, and times each call of the metrics
library. The measured time of an empty call is subtracted. The difference of CPU time with and without metrics would be
smaller than its noise. Prints Markdown.

Called by: the command line. Its numbers appear in docs/metrics.md. Calls: `slatewise/main.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
from prometheus_client import Counter, Gauge, Histogram

from loadtest.markdown import table
from slatewise.bundle.loader import load_rankers
from slatewise.main import build_app
from slatewise.process import cpu_name
from slatewise.settings import Settings

REQUESTS = 1_000
CALLS = (
    (Counter, "inc"),
    (Counter, "labels"),
    (Gauge, "set"),
    (Gauge, "inc"),
    (Gauge, "dec"),
    (Gauge, "labels"),
    (Histogram, "observe"),
    (Histogram, "labels"),
)


@contextmanager
def timed_calls() -> Iterator[list[float]]:
    """Yield a list that collects the seconds of each call of the metrics library."""
    seconds: list[float] = []

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                seconds.append(time.perf_counter() - begin)

        return timed

    with ExitStack() as stack:
        for kind, name in CALLS:
            stack.enter_context(patch.object(kind, name, around(getattr(kind, name))))
        yield seconds


def timer_overhead(calls: int = 100_000) -> float:
    """Measured seconds of an empty call."""
    total = 0.0
    for _ in range(calls):
        begin = time.perf_counter()
        total += time.perf_counter() - begin
    return total / calls


def repeat_candidates(example: dict[str, Any], times: int) -> dict[str, Any]:
    """The example with its candidates `times` times."""
    sent = example["candidates"]
    return example | {
        "candidates": {
            "item_ids": sent["item_ids"] * times,
            "features": {name: column * times for name, column in sent["features"].items()},
        }
    }


async def measure(bundles: Path, times: int) -> tuple[float, int, float]:
    """(CPU milliseconds of a request, calls of the metrics library, their share of the CPU time)."""
    app = build_app(Settings(bundles=bundles), load_rankers(bundles, ()))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client,
    ):
        ranker = (await client.get("/models")).json()["models"][0]["name"]
        body = (await client.get(f"/models/{ranker}")).json()["example"]
        body = repeat_candidates(body, times)

        async def spend() -> float:
            begin = time.process_time()
            for _ in range(REQUESTS):
                (await client.post("/rerank", json=body)).raise_for_status()
            return (time.process_time() - begin) / REQUESTS

        await spend()
        spent = await spend()
        with timed_calls() as seconds:
            await spend()
    clocks = len(seconds) * timer_overhead()
    return spent * 1e3, round(len(seconds) / REQUESTS), (sum(seconds) - clocks) / REQUESTS / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Settings().bundles)
    args = parser.parse_args()
    rows = []
    for times in (1, 8):
        spent, calls, share = asyncio.run(measure(args.bundles, times))
        rows.append((f"{times} times the example's", f"{spent:.2f}", calls, f"{share:.1%}"))
    titles = (
        "candidates",
        "CPU ms a request, client included",
        "calls of the metrics library",
        "share of the CPU time",
    )
    print(f"{cpu_name()}\n\n{table(titles, rows)}")


if __name__ == "__main__":
    main()
