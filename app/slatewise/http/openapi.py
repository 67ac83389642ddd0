"""Adds to FastAPI's OpenAPI document what FastAPI does not know: the bodies of hot routes, an example, the key.

Called by: `app.py`, each time the document is asked for. Calls: `schemas.py`, and reads the rankers that are served.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel

from slatewise.bundle.ranker import Ranker
from slatewise.http.dialect import Dialect
from slatewise.schemas import RankRequest

SHOWN = 5  # most events and candidates in the example

# Every ranker accepts it; the demo knows the user and the films.
EXAMPLE: dict[str, Any] = {
    "user": "small:99",
    "history": {"item_ids": ["318", "500", "380"], "actions": ["love", "like", "like"]},
    "candidates": {"item_ids": ["595", "589", "1", "2028", "1617"]},
    "top_n": 3,
}


def example_request(rankers: Sequence[Ranker], show_data: bool) -> dict[str, Any]:
    """Return a short request that works as it stands.

    show_data: whether it may come from the bundle. Without it, the example shows the name of a ranker at most.
    """
    example = shortened(rankers[0].manifest.example) if rankers and show_data else EXAMPLE
    return {"ranker": rankers[0].name, **example} if len(rankers) > 1 else example


def shortened(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request with its first events and candidates only."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(member) for name, member in value.items()}
        return value[:SHOWN] if isinstance(value, list) else value

    return {name: cut(value) if name in ("history", "candidates") else value for name, value in request.items()}


def complete(
    document: dict[str, Any],
    dialects: Collection[Dialect[Any]],
    other_bodies: Collection[type[BaseModel]],
    example: dict[str, Any],
) -> None:
    """Add the schemas of the bodies and an example of the native one, and remove FastAPI's validation errors.

    These routes parse the body themselves, so FastAPI does not know its schema, and its own errors never occur.
    """
    schemas = document["components"]["schemas"]
    for model in {*(dialect.body for dialect in dialects), *other_bodies}:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for dialect in dialects:
        if dialect.body is RankRequest:
            body = document["paths"][dialect.path]["post"]["requestBody"]
            body["content"]["application/json"]["example"] = example


def describe_admin_key(document: dict[str, Any]) -> None:
    """Name the key that the operations of `/admin` need; they refer to it themselves."""
    document["components"].setdefault("securitySchemes", {})["admin"] = {
        "type": "http",
        "scheme": "bearer",
        "description": "The key in SLATEWISE_ADMIN_KEY.",
    }


def require_key(document: dict[str, Any], open_paths: Collection[str]) -> None:
    """State that every operation needs a key, except for those at paths that are open."""
    document["components"].setdefault("securitySchemes", {})["key"] = {
        "type": "http",
        "scheme": "bearer",
        "description": "One of the keys in SLATEWISE_API_KEYS.",
    }
    document["security"] = [{"key": []}]
    for path, operations in document["paths"].items():
        if path in open_paths:
            for operation in operations.values():
                operation["security"] = []
