"""The endpoints /models/{ranker}/items and /models/{ranker}/examples: titles by id or by a search, and demo users.

Called by: `app.py`. Calls: `bundle/titles.py`.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from slatewise.bundle.titles import Titles
from slatewise.errors import Invalid
from slatewise.http.health import ready_pipeline
from slatewise.http.problems import PROBLEMS
from slatewise.schemas import MAX_ID

MOST_ITEMS = 500  # ids of one request
MOST_FOUND = 100  # results of one search

routes = APIRouter()
RESPONSES: dict[int | str, dict[str, Any]] = {status: PROBLEMS[status] for status in (401, 404, 422, 429, 503)}


class Items(BaseModel):
    """Items of a ranker's catalogue, as columns of equal length."""

    item_ids: list[str]
    known: list[bool] = Field(description="Whether the ranker knows the id.")
    fields: dict[str, list[str | list[str] | None]] = Field(description="Titles and fields; null: not known.")


class Examples(BaseModel):
    """Requests that work as they stand. The first one is the `example` of `GET /models/{ranker}`."""

    examples: list[dict[str, Any]]


@routes.get("/models/{ranker}/items", response_model=Items, responses=RESPONSES)
async def show_items(
    ranker: str,
    request: Request,
    ids: Annotated[str | None, Query(description="Ids, separated by commas.")] = None,
    id: Annotated[list[str] | None, Query(description="One id as it stands; may be repeated.")] = None,
    query: Annotated[str | None, Query(description="Text in the title or the id.")] = None,
    limit: Annotated[str, Query(description=f"Most results of a search, 1 to {MOST_FOUND}.")] = "20",
) -> Items:
    """Return titles and fields of items, by their ids or by a search. A bundle without titles is searched by id."""
    served = ready_pipeline(request.app).registry.resolve(ranker)  # held to the end: it may be replaced meanwhile
    titles = served.titles
    named = [*(part.strip() for part in (ids or "").split(",") if part.strip()), *(id or ())]
    if query is None:
        if ids is None and id is None:
            raise Invalid("`ids`, `id` or `query` is needed")
        if len(named) > MOST_ITEMS:
            raise Invalid(f"{len(named)} ids, limit {MOST_ITEMS}: ask in several requests")
    elif named:
        raise Invalid("`query` and ids exclude each other")
    else:
        if not (limit.isascii() and limit.isdecimal() and len(limit) < 10 and 1 <= int(limit) <= MOST_FOUND):
            raise Invalid(f"`limit` must be an integer from 1 to {MOST_FOUND}")
        if len(query) > MAX_ID:
            raise Invalid(f"`query` has {len(query)} characters, limit {MAX_ID}")
        named = await find(titles, query, int(limit))
    return Items(
        item_ids=named,
        known=[item in titles.items for item in named],
        fields=titles.columns(titles.names, named),
    )


async def find(titles: Titles, query: str, limit: int) -> list[str]:
    """Search in steps, so that rankings are not held up. The first search of a ranker builds the text in a thread."""
    await asyncio.to_thread(lambda: titles.search_text)
    for found in titles.search(query, limit):
        if found is not None:
            return found
        await asyncio.sleep(0)
    raise AssertionError("the search has no result")


@routes.get(
    "/models/{ranker}/examples", response_model=Examples, responses={s: RESPONSES[s] for s in (401, 404, 429, 503)}
)
async def show_examples(ranker: str, request: Request) -> Examples:
    """Return requests of demo users: histories and candidates to begin with. They hold no user of your own data."""
    return Examples(
        examples=[body | {"ranker": ranker} for body in ready_pipeline(request.app).registry.resolve(ranker).examples]
    )
