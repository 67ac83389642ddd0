"""The endpoints /models and /models/{ranker}: the rankers that are served, with limits, quality and latency.

Called by: `app.py`. Calls: `ranking/registry.py`.
"""

from __future__ import annotations

from fastapi import APIRouter, Request

from slatewise.bundle.ranker import Ranker
from slatewise.http.health import ready_pipeline
from slatewise.http.problems import PROBLEMS
from slatewise.model_schemas import Limits, ModelCard, ModelName, Models
from slatewise.ranking.admission import RequestLimits
from slatewise.ranking.versions import Versions

routes = APIRouter()


@routes.get("/models", response_model=Models, responses={s: PROBLEMS[s] for s in (401, 429, 503)})
async def list_models(request: Request) -> Models:
    """List the rankers that are served."""
    pipeline = ready_pipeline(request.app)
    limits = pipeline.admission.limits
    versions: Versions | None = request.app.state.versions
    return Models(models=[model_name(ranker, limits, versions) for ranker in pipeline.registry.serving()])


@routes.get("/models/{ranker}", response_model=ModelCard, responses={s: PROBLEMS[s] for s in (401, 404, 429, 503)})
async def show_model(ranker: str, request: Request) -> ModelCard:
    """Describe one ranker: limits, heads, quality and latency of its variants, and an example request."""
    pipeline = ready_pipeline(request.app)
    return model_card(pipeline.registry.resolve(ranker), pipeline.admission.limits)


def limits_of(ranker: Ranker, limits: RequestLimits) -> Limits:
    """Return the limits of the server and of the ranker."""
    return Limits(
        max_candidates=limits.max_candidates,
        max_history=limits.max_history,
        history_used=ranker.manifest.limits.history_used,
        set_wise=ranker.manifest.limits.set_wise,
    )


def model_name(ranker: Ranker, limits: RequestLimits, versions: Versions | None = None) -> ModelName:
    return ModelName(
        name=ranker.name,
        version=ranker.manifest.version,
        variants=list(ranker.engines),
        verdict=ranker.manifest.verdict,
        limits=limits_of(ranker, limits),
        versions=None if versions is None else versions.state(ranker.name),
    )


def model_card(ranker: Ranker, limits: RequestLimits) -> ModelCard:
    manifest = ranker.manifest
    return ModelCard(
        name=ranker.name,
        version=manifest.version,
        trained_on=manifest.trained_on,
        heads=manifest.heads,
        exits=manifest.exits,
        default_exit=manifest.default_exit,
        default_variant=ranker.default_variant,
        set_wise="set" in manifest.exits,
        actions=manifest.actions,
        features=manifest.features,
        fields={name: [] if field.text else field.values for name, field in manifest.fields.items()},
        return_fields=ranker.titles.names,
        limits=limits_of(ranker, limits),
        prune=manifest.prune,
        explore=ranker.explores,
        variants={name: manifest.variants[name].model_dump(exclude={"golden_scores"}) for name in ranker.engines},
        refused_variants=ranker.refused,
        verdict=manifest.verdict,
        report=ranker.report,
        example=manifest.example | {"ranker": ranker.name},  # accepted beside other rankers too
    )
