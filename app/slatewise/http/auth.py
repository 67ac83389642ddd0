"""Authentication by API key.

Called by: the middleware stack of `app.py`, for every route. Calls: `door.py`, `keys.py`, `callers.py`,
`wrong_keys.py`, `problems.py` and `calls/aws.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from slatewise import metrics
from slatewise.errors import RankingError, TooManyRequests, Unauthorized
from slatewise.http.callers import Caller, Limits
from slatewise.http.calls import aws
from slatewise.http.door import PROBES
from slatewise.http.hot_routes import Routes
from slatewise.http.keys import Keys
from slatewise.http.problems import problem, request_id_of
from slatewise.http.request_log import Outcome
from slatewise.http.wrong_keys import WrongKeys
from slatewise.ranking.trace import Trace

METRICS_PATH = "/metrics"
# `/admin` has a key of its own (`admin.py`), and is 404 without it.
OPEN_PATHS = (*PROBES, "/admin/", "/admin")
# Open unless a setting closes them: they show no data of the rankers. A slash at the end stands for all paths below.
PAGE_PATHS = ("/", "/page/", "/docs", "/docs/", "/openapi.json", "/static-offline-docs/")
AWS_PATHS = ("/personalize-ranking", "/events")  # AWS clients sign these, and cannot send a bearer key
KEY_NEEDED = "an `Authorization: Bearer` header with a valid key is needed"
SCOPE_PARTS = 4  # date, region, service and "aws4_request", behind the access key id


class RequireKey:
    """Middleware that refuses requests without a valid `Authorization: Bearer` key, if keys are set, and requests above
    the limits of their key. Behind it, `scope["caller"]` is the holder of the key.

    The paths in `open_paths` need no key; one that ends with a slash stands for all paths below it. /metrics needs one
    of `metrics_keys`, if there are any. A refused request to one of `routes` gets the error of its dialect, and counts
    in `slatewise_requests_total`. AWS clients get theirs for events too.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        routes: Routes,
        open_paths: Iterable[str],
        metrics_keys: Keys | None = None,
        wrong_keys: WrongKeys | None = None,
    ) -> None:
        self.app = app
        self.open = frozenset(open_paths)
        self.open_below = tuple(path for path in self.open if path.endswith("/") and path != "/")
        self.keys = keys
        self.metrics_keys = metrics_keys
        self.routes = routes
        self.wrong_keys = wrong_keys or WrongKeys()
        self.anyone = Caller(Limits(priority=keys.default.priority))  # who needs no key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        entered = time.perf_counter()
        try:
            caller = self.caller_of(scope)
            caller.enter()
        except (Unauthorized, TooManyRequests) as error:
            return await self.refuse(error, scope, receive, send, entered)
        try:
            scope["caller"] = caller
            await self.app(scope, receive, send)
        finally:
            caller.leave()

    def caller_of(self, scope: Scope) -> Caller:
        """Raises Unauthorized, or TooManyRequests after too many wrong keys."""
        keys = self.keys_of(scope["path"])
        if not keys:
            return self.anyone
        key = given_key(Headers(scope=scope).get("authorization", ""), scope["path"])
        caller = keys.find(key.encode("latin-1"))  # Starlette decodes headers as Latin-1
        if caller is None:
            raise self.wrong_keys.refusal(scope.get("client"), key, KEY_NEEDED)
        return caller

    async def refuse(self, error: RankingError, scope: Scope, receive: Receive, send: Send, entered: float) -> None:
        """Answer before the body is read."""
        headers = Headers(scope=scope)
        if found := self.routes.find(scope):
            dialect = found[0]
            response = dialect.render_error(error, request_id_of(headers))
            seconds = time.perf_counter() - entered
            metrics.series(metrics.REQUESTS, dialect.path, "", "", "", str(response.status_code)).inc()
            metrics.series(metrics.DURATION, dialect.path, "", "").observe(seconds)
            if (tracing := scope["app"].state.tracing) is not None:
                span = tracing.start(scope, headers, dialect.path, seconds)
                outcome = Outcome({"code": str(response.status_code)}, error.slug, (), seconds, None)
                tracing.finish(span, outcome, Trace(entered))
        elif aws.is_signed(headers) and scope["path"] in AWS_PATHS:
            response = aws.render_error(error, request_id_of(headers))
        else:
            response = problem(error, request_id_of(headers))
        await response(scope, receive, send)

    def is_open(self, path: str) -> bool:
        return path in self.open or path.startswith(self.open_below)

    def keys_of(self, path: str) -> Keys | None:
        """Return the keys that open a path; `None` or none: it is open."""
        if path == METRICS_PATH and self.metrics_keys:
            return self.metrics_keys
        return None if self.is_open(path) else self.keys


def given_key(authorization: str, path: str) -> str:
    """Return the key in an Authorization header, or an empty text.

    On the paths of AWS calls, the access key id is the key. The signature is not checked: the server has no secret.
    """
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme == aws.SIGNATURE and path in AWS_PATHS:
        _, _, credential = given.partition("Credential=")
        parts = credential.split(",")[0].strip().rsplit("/", SCOPE_PARTS)
        return parts[0] if len(parts) == 1 + SCOPE_PARTS else ""
    return ""
