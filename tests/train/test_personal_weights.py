"""Weights of a user's own: fit, prior, graphs, and the way from a training to the served scores."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import read_manifest
from slatewise_train.bundle_writer import FP32_BOUND
from slatewise_train.data import Sequences
from slatewise_train.evaluation.parity import OPTIONS, Requests, torch_logits
from slatewise_train.export import ExportOptions, export
from slatewise_train.meta import limaml
from slatewise_train.meta.limaml import MetaLearner, load_learner, save_learner, user_vectors
from slatewise_train.meta.personal_weights import (
    Examples,
    fit,
    learn_precision,
    losses,
    personal_weights,
    read_examples,
)
from slatewise_train.meta.tasks import RankerTables
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel, personal_features
from slatewise_train.rankers.weights import load_model
from tests.conftest import Tiny

LIKE = 1  # the head of kind `label`


@pytest.fixture
def tables(tiny: Tiny) -> RankerTables:
    model = tiny.trainer.model.with_personal_heads((LIKE,)).requires_grad_(False)
    return RankerTables(model, model.item_table(), torch.from_numpy(tiny.trainer.data.catalogue.numeric))


def draw_examples(users: int = 3, events: int = 12, size: int = 5, heads: int = 1) -> Examples:
    torch.manual_seed(0)
    features = torch.randn(users, events, size).double()
    labels = torch.randint(0, 2, (users, events, heads)).double()
    labels[0, :4] = torch.nan
    return Examples(features, torch.randn(users, events, heads).double(), labels)


@pytest.mark.parametrize("far", [1.0, 12.0])
def test_fit_is_the_maximum_of_the_posterior(far: float) -> None:
    """Each user and head against a general optimizer, also where the ranker is far from the labels."""
    examples = draw_examples(heads=2)
    examples = replace(examples, logits=far * examples.logits)
    precision = torch.rand(2, 5).double() + (0.5 if far == 1 else 0.05)
    found = fit(examples, precision)
    for user in range(3):
        for head in range(2):
            x, offset, label = (
                part.numpy()
                for part in (examples.features[user], examples.logits[user, :, head], examples.labels[user, :, head])
            )
            known = ~np.isnan(label)

            def loss(w: np.ndarray) -> float:
                z = (offset + x @ w)[known]  # noqa: B023
                penalty = 0.5 * (precision[head].numpy() * w**2).sum()  # noqa: B023
                return float(np.logaddexp(0, np.where(label[known] == 1, -z, z)).sum() + penalty)  # noqa: B023

            expected = minimize(loss, np.zeros(5), tol=1e-12).x
            np.testing.assert_allclose(found[user, head], expected, atol=1e-3)


def test_user_without_a_known_label_has_zero_weights() -> None:
    examples = draw_examples()
    examples.labels[1] = torch.nan
    found = fit(examples, torch.ones(1, 5).double())
    assert not found[1].any() and found[0].any()


def test_padding_is_no_example() -> None:
    examples = draw_examples()
    padded = Examples(
        *(torch.cat([torch.full_like(part[:, :2], fill), part], dim=1) for part, fill in zip(
            (examples.features, examples.logits, examples.labels), (7.0, 7.0, torch.nan), strict=True
        ))
    )  # fmt: skip
    precision = torch.ones(1, 5).double()
    torch.testing.assert_close(fit(padded, precision), fit(examples, precision))


def shown(model: RankerModel, hidden: Tensor, meta: Tensor) -> Tensor:
    return model.logits_by_exit(torch.zeros(*hidden.shape[:2], model.config.heads), hidden, meta=meta)["point"]


def test_weights_move_their_head_alone(tables: RankerTables) -> None:
    model = tables.ranker
    hidden = torch.randn(2, 6, model.hidden_size)
    default = model.default_vector().repeat(2, 1)
    weights = torch.randn(2, model.hidden_size + 1)
    meta = torch.cat([default[:, : model.meta_size], weights], dim=1)
    moved = shown(model, hidden, meta) - shown(model, hidden, default)
    assert not moved[..., 0].any()
    expected = torch.stack([personal_features(hidden[u]) @ weights[u] for u in range(2)])
    torch.testing.assert_close(moved[..., LIKE], expected, rtol=1e-4, atol=1e-5)


def test_examples_are_the_logits_of_a_request(tiny: Tiny, tables: RankerTables) -> None:
    """The newest example of a user, against the history before it with its item as the only candidate."""
    data = tiny.trainer.data
    s = data.sequences
    user, now = 3, 15
    examples = read_examples(tables, s, [(0, 4), (user, now)], data.config.history_length, 8, 0)
    assert examples.features.shape == (2, 8, tables.ranker.hidden_size + 1)
    assert examples.labels[0, :4].isnan().all(), "the first user has 4 events"
    start = int(s.offsets[user])
    np.testing.assert_array_equal(examples.labels[1, :, 0], s.labels[start + now - 8 : start + now, LIKE])
    cut = Sequences(
        [s.users[user]],
        np.array([0, now]),
        *(part[start : start + now] for part in (s.items, s.actions, s.timestamps, s.labels)),
    )
    alone = read_examples(tables, cut, [(0, now)], data.config.history_length, 1, 0)
    torch.testing.assert_close(examples.logits[1, -1:], alone.logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(examples.features[1, -1:], alone.features[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("differ", [True, False])
def test_precision_is_learned_where_users_differ(tiny: Tiny, tables: RankerTables, differ: bool) -> None:
    """Labels by a taste of each user in half of the cases, else by chance."""
    data = tiny.trainer.data
    s = data.sequences
    rng = np.random.default_rng(0)
    labels = s.labels.copy()
    generous = np.repeat(rng.random(len(s)) < 0.5, np.diff(s.offsets))
    labels[:, LIKE] = generous if differ else rng.random(len(labels)) < 0.5
    changed = replace(data, sequences=replace(s, labels=labels))
    precision = learn_precision(tables, changed, replace(tiny.config.meta, examples=20))
    if not differ:
        assert precision is None or precision.min() > 1.0
        return
    assert precision is not None and precision.shape == (1, tables.ranker.hidden_size + 1)
    weights = personal_weights(tables, precision, changed.sequences, data.config.history_length, 20)
    taste = np.array([generous[offset] for offset in s.offsets[:-1]])
    assert weights[taste, -1].mean() > 0 > weights[~taste, -1].mean(), "the last one is the bias"


@pytest.mark.parametrize("differ", [True, False])
def test_block_is_learned_where_weights_do_not_help(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differ: bool
) -> None:
    precision = torch.ones(1, tiny.trainer.model.hidden_size + 1) if differ else None
    monkeypatch.setattr(limaml, "learn_precision", lambda *_: precision)
    found = limaml.learn(tiny.trainer.model, tiny.trainer.data, replace(tiny.config.meta, epochs=1), tmp_path)
    assert found.precision is precision
    assert (tmp_path / "meta_log.csv").exists() != differ, "the block is trained, or not"


@pytest.fixture
def learner(tiny: Tiny) -> MetaLearner:
    learner = copy.deepcopy(tiny.learner)
    learner.precision = torch.full((1, tiny.trainer.model.hidden_size + 1), 0.1)
    return learner


def test_learner_keeps_its_precision_in_the_file(tmp_path: Path, learner: MetaLearner) -> None:
    save_learner(tmp_path / "block.npz", learner, ["next", "label"])
    loaded, _ = load_learner(tmp_path / "block.npz")
    assert loaded.precision is not None and learner.precision is not None
    torch.testing.assert_close(loaded.precision, learner.precision)
    learner.precision = None
    save_learner(tmp_path / "block.npz", learner, ["next", "label"])
    assert load_learner(tmp_path / "block.npz")[0].precision is None


def test_exported_bundle_serves_the_weights(tiny: Tiny, learner: MetaLearner, tmp_path: Path) -> None:
    folder = export(tiny.trainer, learner, tiny.config, tmp_path, 1, ExportOptions(most_users=20, force=True))
    manifest = read_manifest(folder)
    model = load_model(folder, manifest)
    assert model.config.personal_heads == (LIKE,)
    assert manifest.meta_size == model.vector_size == model.hidden_size + 1
    for name, difference in manifest.variants["fp32"].invariance.items():
        assert name in OPTIONS or difference <= FP32_BOUND, name
    ranker = load_bundle(folder)
    assert not ranker.default_meta.any()
    data = tiny.trainer.data
    kinds = [head.kind for head in data.config.heads]
    expected = user_vectors(learner, model, kinds, data.sequences, data.config.history_length)
    np.testing.assert_allclose(ranker.embedded_meta, expected, atol=2e-5)
    engine = ranker.engines["fp32"]
    draw = Requests(engine, manifest)
    history, candidates = draw.history(9), draw.candidates(12)
    scores = {}
    for name, meta in (("own", ranker.embedded_meta[0]), ("default", ranker.default_meta)):
        scores[name] = engine.point(candidates, meta, draw.state(history)).probabilities
        logits = torch_logits(model, engine.items, history, candidates, meta.copy())["point"]
        order = np.argsort(scores[name][:, LIKE])
        np.testing.assert_array_equal(order, np.argsort(logits[:, LIKE]), err_msg=name)
    moved = np.log(scores["own"] / (1 - scores["own"])) - np.log(scores["default"] / (1 - scores["default"]))
    assert np.ptp(moved[:, LIKE]) > 1e-3, "candidates are moved by different amounts"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_has_weights_of_the_users_own(family: str) -> None:
    sizes = {"items": 9, "actions": 3, "fields": {}, "numeric": 2, "heads": 3, "width": 8, "personal_heads": [0, 2]}
    model = families.build(family, sizes).eval()
    assert model.config.personal_heads == (0, 2)
    assert model.default_vector().shape == (model.meta_size + 2 * (model.hidden_size + 1),)
    hidden = torch.randn(1, 4, model.hidden_size)
    meta = torch.randn(1, model.vector_size)
    moved = shown(model, hidden, meta) - shown(model, hidden, model.default_vector()[None])
    assert moved[..., 0].any() and moved[..., 2].any() and not moved[..., 1].any()


def test_losses_ignore_unknown_labels() -> None:
    examples = draw_examples()
    found = losses(examples, torch.zeros(3, 1, 5).double())
    assert not found[0, :4].any() and (found[1:] > 0).all()
