"""The ranks of held-out events by the torch model, and the comparison with the baselines at the end of a training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from slatewise import cli
from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import make_batch, served_window_start
from slatewise_train.config import Head, ModelConfig
from slatewise_train.data import Data
from slatewise_train.evaluation import held_out
from slatewise_train.evaluation.held_out import held_out_ranks, validate
from slatewise_train.evaluation.interactions import validation_cases
from slatewise_train.evaluation.metrics import gains, rank_of
from slatewise_train.evaluation.report import plot_training
from slatewise_train.evaluation.sampling import held_out_users
from slatewise_train.evaluation.trained import TrainingReport
from slatewise_train.new_model import build_model
from slatewise_train.rankers.base import RankerModel
from tests.conftest import Tiny
from tests.train.test_baselines import random_data


@torch.no_grad()
def slow_ranks(model: RankerModel, data: Data, user: int, length: int) -> tuple[int, int]:
    """Ranks of one user's event by `dot` and `point`: no batch, the whole catalogue, loops over items."""
    items = data.sequences.items[data.sequences.offsets[user] :]
    target = int(items[length])
    table = model.eval().item_table()
    batch = make_batch(data.sequences, [(user, served_window_start(length, data.config.history_length), length)])
    history, users = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
    dot = model.dot_logits(users[:, -1:], table[None])
    numeric = torch.from_numpy(data.catalogue.numeric)[None]
    fused = model.fuse(numeric, model.default_meta, batch.contexts[:, -1:])
    hidden = model.hidden(table[None], history, torch.tensor([batch.items.shape[1]]), None, fused)
    scores = [logits[0, :, 0].numpy() for logits in (dot, dot + model.point_logits(hidden))]
    hidden_items = set() if target in items[:length] else set(items[:length].tolist())
    kept = [row for row in range(FIRST_ITEM, len(table)) if row not in hidden_items]
    ranks = [rank_of(column[kept], kept.index(target)) for column in scores]
    return ranks[0], ranks[1]


@pytest.fixture(scope="module")
def random() -> tuple[RankerModel, Data]:
    """A ranker with random weights, so that the exits differ, and users with repeated items."""
    data = random_data(5, users=60, items=40, slate_size=2, validation_users=40)
    torch.manual_seed(0)
    shape = {"width": 8, "blocks": 2, "attention_heads": 2, "set_blocks": 0, "meta_size": 4}
    model = build_model(data.catalogue, data.config, ModelConfig("ligr", shape))
    torch.nn.init.normal_(model.point_down.weight)
    return model, data


@pytest.mark.parametrize("most", [(4_000_000, 16_384), (90, 16_384), (4_000_000, 20)])
def test_ranks_equal_one_user_at_a_time(
    random: tuple[RankerModel, Data], monkeypatch: pytest.MonkeyPatch, most: tuple[int, int]
) -> None:
    monkeypatch.setattr(held_out, "MOST_SCORES", most[0])
    monkeypatch.setattr(held_out, "MOST_EVENTS", most[1])
    monkeypatch.setattr(held_out, "MOST_CANDIDATES", 100)
    model, data = random
    users = np.flatnonzero(data.split.train_lengths)
    lengths = data.split.train_lengths[users]
    found = held_out_ranks(model, data, users, lengths, 0, ("dot", "point"))
    expected = [slow_ranks(model, data, int(u), int(n)) for u, n in zip(users, lengths, strict=True)]
    assert list(zip(found["dot"].tolist(), found["point"].tolist(), strict=True)) == expected
    events = [data.sequences.items[data.sequences.offsets[user] :] for user in users]
    repeated = [items[n] in items[:n] for items, n in zip(events, lengths, strict=True)]
    assert 5 < sum(repeated) < len(users) - 5 and found["dot"].tolist() != found["point"].tolist()


def test_event_behind_the_reranked_items_keeps_its_rank(
    random: tuple[RankerModel, Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "RERANKED", 5)
    model, data = random
    users = held_out_users(data)
    found = held_out_ranks(model, data, users, data.split.train_lengths[users], 0, ("dot", "point"))
    behind = found["dot"] >= 5
    assert 0 < behind.sum() < len(users) and (found["point"][~behind] < 5).all()
    assert found["point"][behind].tolist() == found["dot"][behind].tolist()


@pytest.mark.parametrize("items", [6, 40])
def test_diverged_ranker_hits_nothing(items: int) -> None:
    """With NaN in the weights, no score is above that of the target: this is no rank 0."""
    data = random_data(5, users=40, items=items, slate_size=2, validation_users=15)
    model = build_model(data.catalogue, data.config, ModelConfig("ligr", {"width": 8, "set_blocks": 0}))
    with torch.no_grad():
        model.item.weight[:] = torch.nan
    assert set(validate(model, data, 0, ("dot", "point")).values()) == {0.0}
    verdict = TrainingReport(data).verdict(model, ["WARNING: x"])
    assert verdict.grade == "worse" and verdict.line.startswith("DOES NOT BEAT its baselines: NDCG@10 0.0000")
    assert verdict.warnings[1] == "WARNING: the scores of 15 of 15 users are not finite: a smaller learning_rate helps"


def test_curve_levels_and_verdict_rank_the_same_events(random: tuple[RankerModel, Data]) -> None:
    """Few users are long enough for a slate, so that other users validate; some of them repeat an item."""
    model, whole = random
    others = np.flatnonzero(whole.split.train_lengths)[::2]
    data = dataclasses.replace(whole, split=dataclasses.replace(whole.split, next_users=others))
    assert set(others.tolist()) != set(data.split.validation_users.tolist())
    report = TrainingReport(data)
    cases = validation_cases(data)
    assert [case.user for case in cases] == others.tolist() == held_out_users(data).tolist() == report.users.tolist()
    assert {len(ranks) for ranks in report.ranks.values()} == {len(others)}
    curve = validate(model, data, 0, ("dot",))["dot_ndcg10"]
    expected = [slow_ranks(model, data, case.user, len(case.seen))[0] for case in cases]
    assert curve == pytest.approx(gains(np.array(expected)).mean())
    line = report.verdict(model, []).line
    assert f"NDCG@10 {curve:.4f} (exit dot)" in line and f"{len(others)} validation users" in line


def test_levels_are_written_beside_the_log(tmp_path: Path) -> None:
    report = TrainingReport(random_data(5, users=40, slate_size=2, validation_users=15))
    report.write_levels(tmp_path / "new")
    levels = json.loads((tmp_path / "new/baselines.json").read_text())
    assert list(levels) == ["popularity", "item-kNN", "EASE"] and set(levels["EASE"]) == {"hr10", "ndcg10"}
    assert levels == report.levels()


def test_levels_and_best_epoch_are_drawn_in_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("slatewise_train.evaluation.report.save_figure", lambda figure, *_, **__: drawn.append(figure))
    (tmp_path / "log.csv").write_text("epoch,loss,dot_hr10,dot_ndcg10\n1,3,.1,.05\n2,2,,\n3,1.5,.3,.2\n4,1,.2,.1\n")
    (tmp_path / "baselines.json").write_text(json.dumps({"item-kNN": {"hr10": 0.25, "ndcg10": 0.15}}))
    plot_training(tmp_path / "log.csv")
    _, hr, ndcg = drawn[0].axes
    for axis, level in ((hr, 0.25), (ndcg, 0.15)):
        lines = {line.get_label(): line for line in axis.lines}
        assert list(lines["item-kNN"].get_ydata()) == [level, level]
        assert list(lines["best, epoch 3"].get_xdata()) == [3, 3]
        assert list(lines["stopped, epoch 4"].get_xdata()) == [4, 4]
        assert list(lines["dot"].get_xdata()) == [1, 3, 4]


def test_without_validation_or_next_head_nothing_is_measured(tiny: Tiny) -> None:
    data = random_data(5)
    report = TrainingReport(data)
    verdict = report.verdict(tiny.trainer.model, [])
    assert report.levels() == {} and verdict.grade == "unknown"
    assert verdict.line == (
        "NOT MEASURED against baselines: there are no validation users (`validation_users` in [split])"
    )
    label_only = random_data(5, slate_size=2, validation_users=5)
    object.__setattr__(label_only.config, "heads", (Head("like", "label", 1.0),))
    verdict = TrainingReport(label_only).verdict(tiny.trainer.model, [])
    assert verdict.beats_baselines is None and "without a head of kind `next`" in verdict.line


def test_training_ends_with_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Items come in groups that item-kNN finds at once and one epoch does not."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"g{u % 12}-{k}", 1e9 + 5000 * u + 100 * place)
        for u in range(120)
        for place, k in enumerate(rng.permutation(8))
    ]
    pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row").write_csv(tmp_path / "events.csv")
    items = sorted({item for _, item, _ in rows})
    pl.DataFrame({"item_id": items}).write_csv(tmp_path / "items.csv")
    (tmp_path / "shop.toml").write_text(
        f'name = "shop"\n[data]\nevents = "{tmp_path}/events.csv"\nitems = "{tmp_path}/items.csv"\n'
        '[heads.next]\nkind = "next"\nweight = 1.0\n'
        "[split]\nhistory_length = 8\nslate_size = 1\nvalidation_users = 60\n"
        "[model]\nwidth = 8\nblocks = 1\nset_blocks = 0\n"
        "[train]\nepochs = 1\ncascade_epochs = 0\nlearning_rate = 0.00001\nwarmup_steps = 1\nnegatives = 8\n"
    )
    assert cli.main(["train", str(tmp_path / "shop.toml"), "--folder", str(tmp_path / "train")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("baselines on 60 validation users: {'popularity'") for line in lines)
    assert lines[-2].startswith("DOES NOT BEAT its baselines") and "60 validation users" in lines[-2]
    assert lines[-1].startswith("future events:"), "checks that found something are printed"
    monkeypatch.chdir(tmp_path)
    argv = ["export", "shop.toml", "--folder", "train", "--root", "bundles"]
    assert cli.main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("slatewise export: error: DOES NOT BEAT its baselines") and "`--force`" in error
    assert cli.main([*argv, "--force", "--all-users"]) == 0
    captured = capsys.readouterr()
    out = captured.out.splitlines()
    assert "chosen from the tables" in captured.err and "chosen from the tables" not in captured.out
    assert out[0].startswith("DOES NOT BEAT its baselines") and out[2].startswith("All 120 users")
    assert Path(out[-1]) == Path("bundles/shop/1")
    assert (tmp_path / "bundles/shop/1/training.png").exists()
