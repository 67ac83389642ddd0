"""Fitted field vectors: the loss against a loop over events, vectors that stay, and fits that are not kept."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from slatewise.inference.arrays import UNKNOWN_ITEM
from slatewise_train import export
from slatewise_train.data import training_events
from slatewise_train.meta import fit_fields as module
from slatewise_train.meta.fit_fields import LABELS, FieldFit, fit_fields
from slatewise_train.meta.new_items import Positions, encode, point_logits
from slatewise_train.rankers.base import RankerModel
from slatewise_train.rankers.weights import serving_form
from tests.conftest import Tiny


@torch.no_grad()
def with_random_fields(model: RankerModel) -> RankerModel:
    """Return a copy with other field vectors, and the same vectors of all items."""
    model = copy.deepcopy(model).eval()
    table = model.item_table()
    generator = torch.Generator().manual_seed(0)
    for name in model.config.fields:
        model.field_table(name)[1:].normal_(std=1.0, generator=generator)
    model.get_parameter("item.weight").add_(table - model.item_table())
    return model


@torch.no_grad()
def slow_loss(fit: FieldFit, users: np.ndarray, items: np.ndarray, others: np.ndarray) -> tuple[float, int]:
    """Return the loss of the users' newest events and their number, one event after the other, without padding."""
    model, data = fit.model, fit.data
    table = model.item_table()
    cold = model.cold_item_vectors(table)
    trained = np.unique(training_events(data.sequences, data.split)[1])
    total, count = 0.0, 0
    for user in users.tolist():
        length = int(data.split.train_lengths[user])
        for place in range(max(0, length - module.EVENTS), length):
            event = int(data.sequences.offsets[user]) + place
            row = int(data.sequences.items[event])
            if row not in items:
                continue
            count += 1
            now = encode(model, data.sequences, Positions(np.array([user]), np.array([place])), length)
            label = torch.from_numpy(data.sequences.labels[event])
            point = point_logits(model, now, cold[[row]][None])[0, 0]
            if not label[1].isnan():
                total += LABELS * float(F.binary_cross_entropy_with_logits(point[1], label[1]))
            rivals = torch.logsumexp(table[trained] @ now.users[0] * model.dot_scale[0], dim=0)
            scores = cold @ now.users[0] * model.dot_scale[0]
            total += float(F.softplus(rivals - scores[row]))
            total += float(F.softplus(scores[others] - rivals).mean()) * len(trained)
    return total, count


def test_loss_equals_that_of_a_loop_over_events(tiny: Tiny) -> None:
    fit = FieldFit(with_random_fields(tiny.trainer.model), tiny.trainer.data)
    assert [head.kind for head in tiny.config.data.heads] == ["next", "label"]
    lengths = tiny.trainer.data.split.train_lengths
    short = np.flatnonzero((lengths > 0) & (lengths <= tiny.config.data.history_length))[:6]
    for items in (fit.fitted, fit.held_out):
        loss, count = fit.loss(fit.read(short), items, fit.fitted[:7])
        expected, expected_count = slow_loss(fit, short, items, fit.fitted[:7])
        assert count == expected_count > 0
        assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_fit_keeps_known_items_and_moves_others(tiny: Tiny) -> None:
    fit = FieldFit(tiny.trainer.model, tiny.trainer.data)
    cold = fit.model.cold_item_vectors(fit.table)
    fit.fit()
    after = fit.model.item_table()
    torch.testing.assert_close(after[fit.trained], fit.table[fit.trained], atol=1e-5, rtol=0)
    assert torch.equal(after[:2], fit.table[:2])  # the unknown item and the start token
    assert float((fit.model.cold_item_vectors(after) - cold)[fit.trained].abs().max()) > 0.01
    assert torch.equal(fit.model.get_parameter("item.weight")[UNKNOWN_ITEM], tiny.trainer.model.item.weight[0])


def test_fit_lowers_the_loss_of_items_without_a_part(tiny: Tiny) -> None:
    model = with_random_fields(tiny.trainer.model)
    fit = FieldFit(model, tiny.trainer.data)
    before = fit.held_out_loss()
    fit.fit()
    assert fit.held_out_loss() < before - 1
    assert not set(fit.held_out) & set(fit.fitted)
    fitted = fit_fields(model, tiny.trainer.data)
    for name in model.config.fields:
        assert torch.equal(fitted.field_table(name), fit.model.field_table(name))  # each fit draws the same numbers


def test_fit_that_does_harm_is_not_kept(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "RATE", 30.0)
    assert fit_fields(tiny.trainer.model, tiny.trainer.data) is tiny.trainer.model
    assert capsys.readouterr().out.endswith("not kept\n")


def test_ranker_without_fields_is_not_fitted(tiny: Tiny) -> None:
    model = serving_form(tiny.trainer.model)
    assert fit_fields(model, tiny.trainer.data) is model


@pytest.mark.parametrize("asked", [True, False])
def test_export_fits_fields_if_asked(asked: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = with_random_fields(tiny.trainer.model)
    monkeypatch.setattr(export, "fit_fields", lambda model, data: fitted)
    config = dataclasses.replace(tiny.config, export=dataclasses.replace(tiny.config.export, fit_fields=asked))
    content = export.make_content(tiny.trainer, None, config)
    expected = fitted if asked else tiny.trainer.model
    assert torch.equal(content.model.field_table("genres"), expected.field_table("genres"))
