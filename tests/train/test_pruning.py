"""The share of users whose ten best items stay the same under a prune: against sorted lists; what export does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import read_manifest
from slatewise.bundle.ranker import Ranker, weighted_mean
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.pruning import Prune
from slatewise_train import bundle_writer
from slatewise_train.config import ExportConfig
from slatewise_train.evaluation import pruning
from slatewise_train.evaluation.cases import Case, candidates_of, next_cases
from slatewise_train.evaluation.pruning import measure_pruning
from slatewise_train.evaluation.report import pruning_text
from slatewise_train.evaluation.sampling import sample_users
from slatewise_train.export import ExportOptions, export
from tests.conftest import Tiny

USERS = 12


def held_out(tiny: Tiny) -> list[Case]:
    data = tiny.trainer.data
    return list(next_cases(data, sample_users(np.flatnonzero(data.split.test_lengths), USERS)))


def slow_lists(ranker: Ranker, tiny: Tiny, prune: Prune) -> list[dict[str, list[int]]]:
    """The ten best items of each user by exit: one call of `Engine.score` for each exit or slate, and full sorts."""
    data, engine = tiny.trainer.data, ranker.engines["fp32"]
    weights = ranker.score_weights(None)
    found = []
    for case in held_out(tiny):
        rows = [k for k in range(FIRST_ITEM, len(engine.items)) if k not in set(case.seen.tolist())]
        lists = {}
        slates: list[list[int]] = []
        for exit, count in (("dot", prune.point), ("point", prune.set), ("set", None)):
            probabilities = np.zeros((len(rows), len(weights)))
            for slate in slates if exit == "set" else [list(range(len(rows)))]:
                candidates = candidates_of(engine, data, np.array(rows)[slate], case.time)
                probabilities[slate] = engine.score(case.history, candidates, ranker.default_meta, exit)
            scores = weighted_mean(probabilities, weights)
            order = sorted(range(len(rows)), key=lambda k: -scores[k])
            lists[exit] = [rows[k] for k in order[:10]]
            kept = sorted(order[: count or len(rows)])
            by_sum = sorted(range(len(kept)), key=lambda k: -probabilities[kept[k]].sum())
            number = 1 if len(kept) <= engine.slate else math.ceil(len(kept) / (engine.slate // 2))
            slates = [by_sum[first::number] for first in range(number)]
            rows = [rows[k] for k in kept]
        found.append(lists)
    return found


def slow_gain(best: list[int], target: int) -> float:
    return 1 / math.log2(best.index(target) + 2) if target in best else 0.0


@pytest.mark.parametrize("prune", [Prune(point=150, set=40), Prune(point=60), Prune(set=30)])
@pytest.mark.parametrize("slate", [100, 1024])
def test_shares_equal_those_of_sorted_lists(
    ranker: Ranker, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, prune: Prune, slate: int
) -> None:
    engine = ranker.engines["fp32"]
    monkeypatch.setattr(engine, "slate", slate)
    row = measure_pruning(engine, ranker.manifest, tiny.trainer.data, ranker.default_meta, prune, USERS)
    plain, pruned = (slow_lists(ranker, tiny, one) for one in (Prune(), prune))
    targets = [int(case.upcoming[0]) for case in held_out(tiny)]
    exits = ["set"] if prune.point is None else ["point", "set"]
    assert list(row["unchanged"]) == list(row["same_items"]) == exits and row["users"] == USERS
    pairs = list(zip(plain, pruned, strict=True))
    for exit in exits:
        same = np.mean([one[exit] == other[exit] for one, other in pairs])
        items = np.mean([set(one[exit]) == set(other[exit]) for one, other in pairs])
        assert row["unchanged"][exit][0] == pytest.approx(same, abs=1e-4)
        assert row["same_items"][exit][0] == pytest.approx(items, abs=1e-4)
        gains = [
            slow_gain(pair[1][exit], t) - slow_gain(pair[0][exit], t) for pair, t in zip(pairs, targets, strict=True)
        ]
        assert row["ndcg10"][exit][0] == pytest.approx(np.mean(gains), abs=1e-4)
    assert row["published"] == all(share[0] >= 0.99 for share in row["unchanged"].values())


def test_a_long_catalogue_is_sampled(ranker: Ranker, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "LONGEST", 50)
    (case,) = next_cases(tiny.trainer.data, np.array([3]))
    rows = pruning.candidate_rows(case, len(ranker.items))
    assert len(set(rows.tolist())) == 50 and (rows >= FIRST_ITEM).all() and (np.diff(rows) > 0).all()
    assert not set(rows.tolist()) & set(case.seen.tolist())
    assert (rows == pruning.candidate_rows(case, len(ranker.items))).all(), "the same in every run"


def exported(tiny: Tiny, root: Path, **keys: Any) -> tuple[Path, dict[str, Any]]:
    config = replace(tiny.config, export=ExportConfig(default_exit="set", **keys))
    folder = export(tiny.trainer, tiny.learner, config, root, 1, ExportOptions(most_users=4, force=True))
    return folder, json.loads((folder / "report.json").read_text())


def test_export_publishes_a_prune_that_changes_no_list(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other numbers are those of an export without a prune, whose manifest an older server reads."""
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    plain, without = exported(tiny, tmp_path / "plain")
    assert "prune" not in json.loads((plain / "manifest.json").read_text()) and "pruning" not in without
    kept, whole = exported(tiny, tmp_path / "kept", prune_point=4_000, prune_set=4_000)
    lost, few = exported(tiny, tmp_path / "lost", prune_point=10, prune_set=10)
    for report, published in ((whole, True), (few, False)):
        row = report.pop("pruning")
        assert row["published"] is published and set(row["unchanged"]) == {"point", "set"}
        assert report == without
    assert load_bundle(kept).manifest.prune == Prune(point=4_000, set=4_000)
    assert load_bundle(lost).manifest.prune is None
    assert "prune" not in json.loads((lost / "manifest.json").read_text())
    assert "(point 4,000 and set 4,000) is published" in (kept / "report.md").read_text()
    assert "(point 10 and set 10) is NOT PUBLISHED" in (lost / "report.md").read_text()
    quality = [read_manifest(folder).variants["fp32"].quality for folder in (plain, kept, lost)]
    assert quality[0] == quality[1] == quality[2]


def test_a_ranker_of_the_exit_dot_has_nothing_to_prune(ranker: Ranker, tiny: Tiny) -> None:
    manifest = ranker.manifest.model_copy(update={"exits": ["dot"]})
    with pytest.raises(ValueError, match="the exits of the ranker are dot"):
        measure_pruning(ranker.engines["fp32"], manifest, tiny.trainer.data, ranker.default_meta, Prune(point=20), 1)


def test_a_prune_without_a_test_user_is_not_published() -> None:
    row = {"prune": {"point": 20, "set": None}, "users": 0, "unchanged": {}, "published": False}
    assert pruning_text(row) == "Pruning (point 20) is NOT PUBLISHED: no user has a test event."


def test_wrong_numbers_are_refused() -> None:
    assert ExportConfig().prune is None
    assert ExportConfig(prune_set=20).prune == Prune(set=20)
    with pytest.raises(ValueError, match=r"\[export\] prune_set = 30: must be at most prune_point, 20"):
        ExportConfig(prune_point=20, prune_set=30)
