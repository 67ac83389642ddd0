"""The members of a response with a ranking, made from the request and the result of the pipeline.

HTTP and the ranker in process answer with the same members, so one function makes them. It is on the path of every
request: columns are converted as a whole.

Called by: `http/rank.py` and `local/ranker.py`. Calls: `metrics.py` for the names of the stages.
"""

from __future__ import annotations

import numpy as np

from slatewise import metrics
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.trace import Timings
from slatewise.schemas import RankRequest, RankResponse


def response_members(request: RankRequest, ranking: Ranking, by_score: bool, timings: Timings) -> RankResponse:
    """Return the response as plain Python values. The type checker compares them with RankResponse.

    by_score: sort by descending score and cut to `top_n`; otherwise the candidates keep the input order.
    """
    ids = request.candidates.item_ids
    scored = ranking.scored
    index = ranking.order(request.top_n) if by_score else np.arange(ranking.candidates)
    positions = index.tolist()
    heads = ranking.ranker.manifest.heads
    milliseconds = {
        stage: round(timings.seconds.get(stage, 0.0) * 1e3, 3) for stage in metrics.STAGES if stage != "serialize"
    }  # `serialize` is still running
    milliseconds["total"] = round((timings.marked - timings.entered) * 1e3, 3)
    meta = ranking.meta
    return {
        "id": request.id,
        "ranker": ranking.ranker.name,
        "version": ranking.ranker.manifest.version,
        "variant": None if scored is None else scored.variant,
        "exit": ranking.exit,
        "results": {
            "index": positions,
            "item_ids": list(map(ids.__getitem__, positions)),
            "scores": None if scored is None else scored.scores[index].tolist(),
            "heads": {}
            if scored is None
            else {h: scored.probabilities[index, k].tolist() for k, h in enumerate(heads)},
        },
        "unknown_candidates": list(ranking.unknown),
        "unknown_fields": ranking.unknown_fields,
        "history": ranking.history,
        "meta_embedding": {"status": meta.status, "version": meta.version, "age_seconds": meta.age_seconds},
        "degraded": sorted(ranking.degraded),
        "timings_ms": milliseconds,
    }
