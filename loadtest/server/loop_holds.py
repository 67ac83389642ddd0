"""How long a body holds the event loop: python -m loadtest.server.loop_holds [--above 5] [--only TEXT]

The application runs in this process with the committed demo. Each body of `hostile_bodies.py` is posted to it three
times, while a task of its own notes how long it had to wait for its turn. The longest wait of a request is its hold;
the median of three is printed, as a Markdown table. Exits with 1 if one is above 10 ms.

Called by: the command line. Calls: `slatewise/main.py`, `hostile_bodies.py`. Its numbers are in docs/operating.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.markdown import table
from loadtest.server.hostile_bodies import Body, bodies
from slatewise.bundle.loader import load_rankers
from slatewise.main import build_app
from slatewise.settings import Settings

BUNDLES = Path(__file__).parents[2] / "models" / "bundles"
BOUND_MS = 10.0
REPEATS = 3


class Ticker:
    """A task that notes its longest wait between two turns."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.task = asyncio.ensure_future(self.run())

    async def run(self) -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            self.longest = max(self.longest, now - before)
            before = now

    def read(self) -> float:
        longest, self.longest = self.longest, 0.0
        return longest


async def post(app: Any, body: Body) -> int:
    """Call the application with one request. Returns the status of the answer."""
    status = 0
    sent = asyncio.Event()
    headers = [(name.lower().encode(), value.encode()) for name, value in body.headers.items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": body.path,
        "raw_path": body.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-length", str(len(body.content)).encode()), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }

    async def receive() -> dict[str, Any]:
        if sent.is_set():
            await asyncio.Event().wait()  # no disconnect
        sent.set()
        return {"type": "http.request", "body": body.content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    await app(scope, receive, send)
    return status


async def measure(only: str) -> list[tuple[Body, int, float]]:
    settings = Settings(bundles=BUNDLES, threads=1, variants="fp32")
    rankers = load_rankers(settings.bundles, settings.chosen_variants())
    app = build_app(settings, rankers)
    gc.collect()
    gc.freeze()
    found = []
    async with app.router.lifespan_context(app):
        ticker = Ticker()
        for body in bodies(next(iter(rankers))):
            if only not in f"{body.path} {body.name}":
                continue
            holds = []
            for _ in range(REPEATS):
                ticker.read()
                status = await post(app, body)
                await asyncio.sleep(0.01)  # what comes after the answer counts too
                holds.append(ticker.read() * 1e3)
            found.append((body, status, median(holds)))
        ticker.task.cancel()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--above", type=float, default=0.0, help="print holds of at least so many milliseconds")
    parser.add_argument("--only", default="", help="part of path and name")
    given = parser.parse_args()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the log has a line for each refusal
        found = sorted(asyncio.run(measure(given.only)), key=lambda row: -row[2])
    rows = [(b.path, b.name, len(b.content), status, f"{ms:.1f}") for b, status, ms in found if ms >= given.above]
    print(table(("path", "body", "bytes", "status", "held, ms"), rows))
    over = sum(ms > BOUND_MS for _, _, ms in found)
    print(f"\n{len(found)} bodies, {over} above {BOUND_MS:g} ms")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
