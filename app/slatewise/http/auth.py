"""Authentication by API key.

Called by: the middleware stack of `app.py`, for every route. Calls: `problems.py`.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from slatewise import metrics
from slatewise.errors import Unauthorized
from slatewise.http.problems import header_request_id, problem

OPEN_PATHS = ("/livez", "/readyz", "/metrics")
# Open unless a setting closes them: they show no data of the rankers. A slash at the end stands for all paths below.
PAGE_PATHS = ("/", "/page/", "/docs", "/docs/", "/openapi.json", "/static-offline-docs/")


class RequireKey:
    """Middleware that refuses requests without a valid `Authorization: Bearer` key, if keys are set.

    The paths in `open_paths` need no key; one that ends with a slash stands for all paths below it. Refused requests to
    the (method, path) pairs in `counted` are added to `slatewise_requests_total`.
    """

    def __init__(
        self, app: ASGIApp, keys: tuple[str, ...], counted: Collection[tuple[str, str]], open_paths: Iterable[str]
    ) -> None:
        self.app = app
        self.open = frozenset(open_paths)
        self.open_below = tuple(path for path in self.open if path.endswith("/") and path != "/")
        self.keys = [key.encode() for key in keys]
        self.counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.keys or scope["type"] != "http" or self.is_open(scope["path"]):
            return await self.app(scope, receive, send)
        entered = time.perf_counter()
        headers = Headers(scope=scope)
        if self.has_valid_key(headers):
            return await self.app(scope, receive, send)
        error = Unauthorized("an `Authorization: Bearer` header with a valid key is needed")
        response = problem(error, header_request_id(headers))
        metrics.REJECTED.labels("key").inc()
        if (scope["method"], scope["path"]) in self.counted:
            metrics.series(metrics.REQUESTS, scope["path"], "", "", "", str(error.status)).inc()
            metrics.series(metrics.DURATION, scope["path"], "", "").observe(time.perf_counter() - entered)
        await response(scope, receive, send)

    def is_open(self, path: str) -> bool:
        return path in self.open or path.startswith(self.open_below)

    def has_valid_key(self, headers: Headers) -> bool:
        """Compare the given key with all keys, in constant time."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key_bytes = given.strip().encode("latin-1")  # Starlette decodes headers as Latin-1
        matches = [hmac.compare_digest(key_bytes, key) for key in self.keys]
        return scheme.lower() == "bearer" and any(matches)
