"""Times a few calls of each graph of a new engine, so that the first requests are predicted too.

Called by: `bundle/loader.py`. Calls: `engine.py`, `costs.py`.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from slatewise.inference.arrays import CONTEXT_SIZE, GAP_MISSING, UNKNOWN_ACTION, UNKNOWN_ITEM, Candidates, History
from slatewise.inference.engine import Engine, Step

SIZES = ((16, 16), (64, 256), (256, 64), (256, 512))  # events and candidates of a request, each in one call a graph
REPEATS = 2  # of which the faster one counts: the first one allocates memory


def time_calls(engine: Engine, most_events: int, most_set_wise: int, numeric: int, meta_size: int, step: Step) -> None:
    """Fit the costs of each graph. Takes as long as about four of the largest requests.

    most_events, most_set_wise: limits of the ranker. numeric: features of a candidate. step: as in `Engine`. Raises
    EngineError.
    """
    for costs in engine.costs.values():
        costs.begin()
    for events, count in SIZES * REPEATS:
        rows = np.full(min(events, most_events), UNKNOWN_ITEM)
        history = History(rows, np.full(len(rows), UNKNOWN_ACTION), np.full(len(rows), GAP_MISSING))
        vectors = engine.items.take(np.full(count, UNKNOWN_ITEM), axis=0)
        missing = np.full((count, numeric), np.nan, np.float32)
        candidates = Candidates(vectors, missing, np.zeros((1, CONTEXT_SIZE), np.float32))
        state = step(partial(engine.extend, engine.start, history))
        if "dot" in engine.costs:
            step(partial(engine.dot, candidates, state))
        if "point" in engine.costs:
            point = step(partial(engine.point, candidates, np.zeros(meta_size, np.float32), state))
            if engine.posterior is not None:
                drawn = step(partial(engine.exploring, "", 1.0)).drawn
                step(partial(engine.explore, point, drawn))
            if "set" in engine.costs and count <= most_set_wise:
                step(partial(engine.set, point))
    for costs in engine.costs.values():
        costs.fit()
