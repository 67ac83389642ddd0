"""A ranker that learns from the slates that users were shown, and the split that holds some of them out."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import make_batch, served_window_start
from slatewise_train.config import DataConfig, Head, ModelConfig, TablesConfig, TrainConfig
from slatewise_train.data import Data, load_data
from slatewise_train.evaluation.cases import slate_cases
from slatewise_train.exposures import first_held_out, training_slates
from slatewise_train.shown import ShownLosses, list_loss, position_buckets, weighted_label_loss
from slatewise_train.train import Trainer

HEADS = (Head("next", "next", 1.0), Head("buy", "label", 1.0))


def load(folder: Path, events: pl.DataFrame, config: DataConfig | None = None, *actions: str) -> Data:
    events.write_parquet(folder / "events.parquet")
    tables = TablesConfig(str(folder / "events.parquet"), history_actions=actions or ("buy",))
    return load_data(config or DataConfig("shop", HEADS, validation_users=0), tables)


def row(user: str, item: str, time: int, action: str, slate: str | None, position: int | None = None) -> dict:
    return {
        "user_id": user,
        "item_id": item,
        "timestamp": time,
        "action": action,
        "slate_id": slate,
        "position": position,
        "label_buy": None if slate is None else int(action == "buy"),
    }


EVENTS = pl.DataFrame(
    [
        row("u", "a", 1, "buy", None),
        row("u", "c", 2, "shown", "s1", 2),
        row("u", "b", 2, "shown", "s1", 1),
        row("u", "d", 2, "shown", "s1", 3),
        row("u", "d", 5, "buy", "s1", 3),  # the click of an impression: one item of the slate
        row("u", "a", 7, "shown", "s2", 2),
        row("u", "e", 7, "buy", "s2", 1),
        row("u", "f", 9, "shown", "s3", 1),  # alone in its slate
        row("v", "a", 3, "buy", None),
        row("v", "b", 4, "buy", None),
        row("v", "c", 6, "shown", "s1", None),  # a slate id of another user is another slate
        row("v", "d", 6, "shown", "s1", None),
        row("w", "a", 1, "shown", "s9", 1),  # never took anything
        row("w", "b", 1, "shown", "s9", 2),
    ]
)


def random_events(seed: int, users: int = 30) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        time = 0
        for slate in range(int(rng.integers(1, 6))):
            time += int(rng.integers(0, 3))
            items = rng.choice(20, int(rng.integers(2, 6)), replace=False)
            taken = rng.random(len(items)) < 0.4
            rows += [
                row(f"u{user}", f"i{i}", time + int(t) * int(rng.integers(0, 3)), "buy" if t else "shown", f"s{slate}")
                for i, t in zip(items, taken, strict=True)
            ]
    return pl.DataFrame(rows)


@pytest.mark.parametrize("seed", range(6))
def test_no_slate_is_cut_by_the_split(tmp_path: Path, seed: int) -> None:
    """Training has a whole slate or none of it, and each held-out slate is after all training events."""
    data = load(tmp_path, random_events(seed), DataConfig("shop", HEADS, validation_users=4, seed=seed))
    e = data.exposures
    assert e is not None
    trained = set(training_slates(e, data.split.train_lengths).tolist())
    lengths = data.split.train_lengths
    held_out = first_held_out(e, np.arange(len(data.sequences)), lengths)
    chained = set()  # users whose slates overlap down to their first event
    for user, length in enumerate(lengths):
        mine = [(e.history[s], e.ends[s]) for s in range(len(e)) if e.slate_users[s] == user]
        while cuts := [first for first, end in mine if first < length < end]:
            length = min(cuts)
        chained |= {user} if length == 0 else set()
    assert len(chained) < len(lengths)
    for s, user in enumerate(e.slate_users):
        assert e.ends[s] <= lengths[user] or e.history[s] >= lengths[user] or user in chained
        assert (s in trained) == (e.history[s] < lengths[user] and e.ends[s] <= lengths[user])
    for user, slate in enumerate(held_out):
        after = [s for s in range(len(e)) if e.slate_users[s] == user and e.history[s] >= lengths[user]]
        assert slate == (after[0] if after else -1)
    assert not set(data.split.slate_users) & set(data.split.validation_users)
    assert set(data.split.slate_users) | set(data.split.validation_users) <= set(np.flatnonzero(held_out >= 0))


def test_case_is_the_held_out_slate_with_older_history(tmp_path: Path) -> None:
    data = load(tmp_path, EVENTS)
    cases = slate_cases(data, data.split.slate_users)
    names = [None, None, *data.catalogue.vocabulary.items]
    assert [("".join(names[i] for i in c.upcoming), "".join(names[i] for i in c.seen), c.time) for c in cases] == [
        ("ea", "ad", 7.0),
        ("cd", "ab", 6.0),
    ]
    np.testing.assert_array_equal(cases[0].labels, [[1, 1], [0, 0]])


@pytest.mark.parametrize("seed", range(4))
def test_drawn_slates_of_windows_equal_slow_reference(tmp_path: Path, seed: int) -> None:
    data = load(tmp_path, random_events(seed, 40))
    losses = ShownLosses(data, TrainConfig(cascade_positions=50))
    e = data.exposures
    assert e is not None
    windows = [
        (u, first, end)
        for u in range(len(data.sequences))
        for first, end in [(0, int(data.split.train_lengths[u])), (1, int(data.split.train_lengths[u]))]
        if end > first
    ]
    batch = make_batch(data.sequences, windows)
    shown = losses.draw(batch)
    assert shown is not None
    kept = shown.slates
    columns = zip(shown.rows, kept.read[:, 0], kept.candidates[:, 0], kept.exists[:, 0], strict=True)
    found = {(int(r), int(read), tuple(c[x].tolist())) for r, read, c, x in columns}
    wanted = {
        (r, int(e.history[s]) - first, tuple(e.items[e.offsets[s] : e.offsets[s + 1]].tolist()))
        for r, (u, first, end) in enumerate(windows)
        for s in np.intersect1d(np.flatnonzero(e.slate_users == u), training_slates(e, data.split.train_lengths))
        if first + (first > 0) <= e.history[s] < end
    }
    assert found == wanted and len(shown.rows) >= len(wanted) > 0
    part = shown.of(torch.tensor([2, 0]))
    wanted_reads = {(new, read) for new, old in enumerate([2, 0]) for row, read, _ in found if row == old}
    reads = set() if part is None else set(zip(part.rows.tolist(), part.slates.read[:, 0].tolist(), strict=True))
    assert reads == wanted_reads


def test_position_buckets_grow() -> None:
    buckets = position_buckets(torch.arange(301))
    assert buckets[:17].tolist() == list(range(17)) and (buckets.diff() >= 0).all() and buckets[300] == 32


def test_weighted_loss_of_choices_is_that_of_a_fair_log() -> None:
    """Items of relevance 2, 3 and 4 in every order; at rank r, one is chosen with probability relevance / 10 / r."""
    relevance = [2, 3, 4]
    scores = torch.tensor([0.3, -0.5, 1.1])
    fair: list[tuple[torch.Tensor, torch.Tensor]] = []
    biased: list[tuple[torch.Tensor, torch.Tensor]] = []
    for order in itertools.permutations(range(3)):
        for rank, item in enumerate(order, start=1):
            outcome = (scores[list(order)], torch.eye(3)[rank - 1])
            fair += [outcome] * (6 * relevance[item])
            biased += [outcome] * (6 * relevance[item] // rank)
    shown, labels = (torch.stack(column) for column in zip(*biased, strict=True))
    weights = torch.tensor([1.0, 2.0, 3.0]).expand_as(labels)
    weights = weights / weights[labels == 1].mean()
    wanted, chosen = (torch.stack(column) for column in zip(*fair, strict=True))
    expected = list_loss("softmax", wanted, chosen, torch.ones_like(chosen))
    torch.testing.assert_close(list_loss("softmax", shown, labels, weights), expected)
    one_order = (shown == scores).all(1)  # of an older ranker
    naive = list_loss("softmax", shown[one_order], labels[one_order], torch.ones_like(labels[one_order]))
    assert abs(naive - expected) > 0.02


def test_weighted_label_loss_is_least_at_the_stated_odds() -> None:
    """An item of relevance p that is seen with chance 1 / r: the odds of the least mean loss are p / (1 - p / r)."""
    for p, r in itertools.product((0.1, 0.4), (1.0, 2.0, 5.0)):
        logit = torch.tensor([[p / (1 - p / r)]]).log().requires_grad_()
        one = weighted_label_loss(logit, torch.ones(1, 1), torch.full((1, 1), r))
        zero = weighted_label_loss(logit, torch.zeros(1, 1), torch.full((1, 1), r))
        (p / r * one + (1 - p / r) * zero).backward()
        assert logit.grad is not None and abs(float(logit.grad)) < 1e-6


def test_list_loss_is_the_mean_over_choices() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 4)
    labels = torch.tensor([[0, 1, 0, 1.0], [1, 0, 0, torch.nan], [0, 0, torch.nan, torch.nan]])
    logs = [torch.log_softmax(scores[0], 0), torch.log_softmax(scores[1, :3], 0)]
    weights = torch.tensor([[1.0, 2, 3, 4]]).expand(3, 4)
    expected = -(2 * logs[0][1] + 4 * logs[0][3] + 1 * logs[1][0]) / 3
    torch.testing.assert_close(list_loss("softmax", scores, labels, weights), expected)


def test_weighted_label_loss_has_a_minimum() -> None:
    """A label of 1 with a large weight must not pay for logits without end."""
    logits = torch.linspace(-40, 40, 81)[:, None]
    losses = torch.stack(
        [
            weighted_label_loss(x.expand(1, 4), torch.tensor([[1.0, 0, 0, torch.nan]]), torch.full((1, 4), 9.0))
            for x in logits
        ]
    )
    assert losses.argmin() not in (0, 80)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(torch.zeros(2), torch.tensor([1.0, 0]))
    ones = torch.ones(1, 3)
    torch.testing.assert_close(weighted_label_loss(torch.zeros(1, 3), torch.tensor([[1.0, 0, torch.nan]]), ones), plain)


def shop(seed: int = 0) -> pl.DataFrame:
    """400 users with slates of one bought and three shown items. Items from 20 on are never bought."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(400):
        for time in range(8):
            items = [rng.integers(0, 20), *(20 + rng.choice(20, 3, replace=False))]
            rows += [
                {"user_id": f"u{user}", "item_id": f"i{i}", "timestamp": time, "label_buy": int(k == 0)}
                for k, i in enumerate(items)
            ]
    return pl.DataFrame(rows)


@pytest.mark.parametrize("loss", ["bce", "lambda"])
def test_items_that_are_never_bought_rank_last(tmp_path: Path, loss: str) -> None:
    config = DataConfig("shop", HEADS, history_length=32, validation_users=40)
    data = load(tmp_path, shop(), config, "label:buy")
    model = ModelConfig(shape={"width": 16, "blocks": 1, "set_blocks": 1, "meta_size": 4})
    train = TrainConfig(batch_events=1024, learning_rate=0.01, warmup_steps=0, slate_loss=loss)
    trainer = Trainer(data, model, train)
    for epoch in range(6):
        trainer.run_epoch(cascade=epoch > 1)
    trainer.model.eval()
    table = trainer.model.item_table()
    user = 0
    length = int(data.split.train_lengths[user])
    batch = make_batch(data.sequences, [(user, served_window_start(length, 32), length)])
    with torch.no_grad():
        history, users = trainer.model.encode(trainer.model.tokens(table[batch.items], batch.actions, batch.gaps))
        vectors = table[None, FIRST_ITEM:]
        fused = trainer.model.fuse(
            trainer.numeric[None, FIRST_ITEM:], trainer.model.default_meta, batch.contexts[:, -1:]
        )
        dot = trainer.model.dot_logits(users[:, -1:], vectors)
        hidden = trainer.model.hidden(vectors, history, torch.tensor([batch.items.shape[1]]), None, fused)
        exits = trainer.model.logits_by_exit(dot, hidden)
    number = np.array([int(item[1:]) for item in data.catalogue.vocabulary.items])
    for name, logits in exits.items():
        for head in range(2) if name != "dot" else range(1):
            order = number[logits[0, :, head].argsort(descending=True).numpy()]
            assert set(order[:20]) == set(range(20)), f"{name}, head {head}: never bought items are among the best"


def test_position_bias_learns_and_stays_out_of_the_model(tmp_path: Path) -> None:
    rows = shop().with_columns(pl.Series("position", [1, 2, 3, 4] * 3200))
    data = load(tmp_path, rows, DataConfig("shop", HEADS, history_length=32, validation_users=40), "label:buy")
    model = ModelConfig(shape={"width": 16, "blocks": 1, "set_blocks": 1, "meta_size": 4})
    config = TrainConfig(batch_events=2048, learning_rate=0.01, warmup_steps=0, position_bias=True)
    trainer = Trainer(data, model, config)
    trainer.run_epoch(cascade=True)
    assert trainer.shown is not None
    bias = trainer.shown.position_bias.detach()
    assert (bias[1] > bias[2:5]).all(), "the first place was always chosen"
    assert not bias[5:].any() and not bias[0].any()
    assert not any("position" in name for name in trainer.model.state_dict())
    off = Trainer(data, model, TrainConfig(batch_events=2048, warmup_steps=0))
    off.run_epoch(cascade=True)
    assert off.shown is not None and not off.shown.position_bias.any()


def test_corrections_of_positions_are_refused_without_positions(tmp_path: Path) -> None:
    data = load(tmp_path, shop(), DataConfig("shop", HEADS, history_length=32), "label:buy")
    with pytest.raises(ValueError, match="position_bias and propensity_power correct the same bias"):
        Trainer(data, ModelConfig(), TrainConfig(position_bias=True, propensity_power=1.0))
    for found in (data, dataclasses.replace(data, exposures=None)):
        for key in ("position_bias", "propensity_power"):
            with pytest.raises(ValueError, match=rf"\[train\] {key} needs slates with positions"):
                Trainer(found, ModelConfig(), TrainConfig(**{key: 1}))


def test_batches_without_slates_are_passed_over(tmp_path: Path) -> None:
    """A ranker with label heads alone has nothing to learn from users who saw no slate."""
    config = DataConfig("shop", HEADS[1:], history_length=32, validation_users=0)
    rows = pl.concat([shop().head(40 * 32), shop().tail(40 * 32).with_columns(slate_id=None)], how="diagonal")
    rows = rows.with_columns(slate_id=pl.when(pl.int_range(pl.len()) < 40 * 32).then(pl.col("timestamp")))
    data = load(tmp_path, rows, config, "label:buy")
    trainer = Trainer(data, ModelConfig(shape={"width": 8, "blocks": 1}), TrainConfig(batch_events=1))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.run_epoch(cascade=True) > 0
    assert any((value != before[name]).any() for name, value in trainer.model.state_dict().items())


def test_time_of_last_epochs_needs_no_slate(tmp_path: Path) -> None:
    config = DataConfig("shop", HEADS[1:], history_length=32, validation_users=0)
    rows = pl.concat([shop().head(40 * 32), shop().tail(40 * 32).with_columns(slate_id=None)], how="diagonal")
    rows = rows.with_columns(slate_id=pl.when(pl.int_range(pl.len()) < 40 * 32).then(pl.col("timestamp")))
    data = load(tmp_path, rows, config, "label:buy")
    model = ModelConfig(shape={"width": 8, "blocks": 1})
    for seed in range(6):  # the measured batch is drawn, and some have no slate
        assert Trainer(data, model, TrainConfig(batch_events=1, seed=seed)).cascade_cost() > 0


def test_next_event_is_preferred_to_slates_without_a_choice(tmp_path: Path) -> None:
    """Items n0 to n4 are shown without success in slates of their own; o0 to o4 are never shown nor bought."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(100):
        for time in range(6):
            rows += [row(f"u{user}", f"n{k}", 10 * time, "shown", f"a{time}") for k in rng.choice(5, 2, replace=False)]
            slate = [row(f"u{user}", f"b{rng.integers(5)}", 10 * time + 5, "buy", f"b{time}")]
            rows += [*slate, row(f"u{user}", f"o{rng.integers(5)}", 10 * time + 5, "shown", f"b{time}")]
    config = DataConfig("shop", HEADS[:1], history_length=32)
    data = load(tmp_path, pl.DataFrame(rows).drop("label_buy"), config, "buy")
    trainer = Trainer(data, ModelConfig(shape={"width": 8, "blocks": 1, "set_blocks": 0}), TrainConfig())
    assert trainer.shown is not None
    batch = make_batch(data.sequences, [(0, 0, 5)])
    users = torch.randn(1, 5, 8)
    table = torch.randn(len(data.catalogue.numeric), 8, requires_grad=True)
    shown = trainer.shown.draw(batch)
    assert shown is not None
    trainer.shown.dot_loss(trainer.model, batch, shown, users, table).backward()
    names = data.catalogue.vocabulary.items
    learned = {names[k - FIRST_ITEM][0] for k in table.grad.abs().sum(1).nonzero()[:, 0].tolist()}
    assert "n" in learned, "an item of a slate without a choice is a negative"


def click_log(folder: Path) -> Data:
    """Eight items that an older ranker puts in about the wrong order. Clicks of item k: (k + 1) / 9 / rank.

    Each user clicked one item before and one after the slates, so that all slates stand in the training events.
    """
    rng = np.random.default_rng(3)
    rows = []
    for user in range(300):
        for slate in range(4):
            order = np.argsort(np.arange(8) + rng.normal(0, 2.5, 8))
            clicked = rng.random(8) < (order + 1) / 9 / np.arange(1, 9)
            for rank, item in enumerate(order, start=1):
                rows.append((f"u{user}", f"i{item}", 100 * slate + user, int(clicked[rank - 1]), f"s{slate}", rank))
        rows += [(f"u{user}", f"i{rng.integers(8)}", time, 1, None, None) for time in (1, 9_000)]
    columns = ["user_id", "item_id", "timestamp", "label_buy", "slate_id", "position"]
    config = DataConfig("shop", HEADS[1:], history_length=32)
    return load(folder, pl.DataFrame(rows, columns, orient="row"), config, "label:buy")


def test_corrections_recover_the_order_of_a_click_log(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data = click_log(tmp_path)
    truth = np.array([int(name[1:]) for name in data.catalogue.vocabulary.items])
    shape = {"width": 16, "blocks": 1, "set_blocks": 1, "meta_size": 4}

    def correlation(**changes: float) -> float:
        config = TrainConfig(
            batch_events=256, learning_rate=0.02, warmup_steps=5, epochs=20, slate_loss="softmax", **changes
        )
        trainer = Trainer(data, ModelConfig(shape=shape), config)
        losses = [trainer.run_epoch(cascade=True) for _ in range(config.epochs)]
        assert 0 < losses[-1] < losses[0]
        trainer.model.eval()
        with torch.no_grad():
            table = trainer.model.item_table()
            batch = make_batch(data.sequences, [(user, 0, 1) for user in range(100)])
            history, users = trainer.model.encode(trainer.model.tokens(table[batch.items], batch.actions, batch.gaps))
            vectors = table[None, FIRST_ITEM:].expand(100, -1, -1)
            fused = trainer.model.fuse(
                trainer.numeric[None, FIRST_ITEM:].expand(100, -1, -1),
                trainer.model.default_meta,
                batch.contexts[:, -1:],
            )
            hidden = trainer.model.hidden(vectors, history, torch.tensor([2]), None, fused)
            point = trainer.model.dot_logits(users[:, -1:], vectors) + trainer.model.point_logits(hidden)
        ranks = point[..., 0].mean(0).argsort().argsort().numpy()
        return float(np.corrcoef(ranks, truth)[0, 1])

    assert correlation() < 0.6
    assert correlation(propensity_power=1.0) > 0.9
    assert correlation(position_bias=True) > 0.9


def test_slate_loss_trains_rankers_without_shown_slates(tmp_path: Path) -> None:
    rows = shop().filter(pl.col("item_id").is_in([f"i{k}" for k in range(20)])).head(400)
    rows = rows.with_columns(label_buy=pl.Series([0, 1] * (len(rows) // 2)), action=pl.lit("view"))
    data = load(tmp_path, rows, DataConfig("shop", HEADS, history_length=32, slate_size=4), "*")
    assert data.exposures is None
    found = {}
    for kind in ("bce", "softmax", "neural_ndcg", "lambda"):
        trainer = Trainer(data, ModelConfig(shape={"width": 8, "blocks": 1}), TrainConfig(slate_loss=kind))
        found[kind] = trainer.run_epoch(cascade=True)
    assert len(set(found.values())) == 4
