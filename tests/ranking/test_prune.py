"""Pruning inside a request, against a slow reference: sorted lists of the scores of `Engine.score`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slatewise.bundle.ranker import Ranker, weighted_mean
from slatewise.inference.arrays import Float64, PointScores
from slatewise.inference.costs import GraphCosts, Work
from slatewise.inference.engine import Engine, chunk_of
from slatewise.pruning import Prune, Pruned, pruned_to
from slatewise.ranking.offers import Size, make_offers
from slatewise.ranking.pipeline import Pipeline, Ranking, Scored
from slatewise.ranking.shadow import compare
from slatewise.ranking.validation import prune_of, unpruned
from slatewise.schemas import ModelExit, RankRequest
from tests.ranking.support import BOUND, draw_request, rank, reference, run
from tests.support.blocked_engine import BlockedMethod


def with_prune(ranker: Ranker, prune: Prune | None) -> Ranker:
    return dataclasses.replace(ranker, manifest=ranker.manifest.model_copy(update={"prune": prune}))


def cut_candidates(request: RankRequest, rows: list[int]) -> RankRequest:
    """The same request with some of its candidates only."""
    sent = request.candidates
    features = {name: [column[k] for k in rows] for name, column in sent.features.items()}
    changes = {"item_ids": [sent.item_ids[k] for k in rows], "features": features}
    return request.model_copy(update={"candidates": sent.model_copy(update=changes)})


def best(scores: Float64, rows: list[int], count: int) -> list[int]:
    """The rows of the highest scores, first in input order among equal ones, in input order."""
    by_score = sorted(range(len(rows)), key=lambda k: -scores[k])
    return [rows[k] for k in sorted(by_score[:count])]


def slow(
    ranker: Ranker, request: RankRequest, exit: str, point: int, last: int
) -> tuple[list[int], dict[int, Float64]]:
    """The order of all candidates, and the probabilities of each, by one call of `Engine.score` for each exit."""
    weights = ranker.score_weights(request.head_weights)
    rows = list(range(len(request.candidates.item_ids)))
    ordered: list[int] = []
    found: dict[int, Float64] = {}
    for name, count in (("dot", point), ("point", last), ("set", 0)):
        probabilities = reference(ranker, cut_candidates(request, rows), name)
        scores = weighted_mean(probabilities, weights)
        kept = [] if name == exit else best(scores, rows, count)
        found |= dict(zip(rows, probabilities, strict=True))
        mine = {row: scores[k] for k, row in enumerate(rows) if row not in kept}
        ordered = [*sorted(mine, key=lambda row: -mine[row]), *ordered]
        rows = kept
        if not rows:
            break
    return ordered, found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), exit=st.sampled_from(["point", "set"]), seed=st.integers(0, 99))
def test_pruned_ranking_equals_sorted_scores(ranker: Ranker, data: st.DataObject, exit: str, seed: int) -> None:
    n = data.draw(st.integers(2, 700), label="candidates")
    last = data.draw(st.integers(1, n - 1), label="last")
    point = last if exit == "point" else data.draw(st.integers(last, n), label="point")
    prune = {"point": point} if exit == "point" else {"point": point, "set": last}
    weights = data.draw(st.sampled_from([None, {"like": 1.0}, {"watch": 1.0, "like": -0.5}]), label="weights")
    deadline = data.draw(st.sampled_from([None, 60_000.0]), label="deadline")
    more: dict[str, Any] = {"exit": exit, "prune": prune, "top_n": last, "head_weights": weights}
    request = draw_request(ranker, 30, n, seed, deadline_ms=deadline, **more)
    ranking = run(ranker, lambda p: rank(p, request))
    order, expected = slow(ranker, request, exit, point, last)
    scored = ranking.scored
    assert scored is not None and not ranking.degraded and ranking.exit == exit
    assert scored.pruned == ({"point": point} if exit == "point" else prune)
    assert np.abs(scored.probabilities - np.array([expected[k] for k in range(n)])).max() <= BOUND
    places = {row: k for k, row in enumerate(ranking.order(None).tolist())}
    moved = [k for k, row in enumerate(order) if places[row] != k]
    by_weights = weighted_mean(scored.probabilities, ranker.score_weights(request.head_weights))
    assert all(abs(by_weights[order[k]] - by_weights[ranking.order(None)[k]]) <= 2 * BOUND for k in moved)
    assert ranking.order(last).tolist() == ranking.order(None)[:last].tolist()


@pytest.mark.parametrize("exit", ["point", "set"])
def test_equal_scores_are_pruned_in_input_order(ranker: Ranker, exit: str) -> None:
    request = draw_request(
        ranker, 5, 30, 1, exit=exit, prune={"point": 12, "set": 7}, top_n=3, head_weights={"like": 0.0}
    )
    ranking = run(ranker, lambda p: rank(p, request))
    assert ranking.order(None).tolist() == list(range(30))
    assert ranking.scored is not None
    assert np.flatnonzero(ranking.scored.by_exit()).tolist() == list(range(12 if exit == "point" else 7))


@given(
    st.one_of(st.none(), st.builds(lambda m, k: Prune(point=m + k, set=k), st.integers(0, 9), st.integers(1, 9))),
    st.sampled_from(["dot", "point", "set"]),
    st.integers(1, 30),
    st.one_of(st.none(), st.integers(1, 30)),
)
def test_a_request_is_pruned_if_one_exit_scores_its_results(
    prune: Prune | None, exit: str, candidates: int, top_n: int | None
) -> None:
    found = pruned_to(prune, exit, candidates, top_n)
    last = None if prune is None or exit == "dot" else getattr(prune, exit)
    pruned = last is not None and top_n is not None and top_n <= last < candidates
    assert (found is not None) == pruned
    if found is not None:
        assert prune is not None and prune.point is not None
        assert found == Pruned(exit, min(candidates, prune.point), last)


def test_a_single_number_prunes_one_exit() -> None:
    assert pruned_to(Prune(set=5), "set", 30, 5) == Pruned("set", 30, 5)
    assert pruned_to(Prune(set=5), "point", 30, 5) is None
    assert pruned_to(Prune(point=9), "set", 30, 9) == Pruned("set", 9, 9)
    assert pruned_to(Prune(), "set", 30, 1) is None


def test_the_request_overrides_the_manifest(ranker: Ranker) -> None:
    pruning = with_prune(ranker, Prune(point=20, set=10))

    def pruned(**members: Any) -> dict[ModelExit, int] | None:
        request = draw_request(ranker, 5, 30, 1, **({"exit": "set", "top_n": 5} | members))
        scored = run(pruning, lambda p: rank(p, request)).scored
        assert scored is not None
        return scored.pruned

    assert pruned() == pruned(prune=None) == {"point": 20, "set": 10}
    assert pruned(exit="point") == {"point": 20}
    assert pruned(prune={"set": 6}) == {"point": 30, "set": 6}
    assert pruned(prune={"point": 8}) == {"point": 8, "set": 8}
    assert pruned(head_weights={"like": 1.0}) is None, "the manifest's numbers are measured for its own weights"
    assert pruned(head_weights={"like": 1.0}, prune={"point": 9, "set": 9}) == {"point": 9, "set": 9}
    for members in ({"prune": False}, {"prune": {}}, {"top_n": None}, {"top_n": 11}, {"exit": "dot"}):
        assert pruned(**members) is None


def test_without_top_n_the_ranking_is_that_of_no_prune(ranker: Ranker) -> None:
    request = draw_request(ranker, 20, 300, 3, exit="set")
    plain, found = (run(one, lambda p: rank(p, request)) for one in (ranker, with_prune(ranker, Prune(point=9, set=5))))
    assert plain.scored is not None and found.scored is not None
    assert (plain.scored.probabilities == found.scored.probabilities).all()


def test_all_candidates_are_scored_for_their_input_order(ranker: Ranker) -> None:
    manifest = ranker.manifest.model_copy(update={"prune": Prune(point=9, set=5)})
    request = draw_request(ranker, 5, 30, 1, top_n=3)
    assert prune_of(request, manifest) == manifest.prune
    assert prune_of(unpruned(request), manifest) == Prune()
    without = draw_request(ranker, 5, 30, 1)
    assert unpruned(without) is without


def test_set_makes_slates_of_those_that_are_left(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slate of the best candidates if they fit into it, whatever the number of candidates."""
    monkeypatch.setattr(ranker.engines["fp32"], "slate", 40)
    sizes = []
    original = Engine.set

    def counted(engine: Engine, point: PointScores) -> Float64:
        sizes.append(len(point))
        return original(engine, point)

    monkeypatch.setattr(Engine, "set", counted)
    for prune in ({"set": 40}, {"set": 50}):
        request = draw_request(ranker, 5, 100, 1, exit="set", prune=prune, top_n=10)
        assert run(ranker, lambda p, request=request: rank(p, request)).exit == "set"  # type: ignore[misc]
    assert sizes == [40, 17, 17, 16]


@given(st.integers(2, 1_100), st.integers(0, 300), st.booleans(), st.data())
def test_predicted_work_of_a_pruned_request(
    ranker: Ranker, candidates: int, events: int, dot_first: bool, data: st.DataObject
) -> None:
    """A second for each call, row and product: the sum over the calls that the cascade makes."""
    k = data.draw(st.integers(1, candidates - 1), label="set")
    m = data.draw(st.integers(k, candidates), label="point")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphCosts, "seconds", lambda _, work: float(sum(work)))
        size = Size(events, 0, candidates, dot_first, Prune(point=m, set=k), 1)
        found = {offer.exit: offer.score for offer in make_offers(ranker, "fp32", "set", size, False)}
    dot = sum(Work(1, candidates, 0))
    point = sum(Work(-(-m // chunk_of(m)), m, m * (events + 1)))
    assert found["dot"] == dot
    number = -(-k // ranker.engines["fp32"].slate)
    slates = [len(range(first, k, number)) for first in range(number)]
    assert found["set"] == dot + point + sum(Work(number, k, sum(size**2 for size in slates)))
    assert found["point"] == point + (dot if dot_first or m < candidates else 0)


def test_deadline_leaves_the_results_of_the_exit_before(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = BlockedMethod("set", monkeypatch)
    prune = {"point": 20, "set": 10}
    request = draw_request(ranker, 5, 30, 1, exit="set", prune=prune, top_n=5, deadline_ms=500.0)

    async def work(pipeline: Pipeline) -> Ranking:
        try:
            return await rank(pipeline, request)
        finally:
            stop.may_end.set()

    ranking = run(ranker, work)
    assert ranking.scored is not None and stop.calls == 1
    assert (ranking.exit, ranking.scored.pruned, ranking.degraded) == ("point", {"point": 20}, {"deadline", "exit"})
    order, _ = slow(ranker, request, "point", 20, 20)
    assert ranking.order(5).tolist() == order[:5]


@pytest.mark.parametrize("exit", ["point", "set"])
def test_explanations_are_those_of_the_scored_candidates(ranker: Ranker, exit: str) -> None:
    prune = {"point": 25, "set": 12}
    request = draw_request(ranker, 20, 40, 1, exit=exit, prune=prune, top_n=5, explain=True)
    ranking = run(ranker, lambda p: rank(p, request))
    assert ranking.scored is not None and ranking.explanations is not None
    rows = np.flatnonzero(ranking.scored.by_exit()).tolist()
    alone = run(ranker, lambda p: rank(p, cut_candidates(request.model_copy(update={"prune": None}), rows)))
    assert alone.explanations is not None and len(alone.explanations) == 5
    for found, expected in zip(ranking.explanations, alone.explanations, strict=True):
        assert found["index"] == rows[expected["index"]]
        assert found["events"]["position"] == expected["events"]["position"]
        assert found["neighbours"]["index"] == [rows[k] for k in expected["neighbours"]["index"]]
        np.testing.assert_allclose(found["neighbours"]["delta"], expected["neighbours"]["delta"], atol=BOUND)


def test_predicted_explanations_are_those_of_a_short_slate(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def seconds(_engine: Engine, _events: int, candidates: int, _exit: str) -> float:
        counts.append(candidates)
        return 0.0

    monkeypatch.setattr("slatewise.ranking.plan.explanation_seconds", seconds)
    for top_n in (5, 11):
        prune = {"point": 25, "set": 10}
        request = draw_request(ranker, 5, 40, 1, exit="set", prune=prune, top_n=top_n, explain=True)
        run(ranker, lambda p, request=request: rank(p, request))  # type: ignore[misc]
    assert counts == [10, 40]


def test_shadow_compares_what_both_exits_scored(ranker: Ranker) -> None:
    """The candidates that only one of the versions scored by the exit are left out of tau and of the shift."""

    def ranking(scores: list[float], by: list[int] | None) -> Ranking:
        column = np.array(scores)
        scored_by = None if by is None else np.array(by, np.int8)
        scored = Scored("fp32", "set", column[:, None], column, scored_by)
        plain = run(ranker, lambda p: rank(p, draw_request(ranker, 0, 4, 1)))
        return dataclasses.replace(plain, scored=scored)

    shown = ranking([0.5, 0.4, 0.9, 0.1], [2, 2, 1, 0])
    assert shown.order(None).tolist() == [0, 1, 2, 3]
    agreement = compare(shown, ranking([0.6, 0.4, 0.2, 0.9], None), None)
    assert (agreement.tau, round(agreement.shift, 12)) == (1.0, 0.05)
    nothing = compare(shown, ranking([0.6, 0.4, 0.2, 0.9], [1, 1, 2, 2]), None)
    assert np.isnan(nothing.tau) and np.isnan(nothing.shift) and nothing.overlap == 1.0
