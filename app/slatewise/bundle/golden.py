"""The golden request of a bundle: its scores on this processor must be those that the export noted.

Called by: `loader.py` for each variant, and `slatewise_train/bundle_writer.py`, which notes them. Calls:
`inference/engine.py`.
"""

from __future__ import annotations

import numpy as np

from slatewise.bundle.manifest import ManifestError
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import Float64
from slatewise.inference.engine import Engine
from slatewise.schemas import RankRequest


def check_golden(ranker: Ranker, engine: Engine, name: str) -> None:
    """Score the golden request. Raises ManifestError if a weighted sum differs by more than the golden bound."""
    manifest = ranker.manifest
    variant = manifest.variants[name]
    found = score_request(ranker, engine, RankRequest.model_validate(manifest.example))
    expected = (len(manifest.example["candidates"]["item_ids"]), len(manifest.heads))
    for exit, probabilities in found.items():
        if probabilities.shape != expected:
            raise ManifestError(f"exit {exit} does not give a probability for each candidate and head")
    scores = found[manifest.default_exit] @ ranker.score_weights(None)
    worst = float(np.abs(scores - np.array(variant.golden_scores)).max())
    bound = variant.golden_bound or variant.bound
    if not worst <= bound:
        raise ManifestError(f"golden scores differ by {worst:.2e} on this processor, bound {bound:.0e}")


def score_request(ranker: Ranker, engine: Engine, request: RankRequest) -> dict[str, Float64]:
    """Return the (N, heads) probabilities by exit, from `Engine.score` with the embedded store's meta-embedding."""
    history = ranker.history(request)
    candidates, _ = ranker.candidates(request, request.request_time or 0.0, engine.items)
    meta = ranker.embedded_meta_of(request.user)
    return {exit: engine.score(history, candidates, meta, exit) for exit in ranker.manifest.exits}
