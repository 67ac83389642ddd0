"""Checks that the schema of a request cannot express: counts against limits, names against the bundle.

Called by: `pipeline.py`, before any array is made. Calls: `errors.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import cast

from slatewise.bundle.manifest import Manifest
from slatewise.bundle.ranker import Ranker
from slatewise.errors import MOST_FAULTS, Fault, Invalid, NotFound, pointer
from slatewise.pruning import Prune
from slatewise.ranking.admission import RequestLimits
from slatewise.schemas import ModelExit, RankRequest


def choose(request: RankRequest, ranker: Ranker, limits: RequestLimits) -> tuple[str, ModelExit]:
    """Return the variant and the exit that the request asks for. Raises NotFound, or Invalid with all faults."""
    variant = ranker.default_variant if request.variant == "auto" else request.variant
    if variant not in ranker.engines:
        raise NotFound(f"ranker {ranker.name} serves no such variant; served: {', '.join(ranker.engines)}")
    if faults := tuple(islice(find_faults(request, ranker, limits), MOST_FAULTS)):
        raise Invalid.of(faults)
    exit = cast(ModelExit, ranker.manifest.default_exit) if request.exit == "auto" else request.exit
    return variant, exit


def prune_of(request: RankRequest, manifest: Manifest) -> Prune | None:
    """Return the numbers of candidates that the request allows its exits to score; `None`: all.

    Those of the manifest are measured for the manifest's score, so a request with other weights must bring its own.
    """
    if request.prune is not None:
        return request.prune
    return manifest.prune if request.head_weights is None else None


def unpruned(request: RankRequest) -> RankRequest:
    """Return the request as /score reads it: all candidates are answered, so one exit must score them all."""
    return request if request.top_n is None else request.model_copy(update={"prune": Prune()})


def find_faults(request: RankRequest, ranker: Ranker, limits: RequestLimits) -> Iterator[Fault]:
    manifest = ranker.manifest
    n = len(request.candidates.item_ids)
    events = len(request.history.item_ids)
    if n > limits.max_candidates:
        yield Fault("/candidates/item_ids", f"{n} candidates, limit {limits.max_candidates}")
    if events > limits.max_history:
        yield Fault("/history/item_ids", f"{events} events, limit {limits.max_history}")
    for name, column in (("actions", request.history.actions), ("timestamps", request.history.timestamps)):
        if column is not None and len(column) != events:
            yield Fault(f"/history/{name}", f"{len(column)} entries for {events} item_ids")
    known: Collection[str]
    for member, columns, known in (
        ("features", request.candidates.features, manifest.features),
        ("fields", request.candidates.fields, manifest.fields),
    ):
        for name, values in columns.items():
            if name not in known:
                detail = f"unknown name; known: {', '.join(known) or 'none'}"
                yield Fault(pointer("candidates", member, name), detail)
            elif len(values) != n:
                yield Fault(pointer("candidates", member, name), f"{len(values)} entries for {n} item_ids")
    for name in request.head_weights or ():
        if name not in manifest.heads:
            yield Fault(pointer("head_weights", name), f"unknown head; known: {', '.join(manifest.heads)}")
    for k, name in enumerate(request.return_fields or ()):
        if name not in ranker.titles.values:
            known = ", ".join(ranker.titles.names) or "none, the bundle has no titles"
            yield Fault(pointer("return_fields", k), f"unknown field; known: {known}")
    if request.exit not in ("auto", *manifest.exits):
        yield Fault("/exit", f"this ranker has: {', '.join(manifest.exits)}")
    if request.explore:
        yield from exploration_faults(request, ranker)


def exploration_faults(request: RankRequest, ranker: Ranker) -> Iterator[Fault]:
    if not ranker.explores:
        detail = (
            "this version cannot explore: export the ranker with `explore = true` in the table [export] of its TOML"
        )
        yield Fault("/explore", detail)
    if (ranker.manifest.default_exit if request.exit == "auto" else request.exit) == "dot":
        yield Fault("/explore", "the exit `dot` does not explore; ask for another `exit`")
    if request.explain:
        yield Fault("/explain", "a ranking that explores has no explanations; leave out `explain` or `explore`")
