"""Random requests for an engine whose weights are random, too: the values change no time.

Called by: `decoder_blocks.py`, `large_requests.py`, `low_rank.py`. Calls: numpy.
"""

from __future__ import annotations

import numpy as np

from slatewise.inference.arrays import CONTEXT_SIZE, FIRST_ITEM, GAP_BUCKETS, Candidates, History
from slatewise_train.rankers.base import RankerModel

Request = tuple[History, Candidates, np.ndarray]  # with the meta-embedding (M,)


def draw_request(
    model: RankerModel, items: np.ndarray, events: int, candidates: int, rng: np.random.Generator
) -> Request:
    """Draw a history of so many events, and candidates. items: the item table of the model, (items, d)."""
    rows = rng.integers(FIRST_ITEM, len(items), events)
    history = History(rows, rng.integers(0, model.config.actions, events), rng.integers(0, GAP_BUCKETS, events))
    return history, draw_candidates(model, items, candidates, rng), model.default_meta.detach().numpy()


def draw_candidates(model: RankerModel, items: np.ndarray, count: int, rng: np.random.Generator) -> Candidates:
    numeric = rng.normal(size=(count, model.config.numeric)).astype(np.float32)
    vectors = items[rng.integers(FIRST_ITEM, len(items), count)]
    return Candidates(vectors, numeric, np.zeros((1, CONTEXT_SIZE), np.float32))
