"""Exploration: draws, their effect on a ranking, the rankings that they leave alone, and refused requests."""

from __future__ import annotations

import json
import time
from math import inf
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import torch

from slatewise import Client, LocalRanker
from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import EXPLORE_GRAPH, POSTERIOR, ManifestError
from slatewise.bundle.ranker import Ranker
from slatewise.errors import Invalid
from slatewise.http.capture import capture_line
from slatewise.inference.arrays import Float32, Float64
from slatewise.inference.costs import GraphCosts
from slatewise.inference.engine import Engine, chunk_of
from slatewise.inference.exploration import draw
from slatewise.ranking.admission import Admission
from slatewise.ranking.load import Running
from slatewise.ranking.offers import STALE_SECONDS, Size, make_offers
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.ranking.shadow import Shadow
from slatewise.ranking.trace import Trace
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from slatewise_train.bundle_writer import CALIBRATION, write_exploration
from slatewise_train.evaluation.calibration import read_calibrations
from slatewise_train.evaluation.exploration import factor_of
from slatewise_train.rankers import families
from tests.conftest import Tiny
from tests.ranking.support import BOUND, draw_request, rank, run
from tests.support.application import serve
from tests.support.blocked_engine import BlockedMethod
from tests.support.bundle_copy import FP32, Copy, array_bytes

HEADS, FEATURES = 2, 33  # of the tiny ranker, the bias included
REFUSED = "this version cannot explore: export the ranker with `explore = true` in the table [export] of its TOML"


def random_factors(rng: np.random.Generator) -> Float32:
    roots = rng.standard_normal((HEADS, FEATURES, 2 * FEATURES))
    return factor_of(roots @ roots.swapaxes(1, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def copied(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """The tiny bundle with a posterior of random covariances."""
    copy = Copy(tiny.folder, tmp_path_factory.mktemp("exploring"))
    calibrations = read_calibrations(copy.folder / FP32 / CALIBRATION)
    write_exploration(
        copy.folder / FP32, tiny.trainer.model.eval(), calibrations, random_factors(np.random.default_rng(0))
    )
    for name in (EXPLORE_GRAPH, POSTERIOR):
        copy.rewrite(f"{FP32}/{name}", lambda content: content)
    return copy


@pytest.fixture(scope="module")
def exploring(copied: Copy) -> Ranker:
    return copied.load()


@pytest.fixture(scope="module")
def server(copied: Copy) -> Any:
    with serve(Settings(bundles=copied.root)) as client:
        yield client


def probabilities(ranker: Ranker, request: RankRequest, **changes: Any) -> Float64:
    ranking = run(ranker, lambda p: rank(p, request.model_copy(update=changes)))
    assert ranking.scored is not None and not ranking.degraded
    return ranking.scored.probabilities


# Draws


def test_draws_have_the_covariance_of_the_posterior() -> None:
    """Over n draws, the squared error of the mean and of each variance is of the size that chance gives."""
    rng = np.random.default_rng(1)
    factors = random_factors(rng)
    n = 20_000
    drawn = np.stack([draw(factors, f"request-{k}") for k in range(n)]).astype(np.float64)  # (n, heads, D)
    for head in range(HEADS):
        covariance = factors[head].astype(np.float64) @ factors[head].T
        whitened = np.linalg.solve(factors[head].astype(np.float64), drawn[:, head].T)  # (D, n), standard normal
        assert n * (whitened.mean(1) ** 2).sum() < FEATURES + 6 * np.sqrt(2 * FEATURES)
        found = np.cov(whitened)
        assert np.abs(found - np.eye(FEATURES)).max() < 6 * np.sqrt(2 / n)
        np.testing.assert_allclose(np.cov(drawn[:, head].T), covariance, atol=0.1 * np.abs(covariance).max())
    between = np.corrcoef(drawn[:, 0, 0], drawn[:, 1, 0])[0, 1]
    assert abs(between) < 6 / np.sqrt(n), "heads are drawn apart"


def test_draw_is_a_function_of_seed_and_scale() -> None:
    factors = np.eye(3, dtype=np.float32)[None].repeat(2, 0)
    first = draw(factors, "a")
    assert (first == draw(factors, "a")).all() and (first != draw(factors, "b")).all()
    assert (draw(factors, "a", 0.5) == np.float32(0.5) * first).all()
    assert not draw(factors, "a", 0.0).any()
    assert first.dtype == np.float32
    expected = [[0.428053, -0.667877, -0.185582], [-1.052815, -1.469909, 0.944813]]  # with numpy 2.4
    np.testing.assert_allclose(first, expected, atol=5e-6)


# Scores


@pytest.mark.parametrize("exit", ["dot", "point", "set"])
@pytest.mark.parametrize("candidates", [1, 2, 300])
def test_off_is_bit_equal_to_a_bundle_without_posterior(
    ranker: Ranker, exploring: Ranker, exit: str, candidates: int
) -> None:
    request = draw_request(ranker, 30, candidates, 1, exit=exit, id="a")
    plain = probabilities(ranker, request)
    assert (probabilities(exploring, request) == plain).all()
    assert (probabilities(exploring, request, explore=0.0) == plain).all()
    if exit != "dot":
        assert (probabilities(exploring, request, explore=1.0) != plain).any(axis=1).all()
    assert (probabilities(exploring, request) == plain).all(), "an explored request leaves nothing behind"


@pytest.mark.parametrize("candidates", [1, 2, 70])
def test_point_moves_by_features_times_draw(tiny: Tiny, exploring: Ranker, copied: Copy, candidates: int) -> None:
    """Against numpy and torch; `set` gets the moved logits and the same hidden states."""
    engine = exploring.engines["fp32"]
    request = draw_request(exploring, 20, candidates, 2)
    arrays, _ = exploring.candidates(request, 978_300_000)
    state = engine.extend(engine.start, exploring.history(request))
    plain = engine.point(arrays, exploring.default_meta, state)
    moved = engine.exploring("a", 2.0).point(arrays, exploring.default_meta, state)
    assert engine.posterior is not None
    weights = draw(engine.posterior, "a", 2.0)
    with torch.no_grad():
        x = families.features(tiny.trainer.model.eval(), torch.from_numpy(plain.hidden)).numpy()
    logits = plain.logits + x @ weights[:, :-1].T + weights[:, -1]
    np.testing.assert_allclose(moved.logits, logits, atol=2e-4)
    maps = read_calibrations(copied.folder / FP32 / CALIBRATION)["point"]
    expected = np.stack([1 / (1 + np.exp(-maps[k](logits[:, k]))) for k in range(HEADS)], axis=1)
    assert np.abs(moved.probabilities - expected).max() <= 10 * BOUND
    assert (moved.hidden == plain.hidden).all()
    still = engine.exploring("a", 0.0).point(arrays, exploring.default_meta, state)
    assert (still.probabilities == plain.probabilities).all() and (still.logits == plain.logits).all()


@pytest.mark.parametrize("exit", ["point", "set"])
def test_same_id_same_answer_whatever_the_chunks(exploring: Ranker, exit: str) -> None:
    n = 2 * chunk_of(1) + 7
    request = draw_request(exploring, 40, n, 3, exit=exit, explore=1.0, id="a")
    first = probabilities(exploring, request)
    assert (probabilities(exploring, request) == first).all()
    assert np.abs(probabilities(exploring, request, deadline_ms=60_000.0) - first).max() <= BOUND
    assert np.abs(probabilities(exploring, request, id="b") - first).max() > 100 * BOUND
    engine = exploring.engines["fp32"].exploring("a", 1.0)
    arrays, _ = exploring.candidates(request, 978_300_000)
    whole = engine.score(exploring.history(request), arrays, exploring.default_meta, exit)
    assert np.abs(first - whole).max() <= BOUND


def test_candidates_do_not_change_each_others_draw(exploring: Ranker) -> None:
    request = draw_request(exploring, 10, 40, 4, exit="point", explore=3.0, id="a")
    first = probabilities(exploring, request)
    sent = request.candidates
    half = sent.model_copy(
        update={"item_ids": sent.item_ids[:20], "features": {k: v[:20] for k, v in sent.features.items()}}
    )
    assert np.abs(probabilities(exploring, request, candidates=half) - first[:20]).max() <= BOUND


def test_pruned_request_explores_what_is_left(exploring: Ranker) -> None:
    prune = {"point": 20, "set": 10}
    request = draw_request(exploring, 10, 60, 5, exit="set", prune=prune, top_n=5, explore=1.0, id="a")
    plain, drawn = (
        run(exploring, lambda p, change=change: rank(p, request.model_copy(update=change)))  # type: ignore[misc]
        for change in ({"explore": None}, {})
    )
    assert plain.scored is not None and drawn.scored is not None
    assert drawn.scored.pruned == prune
    assert plain.scored.scored_by is not None and drawn.scored.scored_by is not None
    by_dot = drawn.scored.scored_by == 0
    assert (by_dot == (plain.scored.scored_by == 0)).all(), "`dot` does not explore"
    changed = (plain.scored.probabilities != drawn.scored.probabilities).all(axis=1)
    assert (changed == ~by_dot).all()


def test_deadline_leaves_the_drawn_scores_of_point(exploring: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = BlockedMethod("set", monkeypatch)
    request = draw_request(exploring, 5, 30, 6, exit="set", explore=1.0, id="a", deadline_ms=500.0)

    async def work(pipeline: Pipeline) -> Ranking:
        try:
            return await rank(pipeline, request)
        finally:
            stop.may_end.set()

    ranking = run(exploring, work)
    assert ranking.scored is not None and ranking.exit == "point"
    monkeypatch.undo()
    expected = probabilities(exploring, request, exit="point", deadline_ms=None)
    assert np.abs(ranking.scored.probabilities - expected).max() <= BOUND


# Predicted work


@pytest.mark.parametrize("explore", [None, 0.0, 1.0])
@pytest.mark.parametrize(
    ("exit", "candidates", "members"),
    [
        ("point", 2, {}),
        ("set", 600, {}),
        ("set", 600, {"deadline_ms": 60_000.0}),
        ("point", 300, {"prune": {"point": 270}, "top_n": 5}),
        ("set", 300, {"prune": {"point": 270, "set": 20}, "top_n": 5}),
    ],
)
def test_predicted_work_is_that_of_the_calls(
    exploring: Ranker,
    monkeypatch: pytest.MonkeyPatch,
    exit: str,
    candidates: int,
    members: dict[str, Any],
    explore: float | None,
) -> None:
    """A time for each call, row and product, a power of 2. One thread, because several make more chunks."""
    predicted, called = [], []
    begin_work = Admission.begin_work

    def begin(admission: Admission, running: Running) -> None:
        predicted.append(running.predicted)
        begin_work(admission, running)

    monkeypatch.setattr(Admission, "begin_work", begin)
    monkeypatch.setattr(GraphCosts, "seconds", lambda _, work: sum(work) / 2**20)
    monkeypatch.setattr(GraphCosts, "learn", lambda _, work, __: called.append(work))
    request = draw_request(exploring, 20, candidates, 1, exit=exit, explore=explore, id="a", **members)
    assert run(exploring, lambda p: rank(p, request), threads=1).exit == exit
    assert predicted == [sum(map(sum, called)) / 2**20], called


def test_draw_and_its_graph_are_timed_at_load(exploring: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = exploring.engines["fp32"]
    for name in ("explore", "draw"):
        assert engine.costs[name].weights != GraphCosts().weights
    old = time.perf_counter() - 2 * STALE_SECONDS
    for name, costs in engine.costs.items():
        monkeypatch.setattr(costs, "learned_at", old if name == "explore" else inf)
    size = Size(20, 0, 30, False, explore=True)
    assert [offer.stale for offer in make_offers(exploring, "fp32", "set", size, False)] == [True, True, False]
    plain = size._replace(explore=False)
    assert [offer.stale for offer in make_offers(exploring, "fp32", "set", plain, False)] == [False] * 3


# Answers


def body(ranker: Ranker, **members: Any) -> dict[str, Any]:
    return draw_request(ranker, 20, 50, 7, **members).model_dump(exclude_defaults=True)


def answer(client: httpx.Client, sent: dict[str, Any], path: str = "/rerank", **headers: str) -> dict[str, Any]:
    response = client.post(path, json=sent, headers=headers)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_answer_can_be_repeated_by_its_id(server: httpx.Client, exploring: Ranker) -> None:
    sent = body(exploring, explore=1.0)
    first, other = answer(server, sent), answer(server, sent)
    assert first["explored"] is other["explored"] is True
    assert first["id"] != other["id"] and first["results"] != other["results"]
    assert answer(server, sent | {"id": first["id"]})["results"] == first["results"]
    assert answer(server, sent, **{"X-Request-ID": first["id"]})["results"] == first["results"]
    scores = answer(server, sent | {"id": first["id"]}, "/score")["results"]["scores"]
    assert sorted(scores, reverse=True) == first["results"]["scores"]
    assert "explored" not in answer(server, body(exploring))
    assert "explored" not in answer(server, sent | {"explore": 0})


def test_explored_answers_are_counted_apart(server: httpx.Client, exploring: Ranker) -> None:
    def read(name: str) -> float:
        lines = server.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ('slatewise_explored_total{ranker="tiny"}', "slatewise_best_score_count")
    before = [read(name) for name in names]
    answer(server, body(exploring, explore=1.0))
    assert [read(name) for name in names] == [before[0] + 1, before[1]]
    answer(server, body(exploring))
    assert [read(name) for name in names] == [before[0] + 1, before[1] + 1]


def test_model_card_says_whether_a_ranker_explores(server: httpx.Client, client: httpx.Client) -> None:
    assert server.get("/models/tiny").json()["explore"] is True
    assert client.get("/models/tiny").json()["explore"] is False


@pytest.mark.parametrize("value", ["-0.1", "100.5", "NaN", "Infinity", "1e999", '"1"', "true", "[1]", "{}"])
def test_wrong_scale_is_refused(server: httpx.Client, exploring: Ranker, value: str) -> None:
    text = json.dumps(body(exploring, explore=1.0)).replace('"explore": 1.0', f'"explore": {value}')
    response = server.post("/rerank", content=text, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    if response.status_code == 422:
        assert response.json()["errors"][0]["pointer"] == "/explore"


def test_bundle_without_posterior_says_how_to_get_one(client: httpx.Client, ranker: Ranker) -> None:
    response = client.post("/rerank", json=body(ranker, explore=1.0))
    assert response.status_code == 422
    assert response.json()["errors"] == [{"pointer": "/explore", "detail": REFUSED}]
    assert client.post("/rerank", json=body(ranker, explore=0.0)).status_code == 200


@pytest.mark.parametrize(("members", "pointer"), [({"exit": "dot"}, "/explore"), ({"explain": True}, "/explain")])
def test_what_does_not_explore_is_refused(exploring: Ranker, members: dict[str, Any], pointer: str) -> None:
    request = draw_request(exploring, 5, 10, 8, explore=1.0, **members)
    with pytest.raises(Invalid) as error:
        run(exploring, lambda p: rank(p, request))
    assert [fault.pointer for fault in error.value.faults] == [pointer]


def test_client_and_local_ranker_explore_alike(server: httpx.Client, exploring: Ranker) -> None:
    sent = body(exploring, explore=2.0, id="a")
    with Client(str(server.base_url), timeout=30) as remote, LocalRanker(exploring) as local:
        there, here = remote.rerank(**sent), local.rerank(**sent)
        assert here.explored and there.explored
        assert (here.item_ids, here.scores) == (there.item_ids, there.scores)
        assert not local.rerank(**(sent | {"explore": None})).explored
        frame = [{"user": "u", "item_id": item} for item in sent["candidates"]["item_ids"][:3]]
        assert len(local.rank_many(frame, explore=1.0)) == 3


def test_capture_keeps_the_id_of_an_explored_request(exploring: Ranker) -> None:
    request = draw_request(exploring, 3, 4, 9, id="a", explore=1.0)
    kept = RankRequest.model_validate_json(capture_line(request, 1.0, b"key"))
    assert (kept.id, kept.explore) == ("a", 1.0)
    assert (probabilities(exploring, kept) == probabilities(exploring, request)).all()
    plain = request.model_copy(update={"explore": None})
    assert RankRequest.model_validate_json(capture_line(plain, 1.0, b"key")).id is None


def test_shadow_leaves_explored_requests_out(exploring: Ranker) -> None:
    request = draw_request(exploring, 3, 4, 9, id="a", explore=1.0)

    async def work(pipeline: Pipeline) -> list[bool]:
        found = []
        for sent in (request, request.model_copy(update={"explore": None})):
            trace = Trace(0.0)
            shown = await pipeline.rank(sent, trace)
            shadow = Shadow(pipeline, lambda *_: None)
            shadow.offer(sent, shown, trace, exploring)
            found.append(shadow.task is not None)
            await shadow.stop()
        return found

    assert run(exploring, work) == [False, True]


# Bundles


def test_digest_of_the_posterior_is_checked(copied: Copy, tmp_path: Path) -> None:
    copy = Copy(copied.folder, tmp_path)
    (copy.folder / FP32 / POSTERIOR).write_bytes(b"something else")
    with pytest.raises(ManifestError, match=r"explore\.npy does not have the manifest's sha256"):
        copy.load()


@pytest.mark.parametrize("shape", [(HEADS, FEATURES), (HEADS + 1, FEATURES, FEATURES), (HEADS, 5, 5), (HEADS, 4, 5)])
def test_posterior_of_another_shape_is_refused(copied: Copy, tmp_path: Path, shape: tuple[int, ...]) -> None:
    copy = Copy(copied.folder, tmp_path)
    copy.write(f"{FP32}/{POSTERIOR}", array_bytes(np.zeros(shape, np.float32), tmp_path / "array.npy"))
    with pytest.raises(ManifestError, match=r"explore\.(npy|onnx)"):
        copy.load()


def test_posterior_without_its_graph_is_refused(copied: Copy, tmp_path: Path) -> None:
    copy = Copy(copied.folder, tmp_path)
    (copy.folder / FP32 / EXPLORE_GRAPH).unlink()
    with pytest.raises(ManifestError, match=r"explore\.onnx"):
        load_bundle(copy.folder)


def test_graphs_of_the_exits_are_those_of_the_plain_bundle(copied: Copy, tiny: Tiny) -> None:
    for graph in ("encode", "dot", "point", "set"):
        path = f"{FP32}/{graph}.onnx"
        assert (copied.folder / path).read_bytes() == (tiny.folder / path).read_bytes()
    assert Engine(copied.folder / FP32, copied.load().items, ["dot", "point", "set"]).posterior is None
    assert onnx.load(copied.folder / FP32 / EXPLORE_GRAPH).graph.name == "explore"
