"""The comparison with the baselines at the end of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from slatewise import cli
from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import make_batch
from slatewise_train.config import Head
from slatewise_train.evaluation import trained
from slatewise_train.evaluation.interactions import validation_cases
from slatewise_train.evaluation.metrics import gains
from slatewise_train.evaluation.report import plot_training
from slatewise_train.evaluation.trained import TrainingReport, dot_ranks
from tests.conftest import Tiny
from tests.train.test_baselines import random_data


@pytest.mark.parametrize("most", [(8_192, 20_000_000), (40, 20_000_000), (8_192, 10)])
def test_dot_ranks_equal_one_user_at_a_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, most: tuple[int, int]) -> None:
    monkeypatch.setattr(trained, "BATCH_EVENTS", most[0])
    monkeypatch.setattr(trained, "BATCH_SCORES", most[1])
    data = tiny.trainer.data
    cases = validation_cases(data, data.split.validation_users)
    model = tiny.trainer.model.eval()
    found = dot_ranks(model, data, cases, 0)
    with torch.no_grad():
        table = model.item_table()
    for case, rank in zip(cases, found, strict=True):
        window = (case.user, len(case.seen) - len(case.history), len(case.seen))
        with torch.no_grad():
            batch = make_batch(data.sequences, [window])
            tokens = model.tokens(table[batch.items], batch.actions, batch.gaps)
            scores = model.dot_logits(model.encode(tokens)[1][:, -1:], table[None, FIRST_ITEM:])[0, :, 0].numpy()
        target = int(case.upcoming[0]) - FIRST_ITEM
        # items that training never met have equal scores if they have equal fields: these are in catalogue order
        order = np.argsort(-scores, kind="stable")
        better = [k for k in order[: int(np.flatnonzero(order == target)[0])] if k + FIRST_ITEM not in case.seen]
        assert abs(rank - len(better)) <= 1, "another batch size rounds differently"
    assert float(gains(found).mean()) == pytest.approx(tiny.trainer.validate(("dot",))["dot_ndcg10"], abs=0.02)


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
    assert report.levels() == {} and report.verdict(tiny.trainer.model, []).grade == "unknown"
    label_only = random_data(5, slate_size=2, validation_users=5)
    object.__setattr__(label_only.config, "heads", (Head("like", "label", 1.0),))
    assert TrainingReport(label_only).verdict(tiny.trainer.model, []).beats_baselines is None


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
    out = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("chosen from")]
    assert out[0].startswith("DOES NOT BEAT its baselines") and out[2].startswith("All 120 users")
    assert Path(out[-1]) == Path("bundles/shop/1")
    assert (tmp_path / "bundles/shop/1/training.png").exists()
