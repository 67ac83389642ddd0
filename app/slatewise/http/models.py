"""The endpoints /models and /models/{ranker}: the rankers that are served, with limits, quality and latency.

Called by: `app.py`. Calls: `ranking/registry.py` and `ranking/model_card.py`.
"""

from __future__ import annotations

from fastapi import APIRouter, Request

from slatewise.http.health import ready_pipeline
from slatewise.http.problems import PROBLEMS
from slatewise.ranking.model_card import model_card
from slatewise.schemas import ModelCard, ModelName, Models

routes = APIRouter()


@routes.get("/models", response_model=Models, responses={401: PROBLEMS[401], 503: PROBLEMS[503]})
async def list_models(request: Request) -> Models:
    """List the rankers that are served."""
    rankers = ready_pipeline(request.app).registry.serving()
    return Models(
        models=[
            ModelName(name=r.name, version=r.manifest.version, variants=list(r.engines), verdict=r.manifest.verdict)
            for r in rankers
        ]
    )


@routes.get("/models/{ranker}", response_model=ModelCard, responses={s: PROBLEMS[s] for s in (401, 404, 503)})
async def show_model(ranker: str, request: Request) -> ModelCard:
    """Describe one ranker: limits, heads, quality and latency of its variants, and an example request."""
    pipeline = ready_pipeline(request.app)
    return model_card(pipeline.registry.resolve(ranker), pipeline.admission.limits)
