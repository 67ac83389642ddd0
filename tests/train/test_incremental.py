"""The parts of an update: windows, penalty, the grown model, rank stability."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slatewise.bundle.manifest import read_manifest
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM
from slatewise_train.batches import make_batch
from slatewise_train.data import Catalogue, TrainingVocabulary
from slatewise_train.incremental.grow import check_columns, grown_model, vocabulary_of
from slatewise_train.incremental.penalty import LEAST, Penalty, fisher
from slatewise_train.incremental.stability import overlap, rank_biased_overlap, top_lists
from slatewise_train.incremental.update import UpdateConfig, begin_with, update
from slatewise_train.incremental.windows import batches_of, new_windows, replayed_windows
from slatewise_train.rankers.weights import load_model
from slatewise_train.train import Trainer

if TYPE_CHECKING:
    from tests.conftest import Tiny

torch.set_num_threads(1)
HUGE = 1e12

counts = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)


@given(counts, st.integers(1, 12))
def test_each_new_event_is_learned_from_once(users: list[tuple[int, int]], longest: int) -> None:
    since = np.array([old for old, _ in users], np.int64)
    lengths = np.array([total for _, total in users], np.int64)
    learned = []
    for user, first, last, begin in new_windows(since, lengths, longest).tolist():
        assert 0 <= first <= begin < last <= lengths[user]
        assert last - first <= longest
        assert first == 0 or last - first == longest, "as much context as the ranker reads"
        learned += [(user, event) for event in range(begin, last)]
    expected = [(u, event) for u, (old, total) in enumerate(users) for event in range(old, total)]
    assert sorted(learned) == expected


@given(counts, st.integers(1, 12), st.integers(0, 100))
def test_replayed_windows_have_old_events_only(users: list[tuple[int, int]], longest: int, events: int) -> None:
    since = np.array([old for old, _ in users], np.int64)
    found = replayed_windows(since, longest, events, np.random.default_rng(0))
    sizes = found[:, 2] - found[:, 1]
    assert (found[:, 3] == found[:, 1]).all()
    assert (found[:, 2] <= since[found[:, 0]]).all()
    assert ((sizes >= 1) & (sizes <= longest)).all()
    assert len(set(found[:, 0].tolist())) == len(found)
    assert sizes.sum() >= min(events, np.minimum(since, longest).sum())
    assert not events or sizes[:-1].sum() < events


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 64))
def test_batches_hold_each_window_once_within_the_size(sizes: list[int], most: int) -> None:
    windows = np.array([[k, 0, size, 0] for k, size in enumerate(sizes)], np.int64)
    batches = list(batches_of(windows, most, np.random.default_rng(0)))
    assert sorted(row for batch in batches for row in batch[:, 0].tolist()) == list(range(len(sizes)))
    assert all(len(batch) == 1 or len(batch) * (batch[:, 2].max() + 1) <= most for batch in batches)


def test_context_has_no_loss(tiny: Tiny) -> None:
    """The loss of a window is that of its first positions, and that of the others with the first as context."""
    trainer = Trainer(tiny.trainer.data, copy.deepcopy(tiny.trainer.model), tiny.trainer.config)
    user = int(trainer.data.split.train_lengths.argmax())
    model = trainer.model.eval()
    table = model.item_table().detach()
    negatives = trainer.trained[:50]

    trainer.label_heads = []

    @torch.no_grad()
    def loss(first: int, last: int, begin: int) -> float:
        """The sum over the positions that count."""
        batch = make_batch(trainer.data.sequences, np.array([[user, first, last, begin]]))
        before = (slice(None), slice(-1))
        _, users = model.encode(model.tokens(table[batch.items[before]], batch.actions[before], batch.gaps[before]))
        return float(trainer.dot_loss(batch, users, table, negatives)) * (last - begin)

    assert loss(0, 20, 12) > 0
    assert loss(0, 20, 0) == pytest.approx(loss(0, 12, 0) + loss(0, 20, 12), rel=1e-5)


def test_slates_are_drawn_from_the_new_positions(tiny: Tiny) -> None:
    trainer = Trainer(tiny.trainer.data, copy.deepcopy(tiny.trainer.model), tiny.trainer.config)
    users = np.flatnonzero(trainer.data.split.train_lengths >= 20)
    batch = make_batch(trainer.data.sequences, np.array([[user, 2, 20, 15] for user in users]))
    width = trainer.model.config.width
    slates = trainer.draw_slates(batch, torch.zeros(len(users), 19, width), trainer.model.item_table().detach())
    assert (slates.read >= 13).all()
    assert (slates.read < 18).all()


def test_penalty_step_is_the_minimum_of_its_objective() -> None:
    """The reference minimizes distance / (2 rate) + penalty by many small steps."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    importance = {name: torch.rand_like(p) * 3 for name, p in layer.named_parameters()}
    old = {name: p.detach().clone() for name, p in layer.named_parameters()}
    penalty = Penalty(layer, 5.0, importance)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    penalty.pull(0.1)
    for name, parameter in layer.named_parameters():
        w = start[name].clone().requires_grad_()
        for _ in range(3000):
            cost = ((w - start[name]).square() / 0.2 + 2.5 * importance[name] * (w - old[name]).square()).sum()
            (gradient,) = torch.autograd.grad(cost, w)
            w = (w - 0.02 * gradient).detach().requires_grad_()
        torch.testing.assert_close(parameter.detach(), w.detach(), atol=1e-5, rtol=0)


def test_fisher_is_the_mean_square_of_gradients() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    rows = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    found, square = fisher(layer, (layer(row).sum() for row in rows))
    squares = rows.square().sum(0)
    torch.testing.assert_close(found["weight"][0], (squares / squares.mean()).clamp(min=LEAST))
    assert square == pytest.approx(float(rows.square().mean())), "of a batch and a weight"


def test_adam_begins_with_squares_of_the_past() -> None:
    """The first step is that of AdamW's formula with these squares, not one of equal size for all weights."""
    layer = torch.nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    squares, gradient = torch.tensor([[4.0, 1.0, 0.25]]), torch.tensor([[0.02, 1.0, -3.0]])
    begin_with(optimizer, layer, {"weight": squares})
    layer.weight.grad = gradient.clone()
    optimizer.step()
    moved = -0.1 * 0.1 * gradient / (0.98 * squares + 0.02 * gradient.square()).sqrt()
    torch.testing.assert_close(layer.weight.detach() - before, moved, atol=1e-6, rtol=1e-4)


def test_grown_model_without_new_names_scores_as_the_bundle(tiny: Tiny) -> None:
    manifest = read_manifest(tiny.folder)
    data = tiny.trainer.data
    assert vocabulary_of(tiny.folder, manifest) == data.catalogue.vocabulary
    model = grown_model(tiny.folder, manifest, data.catalogue)
    served = load_model(tiny.folder, manifest)
    torch.testing.assert_close(model.item_table(), served.item_table(), atol=1e-6, rtol=0)
    own = tiny.trainer.model.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, own[name], atol=1e-6, rtol=0)


def test_grown_model_has_rows_for_new_names(tiny: Tiny) -> None:
    manifest = read_manifest(tiny.folder)
    old = tiny.trainer.data.catalogue
    v = old.vocabulary
    vocabulary = TrainingVocabulary(
        [*v.items, "new-1"], [*v.actions, "share"], {name: [*values, "odd"] for name, values in v.fields.items()}
    )
    fields = {}
    for name, rows in old.field_values.items():
        row = np.zeros((1, rows.shape[1]), np.int64)
        row[0, 0] = len(v.fields[name]) + 1
        fields[name] = np.concatenate([rows, row])
    numeric = np.concatenate([old.numeric, np.full((1, old.numeric.shape[1]), np.nan, np.float32)])
    model = grown_model(tiny.folder, manifest, Catalogue(vocabulary, fields, numeric))
    table = model.item_table()
    torch.testing.assert_close(table[:-1], load_model(tiny.folder, manifest).item_table(), atol=1e-6, rtol=0)
    torch.testing.assert_close(table[-1], table[UNKNOWN_ITEM], atol=1e-6, rtol=0)
    actions = model.get_parameter("action.weight")
    assert torch.equal(actions[-1], actions[0])


def test_other_columns_are_refused_with_a_remedy(tiny: Tiny) -> None:
    other = dataclasses.replace(tiny.config.data, numeric=("year",))
    with pytest.raises(ValueError, match=r"numeric popularity, year, the TOML year: .*`slatewise train`"):
        check_columns(read_manifest(tiny.folder), other)


@pytest.mark.parametrize("importance", ["identity", "fisher"])
def test_huge_penalty_keeps_the_weights(tiny: Tiny, importance: str) -> None:
    trainer = Trainer(tiny.trainer.data, copy.deepcopy(tiny.trainer.model), tiny.trainer.config)
    before = copy.deepcopy(trainer.model.state_dict())
    since = np.maximum(trainer.data.split.train_lengths - 5, 0)
    config = UpdateConfig(1, 0.01, HUGE, importance, batch_events=1024)  # type: ignore[arg-type]
    assert update(trainer, since, config) > 0
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)
    users = np.flatnonzero(trainer.data.split.test_lengths)
    lengths = trainer.data.split.test_lengths[users]
    lists = [top_lists(model, trainer.data, users, lengths, 0) for model in (trainer.model, tiny.trainer.model)]
    np.testing.assert_array_equal(*lists)


def test_replay_never_reads_held_out_events(tiny: Tiny) -> None:
    """The weights after an update are the same if the held-out events are others."""
    data = tiny.trainer.data
    offsets, lengths = data.sequences.offsets, data.split.train_lengths
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    held_out = place >= np.repeat(lengths, np.diff(offsets))
    assert held_out.any()
    items = np.where(held_out, data.sequences.items[::-1], data.sequences.items)
    other = dataclasses.replace(data, sequences=dataclasses.replace(data.sequences, items=items))
    since = np.diff(offsets)  # all events are old, those that are held out too
    since[::2] = np.maximum(lengths[::2] - 5, 0)
    weights = []
    for part in (data, other):
        trainer = Trainer(part, copy.deepcopy(tiny.trainer.model), tiny.trainer.config)
        assert update(trainer, since, UpdateConfig(1, batch_events=1024)) > 0
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_update_without_new_events_changes_nothing(tiny: Tiny) -> None:
    trainer = Trainer(tiny.trainer.data, copy.deepcopy(tiny.trainer.model), tiny.trainer.config)
    before = copy.deepcopy(trainer.model.state_dict())
    assert update(trainer, trainer.data.split.train_lengths, UpdateConfig()) == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_update_keeps_what_a_meta_embedding_does(tiny: Tiny) -> None:
    trainer = Trainer(tiny.trainer.data, copy.deepcopy(tiny.trainer.model), tiny.trainer.config)
    model = trainer.model
    before = copy.deepcopy(model.state_dict())
    metas = torch.eye(model.meta_size)
    shift = model.meta_shift(metas).detach().clone()
    update(trainer, np.maximum(trainer.data.split.train_lengths - 5, 0), UpdateConfig(1, 0.01, 0.0))
    assert torch.equal(model.meta_shift(metas), shift)
    assert torch.equal(model.default_meta, before["default_meta"])
    assert not torch.equal(model.get_parameter("fusion.weight"), before["fusion.weight"])
    unseen = trainer.untrained
    ids = model.get_parameter("item.weight")
    assert torch.equal(ids[unseen], ids[UNKNOWN_ITEM].expand(len(unseen), -1))


def test_overlap_of_lists() -> None:
    one = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    other = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [5, 6, 7, 8]])
    assert overlap(one, other).tolist() == [1, 1, 0]
    equal, reverse, different = rank_biased_overlap(one, other)
    assert (equal, different) == (1, 0)
    weights = 0.9 ** np.arange(4)
    assert reverse == pytest.approx((np.array([0, 0, 2 / 3, 1]) * weights).sum() / weights.sum())


def test_top_lists_are_those_of_a_loop(tiny: Tiny) -> None:
    data, model = tiny.trainer.data, tiny.trainer.model
    users = np.flatnonzero(data.split.test_lengths)[:5]
    lengths = data.split.test_lengths[users]
    found = top_lists(model, data, users, lengths, 0)
    table = model.item_table().detach()
    for k, (user, length) in enumerate(zip(users.tolist(), lengths.tolist(), strict=True)):
        seen = data.sequences.items[data.sequences.offsets[user] :][:length]
        first = length - min(length, data.config.history_length)
        batch = make_batch(data.sequences, [(user, first, length)])
        if length <= data.config.history_length:
            with torch.no_grad():
                _, now = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
            scores = (table @ now[0, -1]).numpy() * model.dot_scale[0].item()
            scores[:FIRST_ITEM] = -np.inf
            scores[seen] = -np.inf
            assert set(found[k].tolist()) == set(np.argsort(-scores, kind="stable")[:10].tolist())
        assert not set(found[k].tolist()) & set(seen.tolist())
