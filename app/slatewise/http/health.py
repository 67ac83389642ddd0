"""The endpoints /livez, /readyz and /metrics, which need no key.

Called by: `app.py`; `rank.py` and `models.py` call `ready_pipeline`. Calls: `metrics.py`, and reads the pipeline's
counters.
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request, Response
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel

from slatewise import metrics
from slatewise.errors import NotReady
from slatewise.http.problems import PROBLEMS
from slatewise.ranking.pipeline import Pipeline

routes = APIRouter()


class Health(BaseModel):
    status: str


def ready_pipeline(app: FastAPI) -> Pipeline:
    """Return the pipeline. Raises NotReady before the start and after the end of the application's lifespan."""
    pipeline: Pipeline | None = app.state.pipeline
    if pipeline is None:
        raise NotReady("the models are not loaded yet, or the server is stopping")
    return pipeline


@routes.get("/livez", response_model=Health)
async def livez() -> dict[str, str]:
    """Respond with 200 while the process runs."""
    return {"status": "alive"}


@routes.get("/readyz", response_model=Health, responses={503: PROBLEMS[503]})
async def readyz(request: Request) -> dict[str, str]:
    """Respond with 200 while the models are loaded and warm and the server is not draining.

    Redis is not checked, because the service works without Redis.
    """
    if not ready_pipeline(request.app).registry.serving():
        raise NotReady("no ranker is served")
    if request.app.state.draining:
        raise NotReady("the server is draining")
    return {"status": "ready"}


@routes.get(
    "/metrics",
    name="metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}},
)
async def prometheus_metrics(request: Request) -> Response:
    """Return all metrics in the text format of Prometheus, or in OpenMetrics with exemplars if that is accepted."""
    pipeline: Pipeline | None = request.app.state.pipeline
    if pipeline is not None:
        metrics.QUEUE.set(pipeline.admission.load.backlog())
        metrics.QUEUE_LENGTH.set(len(pipeline.workers.queue))
        metrics.HISTORY_CACHE_BYTES.set(pipeline.cache.nbytes)
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(REGISTRY), headers={"Content-Type": content_type})
