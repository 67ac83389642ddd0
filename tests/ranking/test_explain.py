"""Explanations: each delta compared with a request that is ranked again without the event or the neighbour."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.ranker import Ranker
from slatewise.errors import DeadlineExceeded
from slatewise.inference.arrays import Float64
from slatewise.inference.costs import GraphCosts, work_of
from slatewise.inference.engine import Engine
from slatewise.ranking import explain
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.schemas import Explanation, RankRequest
from tests.conftest import DEMO
from tests.ranking.support import BOUND, draw_request, rank, run, until, working


def explained(ranker: Ranker, request: RankRequest, **options: Any) -> Ranking:
    return run(ranker, lambda p: rank(p, request.model_copy(update={"explain": True})), **options)


def scores(ranker: Ranker, request: RankRequest) -> Float64:
    """(N,) scores of a request, in input order."""
    scored = run(ranker, lambda p: rank(p, request)).scored
    assert scored is not None
    return scored.scores


def without(request: RankRequest, member: str, position: int) -> RankRequest:
    """The request without one event (`history`) or one candidate (`candidates`)."""
    columns: dict[str, Any] = getattr(request, member).model_dump(exclude_none=True)

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(column) for name, column in value.items()}
        return value[:position] + value[position + 1 :] if isinstance(value, list) else value

    body = request.model_dump(exclude_none=True) | {member: {name: cut(column) for name, column in columns.items()}}
    return RankRequest.model_validate(body)


def explanations(ranking: Ranking) -> list[Explanation]:
    assert ranking.explanations is not None
    return ranking.explanations


def assert_events_equal_reranking(ranker: Ranker, request: RankRequest, bound: float) -> int:
    """Compare the deltas of all events that are shown. Return how many there are."""
    whole = scores(ranker, request)
    ranked_again: dict[int, Float64] = {}
    shown = 0
    for result in explanations(explained(ranker, request)):
        events = result["events"]
        assert events["item_ids"] == [request.history.item_ids[k] for k in events["position"]]
        assert events["places"] == sorted(events["places"], reverse=True)
        for position, delta in zip(events["position"], events["delta"], strict=True):
            if position not in ranked_again:
                ranked_again[position] = scores(ranker, without(request, "history", position))
            index = result["index"]
            assert delta == pytest.approx(whole[index] - ranked_again[position][index], abs=bound)
            shown += 1
    return shown


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.one_of(st.sampled_from([0, 1, 2, 11, 12, 13, 14]), st.integers(0, 60)),
    n=st.one_of(st.just(1), st.integers(1, 60)),
    exit=st.sampled_from(["dot", "point"]),
    seed=st.integers(0, 99),
)
def test_event_deltas_equal_reranking(ranker: Ranker, events: int, n: int, exit: str, seed: int) -> None:
    request = draw_request(ranker, events, n, seed, exit=exit)
    shown = assert_events_equal_reranking(ranker, request, BOUND)
    assert bool(shown) == bool(events)


@pytest.mark.parametrize(("events", "n"), [(1, 1), (1, 20), (9, 2), (40, 20)])
def test_event_deltas_of_a_small_slate_equal_reranking(ranker: Ranker, events: int, n: int) -> None:
    """Up to CONTENDERS candidates, the exit `set` runs on the whole slate again."""
    assert n <= explain.CONTENDERS
    assert assert_events_equal_reranking(ranker, draw_request(ranker, events, n, 3, exit="set"), BOUND)


@pytest.mark.parametrize("variant", ["fp32", "int8", "int8-tables8"])
def test_event_deltas_of_each_variant_equal_reranking(variant: str) -> None:
    ranker = load_bundle(max((DEMO / "movielens").glob("[0-9]*")))
    request = draw_request(ranker, 30, 20, 5, variant=variant)
    bound = max(1e-5, *(value for value in [ranker.manifest.variants[variant].bound] if value is not None))
    assert assert_events_equal_reranking(ranker, request, 2 * bound)


def test_events_in_another_order_keep_their_positions(ranker: Ranker) -> None:
    request = draw_request(ranker, 12, 10, 4, exit="point")
    history = request.history
    assert history.timestamps is not None and history.actions is not None
    shuffled = np.random.default_rng(0).permutation(12).tolist()
    columns = {name: [getattr(history, name)[k] for k in shuffled] for name in ("item_ids", "actions")}
    times = [float(k) for k in shuffled]
    request = request.model_copy(update={"history": history.model_copy(update=columns | {"timestamps": times})})
    assert assert_events_equal_reranking(ranker, request, BOUND)


def test_events_outside_the_window_are_not_named(ranker: Ranker) -> None:
    longest = ranker.manifest.limits.history_used
    request = draw_request(ranker, longest + 70, 20, 6)
    ranking = explained(ranker, request)
    positions = {p for result in explanations(ranking) for p in result["events"]["position"]}
    assert positions and min(positions) >= longest + 70 - explain.EVENTS


@pytest.mark.parametrize("n", [2, 9, 60, 200])
def test_neighbour_deltas_equal_reranking(ranker: Ranker, n: int) -> None:
    request = draw_request(ranker, 20, n, 7, exit="set")
    whole = scores(ranker, request)
    left_out = set()
    for result in explanations(explained(ranker, request)):
        index, near = result["index"], result["neighbours"]
        assert index not in near["index"]
        assert near["places"] == sorted(near["places"], reverse=True)
        for neighbour, item, delta in zip(near["index"], near["item_ids"], near["delta"], strict=True):
            assert item == request.candidates.item_ids[neighbour]
            reranked = scores(ranker, without(request, "candidates", neighbour))
            expected = whole[index] - reranked[index - (neighbour < index)]
            assert delta == pytest.approx(expected, abs=BOUND)
            left_out.add(neighbour)
    assert left_out == set(np.argsort(-whole, kind="stable")[: explain.neighbour_count(n)].tolist())


@pytest.mark.parametrize(("n", "count"), [(1, 0), (2, 2), (8, 8), (100, 8), (200, 4), (1024, 1), (4096, 1)])
def test_number_of_neighbours_is_bounded_by_rows(n: int, count: int) -> None:
    assert explain.neighbour_count(n) == count


def test_deltas_of_a_large_slate_follow_reranking(ranker: Ranker) -> None:
    """Above CONTENDERS candidates, the exit `set` is approximate for events."""
    request = draw_request(ranker, 30, 120, 8, exit="set")
    whole = scores(ranker, request)
    pairs = []
    for result in explanations(explained(ranker, request)):
        for position, delta in zip(result["events"]["position"], result["events"]["delta"], strict=True):
            reranked = scores(ranker, without(request, "history", position))
            pairs.append((delta, whole[result["index"]] - reranked[result["index"]]))
    assert len(pairs) >= 30
    assert np.corrcoef(np.array(pairs).T)[0, 1] > 0.98


def test_places_are_the_smoothed_rank_among_contenders() -> None:
    given_scores = np.array([4.0, 2.0, 1.0])
    changed = np.array([[4.0, 1.0, 2.0]])
    found = explain.effects(given_scores, changed, 2, np.array([[True, True, True]]))
    scale = 1.5  # (4 - 1) / 2

    def smooth(row: list[float], k: int) -> float:
        return sum(1 / (1 + float(np.exp(-(other - row[k]) / scale))) for other in row)

    for k in range(2):
        assert found.places[0, k] == pytest.approx(smooth([4, 1, 2], k) - smooth([4, 2, 1], k))
    assert found.scores.tolist() == [[0.0, 1.0]]
    assert found.places[0, 1] > 0  # the second result was raised
    alone = explain.effects(given_scores, changed, 2, np.array([[True, True, False]]))
    assert alone.places[0, 1] == pytest.approx(smooth([4, 1], 1) - smooth([4, 2], 1))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_move_no_places(value: float) -> None:
    found = explain.effects(np.full(3, value), np.full((2, 3), value), 3, np.ones((1, 3), bool))
    assert not found.places.any() and not found.scores.any()


def test_logit_is_finite_at_0_and_1() -> None:
    values = explain.sigmoid(explain.logit(np.array([0.0, 0.5, 1.0])))
    assert values == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(("exit", "columns"), [("dot", 0), ("point", 0), ("set", 7)])
def test_only_the_exit_set_has_neighbours(ranker: Ranker, exit: str, columns: int) -> None:
    ranking = explained(ranker, draw_request(ranker, 5, 30, 1, exit=exit))
    first = explanations(ranking)[0]
    assert len(first["neighbours"]["index"]) == columns
    assert 0 < len(first["events"]["position"]) <= 2 * explain.SHOWN


@pytest.mark.parametrize(("n", "top_n", "count"), [(30, None, 10), (30, 3, 3), (30, 25, 10), (4, None, 4)])
def test_first_results_are_explained(ranker: Ranker, n: int, top_n: int | None, count: int) -> None:
    request = draw_request(ranker, 5, n, 1, top_n=top_n)
    ranking = explained(ranker, request)
    assert [result["index"] for result in explanations(ranking)] == ranking.order(count).tolist()


def test_above_the_set_wise_limit_no_neighbour_is_named(ranker: Ranker) -> None:
    request = draw_request(ranker, 5, ranker.manifest.limits.set_wise + 1, 1, exit="set")
    ranking = explained(ranker, request)
    assert ranking.exit == "set" and not explanations(ranking)[0]["neighbours"]["index"]


def test_unknown_items_are_explained_too(ranker: Ranker) -> None:
    request = draw_request(ranker, 3, 5, 1)
    unknown = {"item_ids": ["never-seen"] * 3}
    request = request.model_copy(update={"history": request.history.model_copy(update=unknown)})
    assert assert_events_equal_reranking(ranker, request, BOUND)


def test_ranking_is_the_same_with_explanations(ranker: Ranker) -> None:
    for pack in (False, True):
        request = draw_request(ranker, 20, 40, 2, user="u")
        plain = run(ranker, lambda p, r=request: rank(p, r), pack_history=pack)
        ranking = explained(ranker, request, pack_history=pack)
        assert plain.explanations is None and plain.scored is not None and ranking.scored is not None
        assert (plain.scored.scores == ranking.scored.scores).all()
        assert plain.degraded == ranking.degraded == frozenset()


def test_negative_weights_are_explained(ranker: Ranker) -> None:
    head = next(iter(ranker.manifest.heads))
    request = draw_request(ranker, 10, 20, 2, head_weights={head: -5.0})
    assert assert_events_equal_reranking(ranker, request, BOUND)


def test_without_explain_no_batch_runs(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("explained")

    monkeypatch.setattr("slatewise.ranking.pipeline.explain", fail)
    assert run(ranker, lambda p: rank(p, draw_request(ranker, 10, 20, 2))).explanations is None


def deadline_in(method: str, ranker: Ranker, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Ranking:
    """The ranking of a request whose deadline passes in a batched call of the model."""
    original = getattr(explain.model, method)
    may_end = threading.Event()

    def held(*arguments: Any, **options: Any) -> Any:
        assert may_end.wait(30)
        return original(*arguments, **options)

    monkeypatch.setattr(explain.model, method, held)
    request = draw_request(ranker, 20, 30, 1, exit="set", deadline_ms=400.0, explain=True, **more)

    async def work(pipeline: Pipeline) -> Ranking:
        try:
            return await rank(pipeline, request)
        finally:
            may_end.set()
            assert not pipeline.admission.load.running

    return run(ranker, work)


def test_deadline_drops_explanations_only(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = deadline_in("encode", ranker, monkeypatch)
    assert ranking.exit == "set" and ranking.explanations is None
    assert ranking.degraded == {"deadline", "explanations"}


def test_deadline_without_degradation_is_504(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeadlineExceeded):
        deadline_in("set_wise", ranker, monkeypatch, allow_degraded=False)


def test_load_drops_explanations_first(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other work present, the exit is kept and the explanations are dropped; alone, they are computed."""
    monkeypatch.setattr(GraphCosts, "seconds", lambda _, work: work.rows / 1e3)
    request = draw_request(ranker, 20, 30, 1, exit="set", explain=True)
    own = (20 + 30 + 30) / 1e3

    async def beside(pipeline: Pipeline) -> list[Ranking]:
        alone = await rank(pipeline, request)
        with working(pipeline.admission, 1):
            busy = await rank(pipeline, request)
            strict = await rank(pipeline, request.model_copy(update={"allow_degraded": False}))
        return [alone, busy, strict]

    alone, busy, strict = run(ranker, beside, threads=1, max_queue_s=1.01 * own / 0.8)
    for ranking in (alone, strict):
        assert ranking.explanations and not ranking.degraded
    assert busy.exit == "set" and busy.explanations is None and busy.degraded == {"explanations"}


def test_input_order_has_no_explanations(ranker: Ranker) -> None:
    request = draw_request(ranker, 20, 30, 1, explain=True, deadline_ms=1e-6)
    ranking = run(ranker, lambda p: rank(p, request))
    assert ranking.exit == "input_order" and ranking.explanations is None
    assert ranking.degraded == {"deadline", "explanations"}


def test_explanations_yield_to_other_requests(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of a higher priority is answered while an explanation waits for its next chunk."""
    order = []
    request = draw_request(ranker, 20, 100, 1, exit="set", explain=True, priority=5)
    urgent = draw_request(ranker, 0, 1, 2, exit="dot", priority=-5)
    batched = explain.model.encode

    async def work(pipeline: Pipeline) -> None:
        loop = asyncio.get_running_loop()
        started = asyncio.Event()
        submitted = asyncio.Event()

        def held(*arguments: Any, **options: Any) -> Any:
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(submitted.wait(), loop).result(30)
            return batched(*arguments, **options)

        monkeypatch.setattr(explain.model, "encode", held)

        async def named(name: str, one: RankRequest) -> None:
            await rank(pipeline, one)
            order.append(name)

        slow = asyncio.create_task(named("explained", request))
        await started.wait()
        fast = asyncio.create_task(named("urgent", urgent))
        await until(lambda: pipeline.workers.queue)
        submitted.set()
        await asyncio.gather(slow, fast)

    run(ranker, work, threads=1)
    assert order == ["urgent", "explained"]


@pytest.mark.parametrize(("events", "n", "exit"), [(0, 1, "dot"), (0, 9, "set"), (1, 1, "set"), (50, 300, "set")])
def test_predicted_work_is_that_of_the_calls(
    ranker: Ranker, events: int, n: int, exit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one second for each row and product, the prediction is the sum over the calls of batches."""
    monkeypatch.setattr(GraphCosts, "seconds", lambda _, work: float(work.rows + work.products))
    request = draw_request(ranker, events, n, 1, exit=exit, explain=True)
    batched = 0.0
    original = Engine.run

    def counted(engine: Engine, graph: str, feeds: dict[str, Any]) -> Any:
        nonlocal batched
        columns = feeds["items" if graph == "encode" else "hidden" if graph == "set" else "candidates"]
        if len(columns) > 1 or (graph == "set" and columns.shape[1] == n - 1):  # a large slate is a batch by itself
            batched += engine.costs[graph].seconds(work_of(graph, feeds))
        return original(engine, graph, feeds)

    monkeypatch.setattr(Engine, "run", counted)
    explained(ranker, request)
    assert explain.explanation_seconds(ranker.engines["fp32"], events, n, exit) == pytest.approx(batched)


def test_answer_has_explanations_only_if_asked(client: httpx.Client, example: dict[str, Any]) -> None:
    plain = client.post("/rerank", json=example).json()
    assert "explanations" not in plain
    for path in ("/rerank", "/score"):
        answer = client.post(path, json=example | {"explain": True, "top_n": 2})
        found = json.loads(answer.text)["explanations"]
        assert [result["index"] for result in found] == plain["results"]["index"][:2]
        assert set(found[0]) == {"index", "events", "neighbours"}
        assert len({len(column) for column in found[0]["events"].values()}) == 1
    assert client.post("/rerank", json=example | {"explain": 1}).status_code == 422
