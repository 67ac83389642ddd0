"""`slatewise serve` with one more path, /chaos/tasks. With CHAOS_LEAK it leaks: the control of the soak test. With
CHAOS_SLOW_MS each call of the model takes so much longer.

Called by: `soak.py` and `bench.py`, as `python -m loadtest.chaos.watched_server`. Calls: `slatewise/main.py`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import onnxruntime as ort
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slatewise import main as server

TASKS = "/chaos/tasks"
LEAK = "CHAOS_LEAK"
SLOW = "CHAOS_SLOW_MS"


class Watched:
    """Answers TASKS with the number of asyncio tasks. With `leaks`, keeps every body for ever, on purpose."""

    def __init__(self, app: ASGIApp, leaks: bool) -> None:
        self.app = app
        self.leaks = leaks
        self.kept: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == TASKS:
            text = b"%d" % len(asyncio.all_tasks())
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": text})
            return

        async def keep() -> Message:
            message = await receive()
            self.kept.append(message.get("body", b""))
            return message

        await self.app(scope, keep if self.leaks else receive, send)


def slow_down(seconds: float) -> None:
    """Make each call of the model take so much longer, once the bundles are loaded."""
    run = ort.InferenceSession.run

    def slow(session: Any, *arguments: Any) -> Any:
        time.sleep(seconds)
        return run(session, *arguments)

    ort.InferenceSession.run = slow


def serve() -> int:
    build = server.build_app

    def build_watched(*arguments: Any, **options: Any) -> FastAPI:
        app = build(*arguments, **options)
        app.add_middleware(Watched, leaks=bool(os.environ.get(LEAK)))
        if slow := os.environ.get(SLOW):
            slow_down(float(slow) / 1e3)
        return app

    server.build_app = build_watched
    return server.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(serve())
