"""The model's work for one request, in chunks that run on worker threads: encode the history, then exit by exit.

Called by: `pipeline.py`. Calls: `inference/engine.py`, `slates.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from slatewise import metrics
from slatewise.inference.arrays import Candidates, Float32, Float64, History, KeptState, PointScores, join
from slatewise.inference.engine import HISTORY_CHUNK, Engine, chunk_of
from slatewise.inference.workers import Chunks
from slatewise.ranking.slates import run_set
from slatewise.schemas import ModelExit


class StageScores(NamedTuple):
    """The result of one stage of the cascade."""

    exit: ModelExit
    probabilities: Float64  # (N, heads)


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
    n = len(candidates)
    state = None
    if wanted == "dot" or fallback_first:
        yield n
        state = kept.unpacked()
        completed.append(StageScores("dot", engine.dot(candidates, state)))
    if wanted == "dot":
        return None
    chunks = []
    size = chunk_of(n)
    for first in range(0, n, size):
        rows = slice(first, min(first + size, n))
        yield rows.stop - rows.start
        state = state or kept.unpacked()
        chunks.append(engine.point(candidates, meta, state, rows))
    point = join(chunks)
    completed.append(StageScores("point", point.probabilities))
    if wanted == "set":
        completed.append(StageScores("set", (yield from run_set(engine, point))))
    return point
