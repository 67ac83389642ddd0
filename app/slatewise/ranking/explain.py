"""Explains a ranking: how far single events of the history and single neighbours in the slate moved each result.

Each effect is a difference: the result as it is, minus the result without one event or one neighbour. docs/explain.md
has the equations, what is exact, and the measured quality and cost.

    events       the newest events are left out one at a time. All events after the missing one are encoded again.
    neighbours   the first results are left out of the slate one at a time. The set-wise blocks run again. Not for
                 candidates in several slates (`inference/slates.py`).

The work is bounded by the constants below, whatever the request (`explanation_seconds`).

Called by: `pipeline.py`, as chunks on a worker thread. Calls: `inference/batched.py`,
`inference/costs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slatewise.bundle.features import gap_buckets, time_order
from slatewise.bundle.ranker import Ranker, weight_shares, weighted_mean
from slatewise.inference import batched as model
from slatewise.inference.arrays import (
    GAP_FIRST,
    GAP_MISSING,
    START_ITEM,
    UNKNOWN_ACTION,
    Candidates,
    Float32,
    Float64,
    History,
    Int64,
    KeptState,
    PointScores,
)
from slatewise.inference.chunks import Chunks
from slatewise.inference.costs import Work
from slatewise.inference.engine import CANDIDATE_CHUNK, Engine
from slatewise.ranking.cascade import scored_last
from slatewise.schemas import EventEffects, Explanation, ModelExit, NeighbourEffects, RankRequest

EVENTS = 12  # newest events that are left out
RESULTS = 10  # first results that are explained
CONTENDERS = 20  # first results among which places are counted
NEIGHBOURS = 8  # first results that are left out of the slate
NEIGHBOUR_ROWS = 800  # candidates in all slates with a missing neighbour; one slate may be larger
SHOWN = 3  # events that raised a result, and as many that lowered it


@dataclass(frozen=True)
class Ranked:
    """A request that was ranked, and what the model computed for it."""

    ranker: Ranker
    engine: Engine
    request: RankRequest
    history: History
    candidates: Candidates
    kept: KeptState
    meta: Float32  # (M,)
    point: PointScores | None  # `None` for the exit `dot`
    exit: ModelExit
    probabilities: Float64  # (N, H) of this exit
    scored_by: NDArray[np.int8] | None = None  # (N,) see `StageScores`; `point` has the rows that this exit scored

    def rows(self) -> Int64:
        """Return the positions of the candidates that this exit scored."""
        return np.flatnonzero(scored_last(self.exit, self.scored_by, len(self.candidates)))


@dataclass(frozen=True)
class Effects:
    """What leaving out one of E parts did to K results: positive where the part raised the result."""

    scores: Float64  # (E, K) change of the score
    places: Float64  # (E, K) change of the smoothed rank


def explanation_seconds(engine: Engine, events: int, candidates: int, exit: ModelExit) -> float:
    """Predict the seconds of the explanations of a request with so many events that the model reads."""
    costs = engine.costs
    seconds = 0.0
    if left_out := min(EVENTS, events):
        rows = (left_out + 1) ** 2
        seconds += costs["encode"].seconds(Work(1, rows, rows * (events + 1)))
        each = min(candidates, CONTENDERS)
        rows = (left_out + 1) * each
        if exit == "dot":
            seconds += costs["dot"].seconds(Work(1, rows, 0))
        else:
            seconds += costs["point"].seconds(Work(1, rows, rows * (events + 1)))
        if exit == "set":
            seconds += costs["set"].seconds(Work(1, rows, rows * each))
    if exit == "set" and candidates <= engine.slate:
        slates, others = neighbour_count(candidates), candidates - 1
        rows = slates * others
        seconds += costs["set"].seconds(Work(1, rows, rows * others))
    return seconds


def neighbour_count(candidates: int) -> int:
    return min(NEIGHBOURS, max(1, NEIGHBOUR_ROWS // candidates), candidates if candidates > 1 else 0)


def explain(ranked: Ranked) -> Chunks[list[Explanation]]:
    """Explain the first results, best result first, in chunks. Raises EngineError.

    If the request was pruned, the candidates that the exit did not score are as if they had not been sent.
    """
    rows = ranked.rows()
    if ranked.scored_by is not None:
        candidates, probabilities = ranked.candidates[rows], ranked.probabilities[rows]
        ranked = replace(ranked, candidates=candidates, probabilities=probabilities)
    given = ranked.ranker.score_weights(ranked.request.head_weights)
    order = np.argsort(-weighted_mean(ranked.probabilities, given), kind="stable")  # that of the answer, ties included
    weights = weight_shares(given)
    results = min(RESULTS, len(order), ranked.request.top_n or RESULTS)
    positions, times = events_read(ranked.ranker, ranked.request)
    events = neighbours = Effects(np.zeros((0, results)), np.zeros((0, results)))
    if len(positions):
        events = yield from event_effects(ranked, times, weights, order[:CONTENDERS], results)
    one_slate = ranked.exit == "set" and len(order) <= ranked.engine.slate
    left_out = order[: neighbour_count(len(order)) if one_slate else 0]
    if len(left_out):
        neighbours = yield from neighbour_effects(ranked, weights, order, left_out, results)
    newest = positions[-EVENTS:]
    return [
        Explanation(
            index=index,
            events=name_events(ranked.request, newest, events, k),
            neighbours=name_neighbours(ranked.request, rows[left_out], neighbours, k, index),
        )
        for k, index in enumerate(rows[order[:results]].tolist())
    ]


def name_events(request: RankRequest, newest: Int64, effects: Effects, k: int) -> EventEffects:
    """Return the events that raised result k most, then those that lowered it most."""
    places = effects.places[:, k]
    moved = places if places.any() else effects.scores[:, k]  # a single candidate changes no place
    order = np.argsort(-moved, kind="stable")
    rows = np.concatenate([order[moved[order] > 0][:SHOWN], order[moved[order] < 0][-SHOWN:]])
    positions = newest[rows].tolist()
    return {
        "position": positions,
        "item_ids": [request.history.item_ids[position] for position in positions],
        "delta": effects.scores[rows, k].tolist(),
        "places": places[rows].tolist(),
    }


def name_neighbours(request: RankRequest, left_out: Int64, effects: Effects, k: int, result: int) -> NeighbourEffects:
    """Return all neighbours of the k-th result, the one that raised it most first."""
    rows = np.flatnonzero(left_out != result)
    rows = rows[np.argsort(-effects.places[rows, k], kind="stable")]
    indices = left_out[rows].tolist()
    return {
        "index": indices,
        "item_ids": [request.candidates.item_ids[index] for index in indices],
        "delta": effects.scores[rows, k].tolist(),
        "places": effects.places[rows, k].tolist(),
    }


def events_read(ranker: Ranker, request: RankRequest) -> tuple[Int64, Float64]:
    """Return (L,) positions in the request of the events that the model reads, oldest first, and their times."""
    sent = request.history
    count = len(sent.item_ids)
    times = np.full(count, np.nan) if sent.timestamps is None else np.array(sent.timestamps, np.float64)
    order, _ = time_order(times)
    positions = (np.arange(count) if order is None else order)[ranker.window_start(request) :]
    return positions, times[positions]


def event_effects(ranked: Ranked, times: Float64, weights: Float64, contenders: Int64, results: int) -> Chunks[Effects]:
    """Leave out each of the newest events. Row 0 of the batch is the whole history, so that roundings cancel.

    The exit `set` runs among the contenders only. The change of their logits is added to those of the whole slate.
    """
    first = max(0, len(times) - EVENTS)
    tails = without_each(ranked.history, times, first)
    yield tails.items.size
    states = model.encode(ranked.engine, ranked.kept.unpacked(), first, tails)
    sent = ranked.candidates
    chosen = Candidates(sent.vectors[contenders], sent.numeric[contenders], sent.context)
    if ranked.exit == "dot":
        found = model.dot(ranked.engine, chosen.vectors, states)
    else:
        yield len(tails.lengths) * len(contenders)
        slates = model.point(ranked.engine, chosen, ranked.meta, states)
        found = slates.probabilities
        if ranked.exit == "set":
            found = model.set_wise(ranked.engine, slates.hidden, slates.logits)
    given = ranked.probabilities[contenders]
    changed = sigmoid(logit(given) + logit(found[1:]) - logit(found[0]))
    return effects(given @ weights, changed @ weights, results, np.ones((1, len(given)), bool))


def without_each(history: History, times: Float64, first: int) -> model.Tails:
    """Return the history from the token before event `first` on: whole, then without each event from `first` on.

    The event after the missing one gets the bucket of the time since the event before the missing one.
    """
    items = np.concatenate([[START_ITEM], history.items])[first:]
    actions = np.concatenate([[UNKNOWN_ACTION], history.actions])[first:]
    gaps = np.concatenate([[GAP_MISSING], history.gaps])[first:]
    count = len(items) - 1  # events that are left out
    kept = np.arange(count) + (np.arange(count) >= np.arange(1, count + 1)[:, None])  # (count, count)
    columns = np.concatenate([np.arange(count + 1)[None], np.pad(kept, ((0, 0), (0, 1)))])
    after = np.arange(first + 1, len(times))  # events that follow a missing one
    if len(after):
        bridged = gap_buckets(np.stack([times[after - 2], times[after]], axis=1).ravel())[1::2]
        if first == 0:
            bridged[0] = GAP_FIRST
    new_gaps = gaps[columns]
    if len(after):
        new_gaps[np.arange(1, count), np.arange(1, count)] = bridged
    lengths = np.full(count + 1, count)
    lengths[0] = count + 1
    return model.Tails(items[columns], actions[columns], new_gaps, lengths)


def neighbour_effects(ranked: Ranked, weights: Float64, order: Int64, left_out: Int64, results: int) -> Chunks[Effects]:
    """Leave each of the neighbours out of the slate, and run the set-wise blocks on the others."""
    point = ranked.point
    assert point is not None
    n = len(order)
    contenders = order[:CONTENDERS]
    scores = ranked.probabilities @ weights
    changed = np.tile(scores, (len(left_out), 1))  # a neighbour keeps its own score
    at_once = max(1, CANDIDATE_CHUNK // (n - 1))
    for start in range(0, len(left_out), at_once):
        missing = left_out[start : start + at_once]
        yield len(missing) * (n - 1)
        others = np.stack([np.delete(np.arange(n), index) for index in missing])
        found = model.set_wise(ranked.engine, point.hidden[others], point.logits[others])
        np.put_along_axis(changed[start : start + at_once], others, found @ weights, axis=1)
    present = contenders != left_out[:, None]  # a missing neighbour holds no place
    return effects(scores[contenders], changed[:, contenders], results, present)


def effects(given: Float64, changed: Float64, results: int, present: NDArray[np.bool_]) -> Effects:
    """Compare the scores of C contenders with those without one of E parts.

    given: (C,), descending. changed: (E, C). present: (E, C) or (1, C), the contenders that hold a place.
    """
    spread = given[0] - given[-1]
    scale = spread / (len(given) - 1) if spread > 0 else 1.0  # the mean distance from one contender to the next
    places = smooth_rank(changed, results, scale, present) - smooth_rank(given[None], results, scale, present)
    return Effects(given[:results] - changed[:, :results], places)


def smooth_rank(scores: Float64, results: int, scale: float, present: NDArray[np.bool_]) -> Float64:
    """Return (E, K): for each of the first K columns of scores (E, C), the smoothed number of columns above it."""
    above = sigmoid((scores[:, None, :] - scores[:, :results, None]) / scale)
    result: Float64 = np.where(present[:, None, :], above, 0.0).sum(axis=2)
    return result


def logit(probabilities: Float64) -> Float64:
    inside = np.clip(probabilities, 1e-12, 1 - 1e-12)
    result: Float64 = np.log(inside / (1 - inside))
    return result


def sigmoid(x: Float64) -> Float64:
    result: Float64 = 1 / (1 + np.exp(-np.clip(x, -700, 700)))
    return result
