"""The ways to answer a request: their order, their predicted work, and when another variant is one of them."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.bundle.loader import load_rankers
from slatewise.bundle.ranker import Ranker
from slatewise.inference.costs import GraphCosts
from slatewise.inference.engine import HISTORY_CHUNK, chunk_of
from slatewise.ranking.admission import Admission, RequestLimits
from slatewise.ranking.offers import STALE_SECONDS, Size, make_offers
from tests.conftest import DEMO


@pytest.fixture(scope="module")
def demo() -> Ranker:
    return load_rankers(DEMO)["movielens"]


def exits(ranker: Ranker, size: Size, any_variant: bool = True, wanted: str = "set") -> list[tuple[str, str]]:
    found = make_offers(ranker, ranker.default_variant, wanted, size, any_variant)  # type: ignore[arg-type]
    return [(offer.exit, offer.variant) for offer in found]


def test_offers_go_from_the_wanted_exit_down(ranker: Ranker) -> None:
    size = Size(20, 0, 30, False)
    assert exits(ranker, size) == [("set", "fp32"), ("point", "fp32"), ("dot", "fp32")]
    assert exits(ranker, size, wanted="point") == [("point", "fp32"), ("dot", "fp32")]
    assert exits(ranker, size, wanted="dot") == [("dot", "fp32")]


def test_cheaper_variant_is_the_last_offer_without_a_state(demo: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap = {id(costs) for costs in demo.engines["int8-tables8"].costs.values()}
    monkeypatch.setattr(GraphCosts, "seconds", lambda self, work: work.rows * (0.5 if id(self) in cheap else 1.0))
    own = [("set", "int8"), ("point", "int8"), ("dot", "int8")]
    assert exits(demo, Size(20, 0, 30, False)) == [*own, ("dot", "int8-tables8")]
    assert exits(demo, Size(20, 5, 30, False)) == own, "the state of the user belongs to the other variant"
    assert exits(demo, Size(20, 0, 30, False), any_variant=False) == own, "the request names its variant"
    monkeypatch.setattr(GraphCosts, "seconds", lambda self, work: work.rows * (0.9 if id(self) in cheap else 1.0))
    assert exits(demo, Size(20, 0, 30, False)) == own, "hardly cheaper"


def with_variants(ranker: Ranker, rows: dict[str, tuple[float, float | None]], gate: bool = True) -> Ranker:
    """The ranker with its variant int8, and copies of it under other names.

    rows: seconds for 100 rows of work, and NDCG@10 minus fp32's, by name; int8 takes a second.
    """
    row = ranker.manifest.variants["int8"]
    variants = {"int8": row.model_copy(update={"difference": {}})}
    for name, (_, ndcg) in rows.items():
        measured = {} if ndcg is None else {"leave_one_out_ndcg10": [ndcg, ndcg - 0.1, ndcg + 0.1]}
        variants[name] = row.model_copy(update={"difference": measured, "within_gate": gate})
    engines = {}
    for name in variants:
        engines[name] = copy.copy(ranker.engines["int8"])
        engines[name].costs = copy.deepcopy(ranker.engines["int8"].costs)
        for costs in engines[name].costs.values():
            costs.weights = (0.0, rows.get(name, (1.0,))[0], 0.0)
            costs.learned_at = inf
    return replace(ranker, manifest=ranker.manifest.model_copy(update={"variants": variants}), engines=engines)


SHARES = {"lowrank-int8": 0.7, "lowrank-50-int8": 0.5, "lowrank-25-int8": 0.3}
SIZE = Size(20, 0, 30, False)  # `dot` takes 500 ms by int8, and 350, 250 and 150 by these


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize(
    ("milliseconds", "variant"),
    [(700, "int8"), (400, "lowrank-int8"), (300, "lowrank-50-int8"), (170, "lowrank-25-int8"), (100, None)],
)
def test_deadline_chooses_the_best_variant_in_time(
    demo: Ranker, milliseconds: float, variant: str | None, measured: bool
) -> None:
    rows = {name: (seconds, -0.1 + seconds / 10 if measured else None) for name, seconds in SHARES.items()}
    offers = make_offers(with_variants(demo, dict(sorted(rows.items()))), "int8", "set", SIZE, True)
    assert [(offer.exit, offer.variant) for offer in offers[3:]] == [("dot", name) for name in SHARES]
    admission = Admission(RequestLimits(64, 1.0, 1 << 20, 1.0, 10_000, 4_096, 10_000, 0.0))
    admitted = admission.admit(offers, admission.deadline(milliseconds, time.perf_counter()), True)
    assert (admitted.offer and admitted.offer.variant) == variant
    assert ("variant" in admitted.degraded) == (variant not in ("int8", None))


def test_worse_variant_that_saves_no_time_is_not_offered(demo: Ranker) -> None:
    rows = {"lowrank-int8": (0.7, -0.004), "lowrank-50-int8": (0.5, -0.002), "lowrank-25-int8": (0.5, -0.006)}
    own = [("set", "int8"), ("point", "int8"), ("dot", "int8")]
    assert exits(with_variants(demo, rows), SIZE) == [*own, ("dot", "lowrank-50-int8")]
    assert exits(with_variants(demo, rows, gate=False), SIZE) == own, "below the quality gate"


@given(st.integers(0, 600), st.integers(0, 600), st.integers(1, 4_096), st.booleans())
def test_predicted_work_equals_that_of_the_calls(
    demo: Ranker, events: int, cached: int, candidates: int, dot_first: bool
) -> None:
    """A second for each call, row and product: the sum over the chunks that `cascade.py` and `slates.py` make."""
    cached = min(cached, events)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphCosts, "seconds", lambda _, work: float(sum(work)))
        (offer,) = make_offers(demo, "fp32", "dot", Size(events, cached, candidates, dot_first), False)
        offered = make_offers(demo, "fp32", "set", Size(events, cached, candidates, dot_first), False)
        set_wise, point = offered[:2]
    slow = 0
    for first in range(cached, events, HISTORY_CHUNK):
        rows = min(HISTORY_CHUNK, events - first)
        slow += 1 + rows + rows * (1 + first + rows)
    assert offer.encode == point.encode == slow
    assert offer.score == 1 + candidates
    chunks = -(-candidates // chunk_of(candidates))
    rows_and_products = candidates + candidates * (events + 1)
    assert point.score == chunks + rows_and_products + (1 + candidates if dot_first else 0)
    count = 1 if candidates <= 1_024 else -(-candidates // 512)
    slates = [len(range(first, candidates, count)) for first in range(count)]
    assert set_wise.score == point.score + sum(1 + size + size**2 for size in slates)


def test_prediction_is_old_without_a_call(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ranker.engines["fp32"]
    now = time.perf_counter()
    for costs in engine.costs.values():
        monkeypatch.setattr(costs, "learned_at", now)
    size = Size(20, 0, 30, False)
    assert [offer.stale for offer in make_offers(ranker, "fp32", "set", size, False)] == [False] * 3
    monkeypatch.setattr(engine.costs["set"], "learned_at", now - STALE_SECONDS - 1)
    assert [offer.stale for offer in make_offers(ranker, "fp32", "set", size, False)] == [True, False, False]
