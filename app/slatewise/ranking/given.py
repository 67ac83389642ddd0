"""The history that a request is ranked by: the one that it brings, or the stored one of its user.

Called by: `pipeline.py`. Calls: `events/histories.py`, `store/lookup.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import NamedTuple

from slatewise.bundle.ranker import Ranker
from slatewise.events.histories import Histories
from slatewise.ranking.admission import Admission
from slatewise.ranking.trace import Timings
from slatewise.schemas import HistorySource, RankRequest
from slatewise.store.lookup import MetaEmbedding, Store


class Given(NamedTuple):
    """A request with the history that it is ranked by."""

    request: RankRequest
    source: HistorySource
    fault: bool = False  # the stored history could not be read
    look_up: Awaitable[MetaEmbedding] | None = None  # begun already, in the round trip of the stored history


async def with_history(
    request: RankRequest,
    ranker: Ranker,
    timings: Timings,
    histories: Histories | None,
    store: Store,
    admission: Admission,
) -> Given:
    """Add the stored history to a request with a user and without a history. An empty history is a history.

    Only the newest events that the ranker can read are taken. The look-up of the vector begins at the same time.
    """
    user = request.user
    if "history" in request.model_fields_set:
        return Given(request, "request")
    if user is None or histories is None:
        return Given(request, "none")
    look_up = store.look_up(ranker, user) if ranker.manifest.meta_size else None
    reading = histories.read(user, min(ranker.manifest.limits.history_used, admission.limits.max_history))
    try:
        async with admission.deadline(request.deadline_ms, timings.entered).timeout():
            history, fault = await reading
    except TimeoutError:  # the request's deadline; the store's own budget is a fault
        history, fault = None, False
    timings.lap("embed")
    if history is None:
        return Given(request, "none", fault, look_up)
    return Given(request.model_copy(update={"history": history}), "stored", fault, look_up)
