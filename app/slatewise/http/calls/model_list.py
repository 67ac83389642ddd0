"""GET /v1/models: the rankers as OpenAI's list, which clients read limits from, and as Cohere's list.

Called by: `app.py`. Calls: `ranking/registry.py`.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import with_config
from typing_extensions import TypedDict

from slatewise.http.health import ready_pipeline
from slatewise.http.problems import PROBLEMS
from slatewise.schemas import CLOSED


@with_config(CLOSED)
class ListedModel(TypedDict):
    """`max_documents`: most documents of one call. `set_wise`: most documents that are scored together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_documents: int
    set_wise: int


@with_config(CLOSED)
class CohereModel(TypedDict):
    name: str
    endpoints: list[str]


@with_config(CLOSED)
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ListedModel]
    models: list[CohereModel]


routes = APIRouter()


@routes.get("/v1/models", response_model=ModelList, responses={s: PROBLEMS[s] for s in (401, 429, 503)})
async def list_models_as_openai(request: Request) -> ModelList:
    """List the rankers with their limits, for clients of OpenAI (`data`) and Cohere (`models`)."""
    pipeline = ready_pipeline(request.app)
    rankers = pipeline.registry.serving()
    return {
        "object": "list",
        "data": [
            {
                "id": ranker.name,
                "object": "model",
                "created": 0,  # a bundle has no date
                "owned_by": "slatewise",
                "max_documents": pipeline.admission.limits.max_candidates,
                "set_wise": ranker.manifest.limits.set_wise,
            }
            for ranker in rankers
        ],
        "models": [{"name": ranker.name, "endpoints": ["rerank"]} for ranker in rankers],
    }
