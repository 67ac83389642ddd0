"""What the metrics cost: python -m loadtest.metrics_cost [--bundles build/bundles]

The application in this process without a socket, requests one after the other. Every call of the client library is clocked from outside,
clocks included, so the share is an upper bound: a difference of CPU seconds with and without metrics drowns in noise. Prints Markdown.
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

from app.bundle import load_rankers
from app.engine import processor
from app.main import create_app
from app.settings import Settings

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


async def measure(bundles: Path, exit: str) -> tuple[float, int, float]:
    """(CPU milliseconds of a request, calls of the metrics' library, and their share of these milliseconds)."""
    app = create_app(Settings(bundles=bundles), load_rankers(bundles, 1, ()))
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        ranker = (await client.get("/models")).json()["models"][0]["name"]
        body = (await client.get(f"/models/{ranker}")).json()["example"] | {"exit": exit}

        async def spend() -> float:
            begin = time.process_time()
            for _ in range(REQUESTS):
                (await client.post("/rerank", json=body)).raise_for_status()
            return (time.process_time() - begin) / REQUESTS

        await spend()
        spent = await spend()
        with clocked() as seconds:
            await spend()
    return spent * 1e3, round(len(seconds) / REQUESTS), sum(seconds) / REQUESTS / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Settings().bundles)
    args = parser.parse_args()
    print(f"{processor()}\n\n| exit | CPU ms a request, client included | calls of the metrics' library | at most of these ms |\n| --- | --- | --- | --- |")
    for exit in ("auto", "dot"):
        spent, calls, share = asyncio.run(measure(args.bundles, exit))
        print(f"| {exit} | {spent:.2f} | {calls} | {share:.1%} |")


if __name__ == "__main__":
    main()
