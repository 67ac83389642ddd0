"""`slatewise serve` with one more path, /chaos/tasks, and a leak if CHAOS_LEAK is set: the control of the soak test.

Called by: `soak.py`, as `python -m loadtest.chaos.watched_server`. Calls: `slatewise/main.py`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slatewise import main as server

TASKS = "/chaos/tasks"
LEAK = "CHAOS_LEAK"


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


def serve() -> int:
    build = server.build_app

    def build_watched(*arguments: Any, **options: Any) -> FastAPI:
        app = build(*arguments, **options)
        app.add_middleware(Watched, leaks=bool(os.environ.get(LEAK)))
        return app

    server.build_app = build_watched
    return server.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(serve())
