"""The ways to answer a request, the requested one first and then ever cheaper ones, with their predicted seconds.

    set      all exits of the variant, from the requested one down
    point
    dot
    dot      by ever cheaper variants, if the request leaves the variant open and no state of its user is cached

Called by: `plan.py`, and `pipeline.py` for a part; `admission.py` chooses among them. Calls: `inference/costs.py`,
`inference/slates.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from slatewise.bundle.ranker import Ranker
from slatewise.inference.costs import ONE_CALL, Work
from slatewise.inference.engine import DRAW, EXPLORE, HISTORY_CHUNK, Engine, chunk_of
from slatewise.inference.slates import slate_count
from slatewise.pruning import Prune, Pruned, pruned_to
from slatewise.schemas import EXITS, ModelExit

STALE_SECONDS = 10.0  # without a call of a graph, after which its prediction may be wrong
CHEAPER = 0.8  # of the time of the variant that is given up


class Offer(NamedTuple):
    exit: ModelExit
    variant: str
    encode: float  # predicted seconds of a thread for the history
    score: float  # and for the candidates
    stale: bool  # the prediction is old

    @property
    def seconds(self) -> float:
        return self.encode + self.score


class Size(NamedTuple):
    """The work of a request."""

    events: int  # that the model reads
    cached: int  # of them, those in the cached state; 0 without one
    candidates: int
    dot_first: bool
    prune: Prune | None = None
    top_n: int | None = None
    explore: bool = False

    def pruned(self, exit: ModelExit) -> Pruned | None:
        return pruned_to(self.prune, exit, self.candidates, self.top_n)


def make_offers(ranker: Ranker, variant: str, wanted: ModelExit, size: Size, any_variant: bool) -> list[Offer]:
    """Return at least one offer."""
    exits = [exit for exit in reversed(EXITS[: EXITS.index(wanted) + 1]) if exit in ranker.manifest.exits]
    offers = offers_of(ranker.engines[variant], variant, exits, size)
    if any_variant and not size.cached and len(ranker.engines) > 1:
        offers += cheaper_variants(ranker, exits[-1], size, CHEAPER * offers[-1].seconds)
    return offers


def cheaper_variants(ranker: Ranker, exit: ModelExit, size: Size, seconds: float) -> list[Offer]:
    """Return the offers of the variants within the quality gate that take less time, the best one first.

    Best means the highest NDCG@10, and at equal or unknown quality the slowest. Each offer is cheaper than the one
    before it; a variant that is neither better nor cheaper than another one is left out.
    """
    rows = ranker.manifest.variants
    names = [name for name in ranker.engines if rows[name].within_gate is not False]
    found = [offer for name in names for offer in offers_of(ranker.engines[name], name, [exit], size)]
    cheaper = []
    for offer in sorted(found, key=lambda one: (rows[one.variant].ndcg_minus_fp32, one.seconds), reverse=True):
        if offer.seconds < seconds:
            cheaper.append(offer)
            seconds = offer.seconds
    return cheaper


def offers_of(engine: Engine, variant: str, exits: Sequence[ModelExit], size: Size) -> list[Offer]:
    encode = encode_seconds(engine, size.events, size.cached)
    old = time.perf_counter() - STALE_SECONDS
    offers = []
    for exit in exits:
        graphs = ["encode", "point", "set"] if exit == "set" else ["encode", exit]
        if size.explore and exit != "dot":
            graphs.append(EXPLORE)
        stale = any(engine.costs[graph].learned_at < old for graph in graphs)
        offers.append(Offer(exit, variant, encode, score_seconds(engine, exit, size), stale))
    return offers


def encode_seconds(engine: Engine, events: int, cached: int) -> float:
    """Predict the seconds to encode the events behind the cached ones."""
    calls = products = 0
    for first in range(cached, events, HISTORY_CHUNK):
        last = min(first + HISTORY_CHUNK, events)
        calls += 1
        products += (last - first) * (last + 1)  # with the start token
    return engine.costs["encode"].seconds(Work(calls, events - cached, products)) if calls else 0.0


def score_seconds(engine: Engine, exit: ModelExit, size: Size) -> float:
    """Predict the seconds of the cascade."""
    n, costs = size.candidates, engine.costs
    pruned = size.pruned(exit)
    seconds = costs["dot"].seconds(Work(1, n, 0)) if exit == "dot" or size.dot_first or pruned else 0.0
    if exit != "dot":
        m = n if pruned is None else pruned.point
        chunks = -(-m // chunk_of(m))
        seconds += costs["point"].seconds(Work(chunks, m, m * (size.events + 1)))
        if size.explore:
            seconds += costs[DRAW].seconds(ONE_CALL) + costs[EXPLORE].seconds(Work(chunks, m, 0))
    if exit == "set":
        k = n if pruned is None else pruned.last
        slates = slate_count(k, engine.slate)
        least, larger = divmod(k, slates)  # so many slates have one candidate more than `least`
        products = (slates - larger) * least**2 + larger * (least + 1) ** 2
        seconds += costs["set"].seconds(Work(slates, k, products))
    return seconds
