"""What the metrics cost: python -m loadtest.metrics_cost [--bundles build/bundles]

The application in this process without a socket, requests one after the other. Every call of the client library is clocked, and what a
call that does nothing is clocked at is taken off: a difference of CPU seconds with and without metrics drowns in noise. Prints Markdown.
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
def clocked() -> Iterator[list[float]]:
    """Seconds of each call of the metrics' library while it is entered."""
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


def clock_seconds(calls: int = 100_000) -> float:
    """That a call of nothing is clocked at."""
    total = 0.0
    for _ in range(calls):
        begin = time.perf_counter()
        total += time.perf_counter() - begin
    return total / calls


def times(example: dict[str, Any], times: int) -> dict[str, Any]:
    """The example with as many times its candidates."""
    sent = example["candidates"]
    return example | {
        "candidates": {
            "item_ids": sent["item_ids"] * times,
            "features": {name: column * times for name, column in sent["features"].items()},
        }
    }


async def measure(bundles: Path, times_its_candidates: int) -> tuple[float, int, float]:
    """(CPU milliseconds of a request, calls of the metrics' library, and their share of these milliseconds)."""
    app = build_app(Settings(bundles=bundles), load_rankers(bundles, 1, ()))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client,
    ):
        ranker = (await client.get("/models")).json()["models"][0]["name"]
        body = (await client.get(f"/models/{ranker}")).json()["example"]
        body = times(body, times_its_candidates)

        async def spend() -> float:
            begin = time.process_time()
            for _ in range(REQUESTS):
                (await client.post("/rerank", json=body)).raise_for_status()
            return (time.process_time() - begin) / REQUESTS

        await spend()
        spent = await spend()
        with clocked() as seconds:
            await spend()
    clocks = len(seconds) * clock_seconds()
    return spent * 1e3, round(len(seconds) / REQUESTS), (sum(seconds) - clocks) / REQUESTS / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Settings().bundles)
    args = parser.parse_args()
    print(
        f"{cpu_name()}\n\n| candidates | CPU ms a request, client included | calls of the metrics' library | of these ms |\n| --- | --- | --- | --- |"
    )
    for many in (1, 8):
        spent, calls, share = asyncio.run(measure(args.bundles, many))
        print(f"| {many} times the example's | {spent:.2f} | {calls} | {share:.1%} |")


if __name__ == "__main__":
    main()
