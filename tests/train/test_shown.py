"""A ranker that learns from the slates that users were shown, and the split that holds some of them out."""

from __future__ import annotations

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
from slatewise_train.shown import ShownLosses, position_buckets, weighted_label_loss
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


def test_inverse_propensity_is_unbiased_over_all_outcomes() -> None:
    """The mean of the weighted loss over looks and choices is the loss with the true relevance as its label."""
    relevance, look = torch.tensor([0.7, 0.2, 0.5]), 1 / torch.tensor([1.0, 2.0, 3.0])
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    total = 0.0
    for outcome in range(8):
        clicks = torch.tensor([[outcome >> k & 1 for k in range(3)]], dtype=torch.float64)
        p = relevance * look
        chance = torch.where(clicks[0] == 1, p, 1 - p).prod()
        total = total + chance * weighted_label_loss(logits, clicks, 1 / look[None])
    true = torch.nn.functional.binary_cross_entropy_with_logits(logits, relevance[None].double())
    torch.testing.assert_close(total, true, check_dtype=False)


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
