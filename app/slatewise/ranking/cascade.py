"""The model's work for one request, in chunks that run on worker threads: encode the history, then exit by exit.

Called by: `pipeline.py`. Calls: `inference/engine.py`, `inference/slates.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slatewise import metrics
from slatewise.bundle.ranker import weighted_mean
from slatewise.inference.arrays import (
    Candidates,
    Float32,
    Float64,
    History,
    Int64,
    KeptState,
    PointScores,
    best_rows,
    join,
)
from slatewise.inference.chunks import Chunks, run_parts
from slatewise.inference.engine import HISTORY_CHUNK, Engine, chunk_of
from slatewise.inference.slates import run_set
from slatewise.pruning import Pruned
from slatewise.schemas import EXITS, ModelExit

LEAST_PART = 64  # candidates that are worth a thread of their own


class StageScores(NamedTuple):
    """The result of one stage of the cascade."""

    exit: ModelExit
    probabilities: Float64  # (N, heads), of each candidate by the last exit that scored it
    scored_by: NDArray[np.int8] | None = None  # (N,) the number of that exit in EXITS; `None`: `exit` scored all


def scored_last(exit: ModelExit, scored_by: NDArray[np.int8] | None, count: int) -> NDArray[np.bool_]:
    """Return which of `count` candidates the exit of a stage scored: (count,). scored_by: see `StageScores`."""
    if scored_by is None:
        return np.ones(count, bool)
    chosen: NDArray[np.bool_] = scored_by == EXITS.index(exit)
    return chosen


def extend(engine: Engine, base: KeptState, reused: int, history: History, pack: bool) -> Chunks[KeptState]:
    """Compute the state of a history in chunks. `base` already contains its first `reused` events."""
    state = None
    for first in range(reused, len(history), HISTORY_CHUNK):
        chunk = history[first : first + HISTORY_CHUNK]
        yield len(chunk)
        state = engine.extend(engine.prefix(base.unpacked(), reused) if state is None else state, chunk)
        metrics.HISTORY_ENCODED.inc(len(chunk))
    assert state is not None
    return state.packed() if pack else state


def run_cascade(
    engine: Engine,
    candidates: Candidates,
    kept: KeptState,
    meta: Float32,
    wanted: str,
    fallback_first: bool,
    completed: list[StageScores],
) -> Chunks[PointScores | None]:
    """Compute the exit `wanted` in chunks, and append each complete stage to `completed`, cheapest first.

    If a deadline passes, the caller takes the last complete stage. With `fallback_first`, `dot` is computed first, so
    that one stage is complete early. Without it, `dot` is skipped unless wanted. The result is that of `point`, if it
    was computed.
    """
    if wanted == "dot" or fallback_first:
        yield len(candidates)
        kept = kept.unpacked()
        completed.append(StageScores("dot", engine.dot(candidates, kept)))
    if wanted == "dot":
        return None
    point = yield from run_point(engine, candidates, kept, meta)
    completed.append(StageScores("point", point.probabilities))
    if wanted == "set":
        completed.append(StageScores("set", (yield from run_set(engine, point))))
    return point


def run_point(engine: Engine, candidates: Candidates, kept: KeptState, meta: Float32) -> Chunks[PointScores]:
    """Compute the exit `point` in chunks, and in parts if threads are idle."""
    n = len(candidates)
    size = chunk_of(n)

    def run_rows(first: int, last: int) -> Chunks[list[PointScores]]:
        chunks = []
        state = None
        for begin in range(first, last, size):
            rows = slice(begin, min(begin + size, last))
            yield rows.stop - rows.start
            state = state or kept.unpacked()
            chunks.append(engine.point(candidates, meta, state, rows))
        return chunks

    def parts(threads: int) -> list[Chunks[list[PointScores]]]:
        count = min(threads, max(1, n // LEAST_PART))
        return [run_rows(n * k // count, n * (k + 1) // count) for k in range(count)]

    return join([chunk for chunks in (yield from run_parts(parts)) for chunk in chunks])


def run_pruned(
    engine: Engine,
    candidates: Candidates,
    kept: KeptState,
    meta: Float32,
    pruned: Pruned,
    weights: Float64,
    completed: list[StageScores],
) -> Chunks[PointScores]:
    """As `run_cascade`, but `point` scores only the best candidates of `dot`, and `set` only the best of those.

    weights: (heads,) of the score that decides which are the best. The result has the rows of the candidates that
    the last exit scored, in input order.
    """
    yield len(candidates)
    state = kept.unpacked()
    stage = StageScores("dot", engine.dot(candidates, state))
    completed.append(stage)
    rows = best_rows(weighted_mean(stage.probabilities, weights), pruned.point)
    point = yield from run_point(engine, candidates[rows], state, meta)
    stage = scored_again(stage, rows, "point", point.probabilities)
    completed.append(stage)
    if pruned.exit == "set":
        best = best_rows(weighted_mean(point.probabilities, weights), pruned.last)
        point = point[best]
        completed.append(scored_again(stage, rows[best], "set", (yield from run_set(engine, point))))
    return point


def scored_again(before: StageScores, rows: Int64, exit: ModelExit, probabilities: Float64) -> StageScores:
    """Return a stage with the probabilities of an exit for some rows, and for the others those of the stage before."""
    if len(rows) == len(before.probabilities):
        return StageScores(exit, probabilities)
    merged = before.probabilities.copy()
    merged[rows] = probabilities
    number = EXITS.index(before.exit)
    scored_by = np.full(len(merged), number, np.int8) if before.scored_by is None else before.scored_by.copy()
    scored_by[rows] = EXITS.index(exit)
    return StageScores(exit, merged, scored_by)
