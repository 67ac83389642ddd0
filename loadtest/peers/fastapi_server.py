"""The textbook server: FastAPI, pydantic and ONNX Runtime, run by uvicorn.

    uvicorn loadtest.peers.fastapi_server:app --workers N

Called by: `contenders.py`. Calls: `ranker.py`.
"""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel

from loadtest.peers.ranker import Ranker


class History(BaseModel):
    item_ids: list[str] = []
    actions: list[str | None] | None = None
    timestamps: list[float | None] | None = None


class Candidates(BaseModel):
    item_ids: list[str]
    features: dict[str, list[float | None]] = {}


class RerankRequest(BaseModel):
    user: str | None = None
    history: History = History()
    candidates: Candidates
    request_time: float | None = None


class Results(BaseModel):
    index: list[int]
    item_ids: list[str]
    scores: list[float]


class RerankResponse(BaseModel):
    results: Results


app = FastAPI()
ranker = Ranker.from_environment()


@app.get("/readyz")
def ready() -> bool:
    return True


@app.post("/rerank", response_model=RerankResponse)
def rerank(request: RerankRequest) -> RerankResponse:
    """Not async, so FastAPI runs it in a thread and the event loop stays free."""
    return RerankResponse.model_validate(ranker.rank(request.model_dump()))
