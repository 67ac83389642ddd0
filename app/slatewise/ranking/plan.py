"""The plan for one request: its variant and exit, and the work that they take. It needs counts only, no arrays.

Called by: `pipeline.py`. Calls: `validation.py`, `offers.py`, `explain.py` for its costs, `admission.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from slatewise.bundle.ranker import Ranker
from slatewise.inference.engine import Engine
from slatewise.pruning import Pruned
from slatewise.ranking.admission import Admission, Deadline, Standing
from slatewise.ranking.explain import explanation_seconds
from slatewise.ranking.given import Given
from slatewise.ranking.history_cache import HistoryCache
from slatewise.ranking.load import Running
from slatewise.ranking.offers import Size, make_offers
from slatewise.ranking.trace import Timings
from slatewise.ranking.validation import choose, prune_of
from slatewise.schemas import AnsweredExit, DegradedReason, RankRequest
from slatewise.store.lookup import MetaEmbedding

CacheKey = tuple[str, int, str, str, str | None]


@dataclass(frozen=True)
class Plan:
    """Decisions for one request, made before any array, so that refusing a request is cheap."""

    request: RankRequest
    ranker: Ranker
    variant: str
    exit: AnsweredExit  # to compute; `input_order`: do not run the model
    degraded: frozenset[DegradedReason]  # why it is not the requested one
    deadline: Deadline
    dropped: int  # oldest events, which the model skips
    given: Given
    running: Running
    score_seconds: float = 0.0  # predicted for the candidates and the explanations
    explain: bool = False
    pruned: Pruned | None = None

    @property
    def engine(self) -> Engine:
        return self.ranker.engines[self.variant]

    @property
    def meta_user(self) -> str | None:
        """The user to look up; `None` without a user, and for a ranker that reads no meta-embeddings."""
        return self.request.user if self.ranker.manifest.meta_size else None

    @property
    def default_meta(self) -> MetaEmbedding:
        """The meta-embedding of a request whose user is not looked up, or not found in time."""
        return MetaEmbedding(self.ranker.default_meta, "off" if self.meta_user is None else "default")

    @property
    def cache_key(self) -> CacheKey:
        return cache_key(self.ranker, self.variant, self.request.user)


def cache_key(ranker: Ranker, variant: str, user: str | None) -> CacheKey:
    return *ranker.identity, variant, user


def make_plan(given: Given, ranker: Ranker, timings: Timings, admission: Admission, cache: HistoryCache) -> Plan:
    """Check and admit a request. What it has waited so far counts.

    Raises NotFound, Invalid, OverloadedUndegraded or DeadlineExceeded.
    """
    request = given.request
    variant, wanted = choose(request, ranker, admission.limits)
    dropped = ranker.window_start(request)
    deadline = admission.deadline(request.deadline_ms, timings.entered)
    events, candidates = len(request.history.item_ids) - dropped, len(request.candidates.item_ids)
    cached = 0 if request.user is None else min(events, cache.events(cache_key(ranker, variant, request.user)))
    prune = prune_of(request, ranker.manifest)
    dot_first = deadline.milliseconds > 0
    size = Size(events, cached, candidates, dot_first, prune, request.top_n, bool(request.explore))
    offers = make_offers(ranker, variant, wanted, size, request.variant == "auto")
    standing = Standing(request.priority, timings.seconds.get("queue", 0.0))
    explained = 0.0
    if request.explain:
        pruned = size.pruned(wanted)
        scored = candidates if pruned is None else pruned.last
        explained = explanation_seconds(ranker.engines[variant], events, scored, wanted)
    explain = request.explain and (
        not request.allow_degraded or admission.has_room(wanted, offers[0].seconds + explained, standing)
    )
    admitted = admission.admit(offers, deadline, request.allow_degraded, standing)
    offer, degraded = admitted.offer, admitted.degraded
    explain &= offer is not None and offer.variant == variant  # the prediction is for that variant
    if request.explain and not explain:
        degraded |= {"explanations"}
    if offer is None:
        return Plan(request, ranker, variant, "input_order", degraded, deadline, dropped, given, Running(0.0, None))
    score = offer.score + (explained if explain else 0.0)
    running = Running(offer.encode + score, deadline.due)
    return Plan(
        request,
        ranker,
        offer.variant,
        offer.exit,
        degraded,
        deadline,
        dropped,
        given,
        running,
        score,
        explain,
        size.pruned(offer.exit),
    )
