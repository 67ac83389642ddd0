"""The routes that rank: found by path, called past FastAPI, and documented in its router.

Called by: `app.py` and `auth.py`. Calls: `rank.py`, `metrics.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from slatewise import metrics
from slatewise.errors import NotFound
from slatewise.http.dialect import Dialect
from slatewise.http.rank import answer

NO_PARAMETERS: Mapping[str, str] = {}


class Routes:
    """Finds the dialect of a request. A path without parameters costs one look-up in a dictionary."""

    def __init__(self, dialects: Collection[Dialect[Any]]) -> None:
        self.dialects = dialects
        for dialect in dialects:
            metrics.show_endpoint(dialect.path)
        self.exact = {dialect.path: dialect for dialect in dialects if "{" not in dialect.path}
        self.patterns: list[tuple[re.Pattern[str], Dialect[Any]]] = [
            (compile_path(dialect.path)[0], dialect) for dialect in dialects if "{" in dialect.path
        ]

    def find(self, scope: Scope) -> tuple[Dialect[Any], Mapping[str, str]] | None:
        """Return the dialect and the parameters in the path; `None` for all other requests."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return None
        path = scope["path"]
        if (dialect := self.exact.get(path)) is not None:
            return dialect, NO_PARAMETERS
        for pattern, dialect in self.patterns:
            if match := pattern.match(path):
                return dialect, match.groupdict()
        return None


class HotRoutes:
    """Middleware that answers the requests of its routes directly, and passes all other requests on to FastAPI.

    FastAPI's layers around an endpoint (matching, dependencies, exit stacks) cost more time than reading the request
    (docs/performance.md), and these routes do not need them. `answer` responds to errors itself.
    """

    def __init__(self, app: ASGIApp, routes: Routes) -> None:
        self.app = app
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self.routes.find(scope)
        if found is None:
            return await self.app(scope, receive, send)
        entered = scope.get("entered") or time.perf_counter()
        response = await answer(Request(scope, receive), *found, entered)
        await response(scope, receive, send)


def document_hot_routes(app: FastAPI, dialects: Collection[Dialect[Any]]) -> None:
    """Add the hot routes to the router, for two purposes: the OpenAPI document, and status 405 for other methods.

    The dialects parse the body themselves, so the name of its schema is stated here; `openapi.py` adds the schema.
    """
    for dialect in dialects:
        schema = {"$ref": f"#/components/schemas/{dialect.body.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in compile_path(dialect.path)[2]
        ]
        app.add_api_route(
            dialect.path,
            other_path,
            methods=["POST"],
            name=dialect.name,
            description=dialect.description,
            response_model=dialect.answer,
            responses=dict(dialect.responses),
            openapi_extra={"requestBody": body} | ({"parameters": parameters} if parameters else {}),
        )


async def other_path(request: Request) -> Response:
    """Endpoint of the hot routes in the router. `HotRoutes` answers their requests first, so the path is another one.

    The router ignores a line break at the end of a path.
    """
    raise NotFound("no such path")
