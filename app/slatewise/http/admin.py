"""The calls of `/admin`, which change the versions that are served. They need a key of their own.

Without the setting `SLATEWISE_ADMIN_KEY` no path below `/admin` exists, and the OpenAPI document does not show one.

Called by: `app.py`. Calls: `ranking/versions.py`, `events.py` (to read a body), `wrong_keys.py`.
"""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import ValidationError

from slatewise.errors import NotFound, NotReady
from slatewise.http.auth import given_key
from slatewise.http.events import body_of, read_json
from slatewise.http.health import ready_pipeline
from slatewise.http.problems import PROBLEMS, schema_error
from slatewise.http.wrong_keys import WrongKeys
from slatewise.ranking.versions import Action, Command, Versions
from slatewise.version_schemas import RolloutBody, VersionBody, VersionState, VersionStates

BODIES = (VersionBody, RolloutBody)  # parsed here, not by FastAPI
ACTIONS: dict[Action, str] = {
    "load": "Load a version beside the served one, as candidate. It answers nobody.",
    "unload": "Drop the candidate; or, with the number of the served version, stop serving the ranker.",
    "switch": "Serve a version to all. It is loaded first, unless it is the candidate. A new ranker is served so, too.",
    "promote": "Serve the candidate to all.",
    "roll-back": "Leave the candidate; or, without one, serve the previous version again. With a `version`, only if it "
    "is the one to leave, so the call may be repeated.",
    "pin": "As `switch`, and polling leaves the ranker alone.",
    "unpin": "Let polling serve newer versions again.",
    "canary": "Let the candidate answer a share of the users, always the same ones, until its stop rule ends it.",
    "shadow": "Let both versions rank a share of the requests, and compare them. Clients do not see it.",
}
FAULTS: dict[int | str, dict[str, Any]] = {
    status: PROBLEMS[status] for status in (400, 401, 404, 408, 409, 413, 415, 422, 429, 500, 503)
}
KEY: dict[str, Any] = {"security": [{"admin": []}]}


def admin_routes(key: str, wrong_keys: WrongKeys) -> APIRouter:
    """Return the routes. A request without `key` gets 401 before its body is read."""
    known = key.encode()

    async def require_admin_key(request: Request) -> None:
        given = given_key(request.headers.get("authorization", ""), request.url.path)
        if not hmac.compare_digest(given.encode("latin-1"), known):
            detail = "an `Authorization: Bearer` header with the admin key is needed"
            raise wrong_keys.refusal(request.scope.get("client"), given, detail)

    routes = APIRouter(prefix="/admin", dependencies=[Depends(require_admin_key)])

    @routes.get("/rankers", responses={s: PROBLEMS[s] for s in (401, 429, 503)}, openapi_extra=KEY)
    async def list_versions(request: Request) -> VersionStates:
        """List the versions of each ranker: served, loaded beside it, pinned, stopped, and the latest load."""
        versions = served_versions(request)
        running = None if versions.running is None else str(versions.running)
        mode = request.app.state.reload_mode
        return VersionStates(rankers=versions.states(), mode=mode, running=running)

    for action, description in ACTIONS.items():
        model = RolloutBody if action in ("canary", "shadow") else VersionBody
        routes.add_api_route(
            f"/rankers/{{ranker}}/{action}",
            endpoint_of(action, model),
            methods=["POST"],
            name=f"{action.replace('-', '_')}_version",
            description=description,
            response_model=VersionState,
            responses=FAULTS,
            openapi_extra=body_of(model) | KEY,
        )
    return routes


def served_versions(request: Request) -> Versions:
    """Raises NotReady."""
    ready_pipeline(request.app)
    versions: Versions | None = request.app.state.versions
    if versions is None:
        raise NotReady("the server is stopping")
    return versions


def endpoint_of(action: Action, model: type[VersionBody] | type[RolloutBody]) -> Any:
    async def endpoint(ranker: str, request: Request) -> VersionState | Response:
        versions = served_versions(request)
        content = await read_json(request, ready_pipeline(request.app))
        try:
            body = model.model_validate(content)
        except ValidationError as error:
            raise schema_error(error) from None
        members = body.model_dump(exclude={"bounds"})
        bounds = body.bounds if isinstance(body, RolloutBody) else None
        await versions.execute(Command(action, ranker, bounds=bounds, **members))
        try:
            return versions.state(ranker)
        except NotFound:  # unloaded
            return VersionState(ranker=ranker, version=None)

    return endpoint
