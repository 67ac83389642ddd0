"""Training: it learns, reads every user's training events and no others, and resumes after a stop."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise import cli
from slatewise.bundle.features import request_context
from slatewise.inference.arrays import FIRST_ITEM, GAP_FIRST, START_ITEM
from slatewise_train.batches import epoch_windows, make_batch
from slatewise_train.config import ModelConfig, TrainConfig
from slatewise_train.data import Data
from slatewise_train.new_model import build_model
from slatewise_train.progress import Progress
from slatewise_train.slates import draw_positions
from slatewise_train.train import Trainer, train
from tests.conftest import Tiny
from tests.train.test_offline import make_data

torch.set_num_threads(1)

SHAPE = {"width": 8, "blocks": 2, "attention_heads": 2, "set_blocks": 1, "meta_size": 4, "dropout": 0.1}
MODEL = ModelConfig("ligr", SHAPE)
SHORT = TrainConfig(
    epochs=3, cascade_epochs=1, batch_events=512, learning_rate=0.01, warmup_steps=2, negatives=32, validate_every=2
)


@pytest.fixture(scope="module")
def few(tiny: Tiny) -> Data:
    """The data of the tiny ranker, with the training events of eight users only."""
    data = tiny.trainer.data
    lengths = data.split.train_lengths.copy()
    lengths[8:] = 0
    return dataclasses.replace(
        data,
        split=dataclasses.replace(data.split, train_lengths=lengths, validation_users=data.split.validation_users[:3]),
    )


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        **trainer.model.state_dict(),
        **{f"meta.{name}": value for name, value in trainer.meta.state_dict().items()},
    }


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_training_writes_log_row_plot_and_checkpoint(tiny: Tiny) -> None:
    rows = rows_of(tiny.training)
    last = tiny.config.train.epochs
    assert [int(row["epoch"]) for row in rows] == list(range(1, last + 1))
    validated = [int(row["epoch"]) for row in rows if row["dot_ndcg10"]]
    assert validated == [
        epoch for epoch in range(1, last + 1) if epoch % tiny.config.train.validate_every == 0 or epoch == last
    ]
    assert rows[-1]["point_ndcg10"] and not rows[1]["point_ndcg10"], "`point` is trained in the last epochs"
    assert (tiny.training / "log.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tiny.training.iterdir()) == ["checkpoint.pt", "log.csv", "log.png"]


def test_loss_decreases_before_and_after_cascade_epochs(tiny: Tiny) -> None:
    losses = [float(row["loss"]) for row in rows_of(tiny.training)]
    joins = tiny.config.train.epochs - tiny.config.train.cascade_epochs
    assert losses[joins - 1] < losses[0]
    assert losses[-1] < losses[joins]


def test_resumed_training_equals_uninterrupted_training(
    few: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = train(few, MODEL, SHORT, tmp_path / "through")
    run_epoch = Trainer.run_epoch

    def stop_in_third(trainer: Trainer, cascade: bool) -> float:
        if trainer.epoch == 2:
            raise KeyboardInterrupt
        return run_epoch(trainer, cascade)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", stop_in_third)
        with pytest.raises(KeyboardInterrupt):
            train(few, MODEL, SHORT, tmp_path / "stopped")
    before = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    assert before["epoch"] == 2
    torch.rand(100)  # other use of the random generator must not matter
    resumed = train(few, MODEL, SHORT, tmp_path / "stopped")
    assert resumed.epoch == through.epoch == 3
    for name, value in state_of(through).items():
        torch.testing.assert_close(state_of(resumed)[name], value, rtol=0, atol=1e-6, equal_nan=True)
    assert any((before["model"][name] != value).any() for name, value in through.model.state_dict().items()), (
        "the third epoch changed the weights"
    )
    logs = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(tmp_path / name)]
        for name in ("through", "stopped")
    ]
    assert logs[0] == logs[1]


def test_finished_training_is_not_changed_by_another_run(few: Data, tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, epochs=1, cascade_epochs=0)
    first = train(few, MODEL, config, tmp_path)
    again = train(few, MODEL, config, tmp_path)
    for name, value in state_of(first).items():
        torch.testing.assert_close(state_of(again)[name], value, rtol=0, atol=0, equal_nan=True)
    assert len(rows_of(tmp_path)) == 1


@given(
    lengths=st.lists(st.integers(0, 200), max_size=25),
    longest=st.integers(1, 64),
    batch_events=st.integers(1, 500),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_epoch_windows_cover_users_within_batch_size(
    lengths: list[int], longest: int, batch_events: int, seed: int
) -> None:
    batches = list(epoch_windows(np.array(lengths, np.int64), longest, batch_events, np.random.default_rng(seed)))
    pieces: dict[int, int] = {}
    for windows in batches:
        width = max(([last - first for _, first, last in windows]), default=0) + 1
        assert len(windows) <= 1 or width * len(windows) <= batch_events
        for user, first, last in windows:
            assert 0 <= first < last <= lengths[user], "only training events"
            assert last - first == min(longest, lengths[user])
            pieces[user] = pieces.get(user, 0) + 1
    assert pieces == {user: -(-n // longest) for user, n in enumerate(lengths) if n}
    assert all(len(windows) for windows in batches), "no batch is empty"


def test_window_of_a_long_history_can_start_at_any_event() -> None:
    firsts = {
        w[1]
        for seed in range(60)
        for b in epoch_windows(np.array([12]), 8, 100, np.random.default_rng(seed))
        for w in b
    }
    assert firsts == {0, 1, 2, 3, 4}


def test_batch_has_start_token_events_and_right_padding(few: Data) -> None:
    sequences = few.sequences
    windows = [(0, 3, 8), (2, 0, 1), (1, 5, 7)]
    batch = make_batch(sequences, windows)
    assert batch.items.shape == (3, 6) and batch.labels.shape == (3, 6, 2)
    assert batch.lengths.tolist() == [5, 1, 2] and batch.users.tolist() == [0, 2, 1]
    assert (batch.items[:, 0] == START_ITEM).all()
    for row, (user, first, last) in enumerate(windows):
        n = last - first
        items, actions, gaps, labels = sequences.of(user, first, last)
        assert batch.items[row, 1 : n + 1].tolist() == items.tolist()
        assert batch.actions[row, 1 : n + 1].tolist() == actions.tolist()
        assert batch.gaps[row, 1 : n + 1].tolist() == gaps.tolist() and batch.gaps[row, 1] == GAP_FIRST
        np.testing.assert_array_equal(batch.labels[row, 1 : n + 1], labels)
        assert (
            not batch.items[row, n + 1 :].any()
            and batch.labels[row, n + 1 :].isnan().all()
            and batch.labels[row, 0].isnan().all()
        )
        time = sequences.timestamps[sequences.offsets[user] + last - 1]
        np.testing.assert_allclose(batch.contexts[row, n], request_context(float(time)), atol=1e-6)


def test_dot_loss_does_not_depend_on_padding(few: Data) -> None:
    trainer = Trainer(few, ModelConfig("ligr", SHAPE | {"dropout": 0.0}), dataclasses.replace(SHORT, id_dropout=0.0))
    short = (0, 0, 5)
    long = (1, 0, 20)

    def loss(windows: list[tuple[int, int, int]]) -> float:
        batch = make_batch(few.sequences, windows)
        table = trainer.model.item_table()
        torch.manual_seed(0)
        _, users = trainer.model.encode(trainer.model.tokens(table[batch.items], batch.actions, batch.gaps))
        torch.manual_seed(0)  # the same negatives
        trainer.label_heads = []
        return trainer.dot_loss(batch, users[:, :-1], table, trainer.draw_uniform()).item()

    assert loss([short, long]) == pytest.approx((5 * loss([short]) + 20 * loss([long])) / 25, rel=1e-5)


def test_loss_from_rows_of_the_batch_equals_the_whole_table(few: Data) -> None:
    trainer = Trainer(few, ModelConfig("ligr", SHAPE | {"dropout": 0.0}), dataclasses.replace(SHORT, id_dropout=0.3))
    batch = make_batch(few.sequences, [(0, 0, 5), (1, 2, 20), (3, 0, 1)])
    model = trainer.model
    torch.manual_seed(0)
    loss = trainer.loss(batch, cascade=False)
    torch.manual_seed(0)
    negatives = trainer.draw_uniform()
    hidden = torch.rand(batch.items[:, :-1].shape) < 0.3
    table = model.item_table()
    cold = model.cold_item_vectors(table)
    items = batch.items[:, :-1]
    vectors = torch.where((hidden & (items >= FIRST_ITEM))[..., None], cold[items], table[items])
    _, users = model.encode(model.tokens(vectors, batch.actions[:, :-1], batch.gaps[:, :-1]))
    expected = trainer.dot_loss(batch, users, table, negatives)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, list(model.parameters()), allow_unused=True) for value in (loss, expected)]
    for found, wanted in zip(*gradients, strict=True):
        if wanted is not None and found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [True, False])
def test_hidden_items_are_read_as_unknown_ones(few: Data, fields: bool) -> None:
    data = few
    if not fields:
        vocabulary = dataclasses.replace(few.catalogue.vocabulary, fields={})
        catalogue = dataclasses.replace(few.catalogue, vocabulary=vocabulary, field_values={})
        data = dataclasses.replace(few, catalogue=catalogue)
    trainer = Trainer(data, MODEL, dataclasses.replace(SHORT, id_dropout=0.5))
    table = trainer.model.item_table()
    cold = trainer.model.cold_item_vectors(table)
    items = torch.randint(0, len(table), (7, 30))
    torch.manual_seed(0)
    found = trainer.id_dropout(items, table, cold)
    torch.manual_seed(0)
    hidden = (torch.rand(items.shape) < 0.5) & (items >= FIRST_ITEM)
    assert 0 < hidden.sum() < (items >= FIRST_ITEM).sum()
    torch.testing.assert_close(found, torch.where(hidden[..., None], cold[items], table[items]))


@pytest.mark.parametrize("cascade", [False, True])
def test_training_can_overfit_one_batch(few: Data, cascade: bool) -> None:
    torch.manual_seed(0)
    trainer = Trainer(
        few,
        ModelConfig("ligr", SHAPE | {"width": 32, "dropout": 0.0}),
        dataclasses.replace(SHORT, learning_rate=0.02, id_dropout=0.0),
    )
    batch = make_batch(few.sequences, [(user, 0, 20) for user in range(4)])
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.02

    def step() -> float:
        table = trainer.model.item_table()
        state, users = trainer.model.encode(trainer.model.tokens(table[batch.items], batch.actions, batch.gaps))
        loss = (
            trainer.cascade_loss(batch, state, users, table, table)
            if cascade
            else trainer.dot_loss(batch, users[:, :-1], table, trainer.draw_uniform())
        )
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        return loss.item()

    losses = [step() for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5]), losses


def test_ranker_without_exit_set_trains_no_weights_of_it(few: Data) -> None:
    trainer = Trainer(few, ModelConfig("ligr", SHAPE | {"set_blocks": 0}), SHORT)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.run_epoch(True)
    same = {name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith("set_")} == {
        "set_norm.weight", "set_norm.bias", "set_out.weight", "set_out.bias"
    }  # fmt: skip
    trained = sum(1 for one in trainer.optimizer.param_groups[0]["params"] if one in trainer.optimizer.state)
    assert trained == len(before) - len(same) + 1, "and the meta-embeddings"


def test_learning_rate_warms_up_and_ends_at_zero(few: Data) -> None:
    progress = Progress(dataclasses.replace(SHORT, learning_rate=1.0, warmup_steps=10, epochs=100), {}, False)
    assert [progress.rate(step, 10**6) for step in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    progress.epoch = 50
    assert progress.rate(0, 10) == pytest.approx(0.5)
    progress.epoch = 100
    assert progress.rate(0, 10) == pytest.approx(0.0)


def test_warm_up_is_a_share_of_the_run() -> None:
    progress = Progress(TrainConfig(epochs=10, warmup=0.1, learning_rate=1.0, patience=3), {}, False)
    assert [progress.rate(step, 20) for step in (0, 9, 19)] == pytest.approx([0.05, 0.5, 1.0])
    progress.epoch = 3
    assert progress.rate(5, 20) == 1.0, "constant until the last epochs begin"
    progress.epoch, progress.joined = 6, 4
    assert progress.rate(0, 20) == pytest.approx(0.5 * (1 + np.cos(np.pi * 2 / 20)))


def test_training_stops_early_and_keeps_the_best_weights(few: Data) -> None:
    part = torch.nn.Linear(1, 1)
    progress = Progress(TrainConfig(epochs=99, cascade_epochs=3, patience=2), {"model": part}, True)
    for score, weight in ((0.1, 1.0), (0.3, 2.0), (0.2, 3.0), (0.3, 4.0)):
        assert progress.joined is None and not progress.finished
        with torch.no_grad():
            part.weight.fill_(weight)
        progress.epoch += 1
        progress.compare(score)
        progress.join()
    assert progress.joined == 4 and part.weight.item() == 2.0
    resumed = Progress(progress.config, {"model": part}, True)
    resumed.load(progress.state())
    assert resumed.state() == progress.state() and not resumed.finished
    progress.epoch = 7
    assert progress.finished


def test_training_with_patience_resumes_exactly(few: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SHORT, epochs=8, cascade_epochs=2, patience=1, validate_every=1, learning_rate=0.03)
    through = train(few, MODEL, config, tmp_path / "through")
    run_epoch = Trainer.run_epoch
    for stop in range(1, through.epoch):

        def stopping(trainer: Trainer, cascade: bool, stop: int = stop) -> float:
            if trainer.epoch == stop:
                raise KeyboardInterrupt
            return run_epoch(trainer, cascade)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_epoch", stopping)
            with pytest.raises(KeyboardInterrupt):
                train(few, MODEL, config, tmp_path / "stopped")
    resumed = train(few, MODEL, config, tmp_path / "stopped")
    assert resumed.progress.joined == through.progress.joined and resumed.epoch == through.epoch
    again = Trainer(few, MODEL, config)
    again.load(tmp_path / "through" / "checkpoint.pt")
    for name, value in state_of(through).items():
        torch.testing.assert_close(state_of(resumed)[name], value, rtol=0, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(state_of(again)[name], value, rtol=0, atol=0, equal_nan=True)


def test_item_without_events_is_served_as_its_fields_twin() -> None:
    """Listed items rank as unknown items of their fields do, and better than a random item of their group's users."""
    rng = np.random.default_rng(0)
    groups = {g: [f"{g}{k}" for k in range(12)] for g in "ab"}
    users = {f"u{u}": [str(i) for i in rng.permutation(groups["ab"[u % 2]])[:8]] for u in range(60)}
    listed = [*groups["a"], *groups["b"], "a_new", "b_new"]
    data = make_data(users, listed, slate_size=1)
    values = np.array([0, 0, *(1 + "ab".index(name[0]) for name in listed)])[:, None]
    vocabulary = dataclasses.replace(data.catalogue.vocabulary, fields={"group": ["a", "b"]})
    catalogue = dataclasses.replace(data.catalogue, vocabulary=vocabulary, field_values={"group": values})
    data = dataclasses.replace(data, catalogue=catalogue)
    config = dataclasses.replace(SHORT, epochs=12, cascade_epochs=0, batch_events=128, id_dropout=0.1)
    trainer = Trainer(data, ModelConfig("ligr", SHAPE | {"width": 16, "blocks": 1}), config)
    new = [data.catalogue.vocabulary.items.index(name) + FIRST_ITEM for name in ("a_new", "b_new")]
    assert trainer.untrained.tolist() == new and not set(trainer.trained.tolist()) & set(new)
    for _ in range(config.epochs):
        trainer.run_epoch(False)
    model = trainer.model.eval()
    with torch.no_grad():
        table = model.item_table()
        torch.testing.assert_close(table[new], model.cold_item_vectors(table)[new])
        percentiles = []
        for user in range(60):
            batch = make_batch(data.sequences, [(user, 0, 7)])
            _, encoded = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
            scores = table[FIRST_ITEM:] @ encoded[0, -1]
            mine = scores[new[user % 2] - FIRST_ITEM]
            percentiles.append((scores < mine).float().mean().item())
    assert np.mean(percentiles) > 0.5, np.mean(percentiles)


@given(length=st.integers(1, 300), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_drawn_positions_are_before_an_event(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    for draw in ("uniform", "log", "mixed"):
        read = draw_positions(torch.tensor([length, 1]), 500, draw)
        assert read.shape == (2, 500) and read.min() >= 0 and (read[0] < length).all() and not read[1].any()


def test_log_draw_takes_each_doubling_alike() -> None:
    torch.manual_seed(0)
    read = draw_positions(torch.tensor([255]), 40_000, "log")[0] + 1
    shares = [((read >= 2**k) & (read < 2 ** (k + 1))).float().mean().item() for k in range(8)]
    assert shares == pytest.approx([1 / 8] * 8, abs=0.01)


def test_mixed_draw_takes_half_of_the_positions_each_way() -> None:
    torch.manual_seed(0)
    read = draw_positions(torch.tensor([255]), 40_000, "mixed")[0] + 1
    shares = [((read >= 2**k) & (read < 2 ** (k + 1))).float().mean().item() for k in range(8)]
    assert shares == pytest.approx([(1 / 8 + 2**k / 255) / 2 for k in range(8)], abs=0.01)


def test_validate_ranks_held_out_event_among_new_items() -> None:
    histories = {f"u{u}": [f"i{(u + k * (u + 1)) % 13}" for k in range(10)] for u in range(12)}
    data = make_data(histories, [f"i{k}" for k in range(14)], slate_size=2, validation_users=8)
    trainer = Trainer(data, MODEL, SHORT)
    found = trainer.validate(("dot", "point"))
    model = trainer.model.eval()
    hits = []
    gains = []
    with torch.no_grad():
        table = model.item_table()
    for user in data.split.validation_users:  # the slow, obvious computation
        start = int(data.sequences.offsets[user])
        n = 10 - 2 - 1
        seen = set(data.sequences.items[start : start + n].tolist())
        target = int(data.sequences.items[start + n])
        batch = make_batch(data.sequences, [(int(user), 0, n)])
        with torch.no_grad():
            _, users = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
            scores = (table @ users[0, -1]).tolist()
        rank = sum(scores[row] > scores[target] for row in range(FIRST_ITEM, len(scores)) if row not in seen)
        hits.append(rank < 10)
        gains.append(1 / np.log2(rank + 2) if rank < 10 else 0)
    assert found == {
        "dot_hr10": pytest.approx(np.mean(hits)),
        "dot_ndcg10": pytest.approx(np.mean(gains)),
        "point_hr10": pytest.approx(np.mean(hits)),  # untrained, the exit `point` is the exit `dot`
        "point_ndcg10": pytest.approx(np.mean(gains)),
    }
    assert 0 < np.mean(gains) < 1


def test_model_with_an_always_missing_number_is_finite(few: Data) -> None:
    numeric = few.catalogue.numeric.copy()
    numeric[:, 1] = np.nan
    model = build_model(dataclasses.replace(few.catalogue, numeric=numeric), few.config, MODEL)
    assert model.numeric_mean.isfinite().all() and (model.numeric_std > 0).all()


def test_command_names_an_unknown_key_of_the_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ranker.toml"
    path.write_text(
        'name = "x"\n[data]\nevents = "e.csv"\nitems = "i.csv"\n[heads.buy]\nkind = "label"\nweight = 1\n'
        "[train]\nepocs = 3\nepochs = 1\n[model]\n"
    )
    assert cli.main(["train", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"slatewise train: error: {path}: [train] has unknown epocs")
