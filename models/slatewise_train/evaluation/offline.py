"""Measure the ranking quality of a variant through its exported graphs. The results are the tables of `report.json`:

(a) leave-one-out: for each user, the rank of the last event's item among all items that are new to the user, or among
    all items if it is not new itself. This table needs a head of kind `next`.
(b) slates: the ranking of the next events of held-out users, or of the slate that they were shown. This table needs a
    head of kind `label`. For a head of kind `next`, the table `choices` has the ranking of the items that were chosen
    among those that were shown; without a head of kind `label` it is the table (b).
(c) the difference between the exits `set` and `point`, paired by user.
(d) the diversity of the ten best of (a), beside their quality, with MMR on `point` as a baseline. This table needs a
    categorical column.

Users are a sample, drawn with a fixed seed, unless all are asked for. The order is exact: equal scores are ranked in
the order of the catalogue in (a), and in the order of the slate in (b). Two runs give the same numbers.

Called by: `export.py`, `compression/`, `verdict.py`, `demo/show.py`. Calls: `inference/engine.py`, `cases.py`,
`baselines.py`, `interactions.py`, `sampling.py`, `metrics.py`, `diversity.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slatewise.bundle.features import request_context
from slatewise.inference.arrays import FIRST_ITEM, Candidates
from slatewise.inference.engine import Engine
from slatewise_train.data import Data
from slatewise_train.evaluation.baselines import Baselines, make_baselines
from slatewise_train.evaluation.calibration import LEAST_EXAMPLES
from slatewise_train.evaluation.cases import (
    Case,
    candidates_of,
    exits_of,
    next_cases,
    point_of_many,
    score_exits,
    slate_cases,
    state_of,
)
from slatewise_train.evaluation.diversity import Diversity, measure_lists, mmr_lists
from slatewise_train.evaluation.interactions import baseline_ranks, baseline_slates, hidden_rows
from slatewise_train.evaluation.metrics import (
    DEPTH,
    auc,
    calibration_error,
    gains,
    hits,
    interval,
    ndcg,
    rank_of,
    top_rows,
)
from slatewise_train.evaluation.sampling import SAMPLED_USERS, SEED, in_parallel, sample_users
from slatewise_train.rankers.base import EXITS

RERANKED = 100  # in (a) the exit `set` orders the best of `point`, because a catalogue is too large for one slate


Ranked = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # ranks (users,) and best lists (users, 10), by name


def leave_one_out(
    engine: Engine, data: Data, head: int, meta: np.ndarray, users: np.ndarray, baselines: Baselines
) -> Ranked:
    """Rank the last event of each user who has one after another.

    Returns, by exit and baseline, ranks (users,), 0 for the best, and the item rows of the ten best (users, 10). With
    baselines and categorical columns, the best lists include those of MMR on the exit `point`.

    head: the output to rank by; meta: (M,) the meta-embedding of every request.
    """
    rows = np.arange(FIRST_ITEM, len(engine.items))
    vectors = engine.items.take(rows, axis=0)
    numeric = data.catalogue.numeric[rows]
    exits = exits_of(engine)

    def rank_case(case: Case) -> tuple[dict[str, tuple[int, np.ndarray]], np.ndarray]:
        state = state_of(engine, case)
        catalogue = Candidates(vectors, numeric, request_context(case.time)[None])
        hidden = hidden_rows(case.seen, case.upcoming[0]) - FIRST_ITEM
        target = int(case.upcoming[0]) - FIRST_ITEM
        scores = {
            "dot": engine.dot(catalogue, state)[:, head].copy(),
            "point": point_of_many(engine, catalogue, meta, state).probabilities[:, head].copy(),
        }
        found = {}
        for exit, values in scores.items():
            values[hidden] = -np.inf
            best = top_rows(values[None], RERANKED)[0][: np.count_nonzero(values > -np.inf)]
            found[exit] = rank_of(values, target), best
        if "set" in exits:
            rank, best = found["point"]
            slate = engine.point(candidates_of(engine, data, best + FIRST_ITEM, case.time), meta, state)
            ordered = np.argsort(-engine.set(slate)[:, head], kind="stable")
            if rank < len(best):
                rank = int(np.flatnonzero(best[ordered] == target)[0])
            found["set"] = rank, best[ordered]
        best = found["point"][1]
        first = np.stack([padded(best + FIRST_ITEM, RERANKED), padded(scores["point"][best], RERANKED)])
        return {exit: (rank, padded(best[:DEPTH] + FIRST_ITEM, DEPTH)) for exit, (rank, best) in found.items()}, first

    cases = list(next_cases(data, users))
    results = in_parallel(rank_case, cases, "leave-one-out")
    ranks = {exit: np.array([found[exit][0] for found, _ in results], np.int64) for exit in exits}
    best = {exit: np.array([found[exit][1] for found, _ in results], np.int64).reshape(-1, DEPTH) for exit in exits}
    if baselines and data.config.categorical and results:
        rows_of_point, scores_of_point = np.stack([first for _, first in results], axis=1)
        best |= mmr_lists(scores_of_point, rows_of_point.astype(np.int64), categorical_values(data))
    for name, baseline in baselines.items():
        ranks[name], best[name] = baseline_ranks(baseline, cases, len(engine.items), f"leave-one-out, {name}")
    return ranks, best


def padded(values: np.ndarray, count: int) -> np.ndarray:
    """Return the values of a best list with 0 for its missing places: (count,)."""
    return np.pad(values, (0, count - len(values)))


ScoredSlates = list[tuple[np.ndarray, np.ndarray]]  # scores and labels, (n,) each


def categorical_values(data: Data) -> list[np.ndarray]:
    """Return `Catalogue.field_values` of the categorical columns: words of a text do not tell how alike items are."""
    return [data.catalogue.field_values[name] for name in data.config.categorical]


def slates(
    engine: Engine, data: Data, heads: Sequence[int], meta: np.ndarray, baselines: Baselines, most: int | None = None
) -> list[dict[str, ScoredSlates]]:
    """Return scores and known labels of the held-out slates for each head, by exit and baseline.

    Each slate is scored once. heads: outputs; meta: see `leave_one_out`; most: the most users, see `sample_users`.
    """
    cases = [case for case in slate_cases(data, sample_users(data.split.slate_users, most)) if len(case.upcoming)]

    def score_case(case: Case) -> dict[str, np.ndarray]:
        return score_exits(engine, candidates_of(engine, data, case.upcoming, case.time), meta, state_of(engine, case))

    scored = in_parallel(score_case, cases, "slates")
    others = {
        name: baseline_slates(baseline, cases, len(engine.items), f"slates, {name}")
        for name, baseline in baselines.items()
    }
    result = []
    for head in heads:
        labels = [case.labels[:, head] for case in cases]
        known = [~np.isnan(of_case) for of_case in labels]
        columns = {exit: [found[exit][:, head] for found in scored] for exit in exits_of(engine)} | others
        result.append(
            {
                name: [(scores[k], of_case[k]) for scores, of_case, k in zip(column, labels, known, strict=True)]
                for name, column in columns.items()
            }
        )
    return result


@dataclass(frozen=True)
class Outcome:
    """The results of one variant for each case, by exit and baseline."""

    ranks: dict[str, np.ndarray]  # of `leave_one_out`; empty without a head of kind `next`
    slates: dict[str, ScoredSlates]  # of `slates`; empty without a head of kind `label`
    label: str | None  # the name of that head
    choices: dict[str, ScoredSlates] = field(default_factory=dict)  # of `next` in slates that were shown
    best: dict[str, np.ndarray] = field(default_factory=dict)  # (users, 10) item rows of `leave_one_out`, best first
    users: int = 0  # who have a case in leave-one-out, of which `ranks` has a sample
    settings: dict[str, str] = field(default_factory=dict)  # of the baselines
    diversity: dict[str, Diversity] = field(default_factory=dict)  # of `best`; empty without categorical columns
    not_measured: dict[str, str] = field(default_factory=dict)  # the reason, by table or baseline

    def gains(self, name: str) -> np.ndarray:
        """Return NDCG@10 of each user: (users,)."""
        return gains(self.ranks[name])

    def per_slate(self, name: str) -> np.ndarray:
        """Return NDCG@10 and AUC of each slate: (slates, 2). NaN if all labels of a slate are equal."""
        return measures(self.slates[name])

    def measurable(self) -> bool:
        """Return whether a slate has both labels. Without one, no metric of the slates has a value."""
        return measurable(self.slates)


def measures(cases: ScoredSlates) -> np.ndarray:
    """Return NDCG@10 and AUC of each slate: (slates, 2). NaN if all labels of a slate are equal."""
    return np.array([[ndcg(*case), auc(*case)] for case in cases]).reshape(-1, 2)


def measurable(scored: dict[str, ScoredSlates]) -> bool:
    """Return whether a slate has both labels."""
    return any(0 < labels.sum() < len(labels) for _, labels in next(iter(scored.values()), []))


def run_cases(
    engine: Engine, data: Data, meta: np.ndarray, most_users: int | None = SAMPLED_USERS, *, baselines: bool = True
) -> Outcome:
    """Run the cases of the data. most_users: the most users of each table, see `sample_users`."""
    heads = data.config.heads
    following = next((k for k, head in enumerate(heads) if head.kind == "next"), None)
    labelled = next((k for k, head in enumerate(heads) if head.kind == "label"), None)
    shown = following if data.exposures is not None and labelled is not None else None
    if data.exposures is not None and labelled is None:
        labelled = following
    others, not_measured = make_baselines(data) if baselines else ({}, {})
    ranked: Ranked = ({}, {})
    scored: list[dict[str, ScoredSlates]] = []
    diversity = {}
    users = np.flatnonzero(data.split.test_lengths)
    not_measured |= missing_tables(data, following, len(users))
    if following is not None and len(users):
        sample = sample_users(users, most_users)
        ranked = leave_one_out(engine, data, following, meta, sample, others)
        if fields := categorical_values(data):
            targets = data.sequences.items[data.sequences.offsets[sample] + data.split.test_lengths[sample]]
            diversity = measure_lists(ranked[1], targets, fields, len(engine.items) - FIRST_ITEM)
    if labelled is not None and len(data.split.slate_users):
        scored = slates(
            engine, data, [head for head in (labelled, shown) if head is not None], meta, others, most_users
        )
    return Outcome(
        ranks=ranked[0],
        slates=scored[0] if scored else {},
        label=None if labelled is None else heads[labelled].name,
        choices=scored[1] if len(scored) > 1 else {},
        best=ranked[1],
        users=len(users),
        settings={name: baseline.settings for name, baseline in others.items() if baseline.settings},
        diversity=diversity,
        not_measured=not_measured,
    )


def missing_tables(data: Data, following: int | None, users: int) -> dict[str, str]:
    """Return the reason for the table (a) if it has no case. following: the head; users: those with a test event."""
    if following is None:
        return {"leave_one_out": "the next item, because the ranker has no head of kind `next`"}
    if not users:
        later = " from `test_from` on, and one before it" if data.config.kind == "time" else " after another one"
        return {"leave_one_out": f"the next item, because no user has an event{later}"}
    return {}


def tabulate(outcome: Outcome) -> dict[str, Any]:
    """Return the tables of the report. Metrics are [mean, low, high] of `metrics.interval`.

    A table that cannot be measured is empty; `not_measured` then has the reason.
    """
    report: dict[str, Any] = {"leave_one_out": {}, "slates": {}, "set_against_point": {}, "label": outcome.label}
    report["not_measured"] = dict(outcome.not_measured)
    for name, ranks in outcome.ranks.items():
        report["leave_one_out"][name] = {
            "users": len(ranks),
            "hr10": interval(hits(ranks)),
            "ndcg10": interval(outcome.gains(name)),
        }
    if outcome.label is not None and not outcome.measurable():
        count = len(next(iter(outcome.slates.values()), []))
        some = f"none of {count} held-out slates has both labels of `{outcome.label}`"
        report["not_measured"]["slates"] = some if count else f"`{outcome.label}`, because no user has a held-out slate"
    else:
        report["slates"] = {name: slate_row(name, cases) for name, cases in outcome.slates.items()}
    if measurable(outcome.choices):
        report["choices"] = {name: slate_row(name, cases) for name, cases in outcome.choices.items()}
    if "set" in (*outcome.ranks, *outcome.slates):
        report["set_against_point"] = difference(outcome, outcome, "set", "point")
    report["diversity"] = {name: lists.row() for name, lists in outcome.diversity.items()}
    ranked = len(next(iter(outcome.ranks.values()), ()))
    report["sample"] = {"users": ranked, "of": outcome.users, "seed": SEED}
    report["baselines"] = outcome.settings
    return report


def slate_row(name: str, cases: ScoredSlates) -> dict[str, Any]:
    """Return the row of an exit or a baseline in table (b). There is a calibration error if labels suffice for one."""
    scores, labels = (np.concatenate(column) for column in zip(*cases, strict=True))
    per_slate = measures(cases)
    rated = ~np.isnan(per_slate[:, 0])
    row = {
        "slates": int(rated.sum()),
        "ndcg10": interval(per_slate[rated, 0]),
        "auc_in_slate": interval(per_slate[rated, 1]),
        "auc": round(auc(scores, labels), 4),
    }
    if name in EXITS and min(labels.sum(), (1 - labels).sum()) >= LEAST_EXAMPLES:
        row["calibration_error"] = round(calibration_error(scores, labels), 4)
    return row


def difference(one: Outcome, other: Outcome, exit: str, other_exit: str | None = None) -> dict[str, list[float]]:
    """Return the metrics of an exit minus those of another outcome of the same cases, as [mean, low, high].

    Differences are paired by user and by slate. other_exit: the exit of the other outcome; None: the same exit.
    """
    against = other_exit or exit
    found = {}
    if exit in one.ranks:
        found["leave_one_out_hr10"] = interval(hits(one.ranks[exit]) - hits(other.ranks[against]))
        found["leave_one_out_ndcg10"] = interval(one.gains(exit) - other.gains(against))
    if exit in one.slates and one.measurable():
        per_slate = one.per_slate(exit) - other.per_slate(against)
        rated = ~np.isnan(per_slate[:, 0])
        found |= {"slate_ndcg10": interval(per_slate[rated, 0]), "slate_auc": interval(per_slate[rated, 1])}
    return found
