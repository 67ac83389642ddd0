"""Meta-learning: the inner loop against a loop over users, the content of a task, the outer loop, stop and resume."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from slatewise.bundle.features import gap_buckets, request_context
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM, Candidates, History
from slatewise.store.codec import pack, unpack
from slatewise_train.config import MetaConfig
from slatewise_train.meta.limaml import MetaLearner, MetaTrainer, load_learner, save_learner, user_vectors
from slatewise_train.meta.tasks import RankerTables, Tasks, event_losses, make_tasks
from slatewise_train.rankers.base import RankerModel
from tests.conftest import Tiny

KINDS = ["next", "label"]


@pytest.fixture
def model(tiny: Tiny) -> RankerModel:
    return copy.deepcopy(tiny.trainer.model).eval().requires_grad_(False)


@pytest.fixture
def learner(tiny: Tiny) -> MetaLearner:
    """Random weights, so that every part has an effect."""
    torch.manual_seed(3)
    learner = MetaLearner(MetaConfig(code=6, steps=3, support=8), tiny.trainer.model.default_meta)
    for rates in learner.log_rates.values():
        torch.nn.init.uniform_(rates, -1.0, 0.5)
    return learner


def draw_tasks(tiny: Tiny, model: RankerModel, cases: list[tuple[int, int]], support: int = 8, query: int = 4) -> Tasks:
    torch.manual_seed(0)
    data = tiny.trainer.data
    tables = RankerTables(model, model.item_table(), torch.from_numpy(data.catalogue.numeric))
    config = MetaConfig(support=support, query=query, negatives=6)
    return make_tasks(tables, data.sequences, cases, data.config.history_length, config)


CASES = [(0, 5), (1, 12), (2, 8), (3, 3)]  # (0, 5) and (3, 3) have fewer events than the support


def adapt_slowly(learner: MetaLearner, model: RankerModel, support: Tasks, user: int) -> dict[str, Tensor]:
    """The inner loop of one user, event by event."""
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in learner.block.named_parameters()}
    for step in range(learner.config.steps):
        vector = functional_call(learner.block, parameters, ())
        loss = torch.zeros(())
        for p in range(support.real.shape[1]):
            if support.real[user, p]:
                logits = support.dot[user, p] + model.point_logits(support.base[user, p] + model.meta_shift(vector))
                loss = loss + torch.logsumexp(logits[:, 0] + support.offset[user, p], 0) - logits[0, 0]
                if not support.labels[user, p, 1].isnan():
                    loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(
                        logits[0, 1], support.labels[user, p, 1]
                    )
        slopes = torch.autograd.grad(loss / learner.config.support, list(parameters.values()))
        rates = [learner.log_rates[name.replace(".", "_")][step].exp() for name in parameters]
        parameters = {
            n: (p - r * g).detach().requires_grad_(True)
            for (n, p), r, g in zip(parameters.items(), rates, slopes, strict=True)
        }
    return parameters


def test_users_adapted_together_equal_each_user_alone(tiny: Tiny, model: RankerModel, learner: MetaLearner) -> None:
    support = draw_tasks(tiny, model, CASES).columns(0, 8)
    assert support.real.sum(1).tolist() == [5, 8, 8, 3]
    together = learner.adapt(model, KINDS, support)
    for user in range(len(CASES)):
        for name, expected in adapt_slowly(learner, model, support, user).items():
            torch.testing.assert_close(together[name][user], expected, rtol=1e-4, atol=1e-6)
    assert (learner.outputs(together) - model.default_meta).abs().amax(1).min() > 1e-3, "every user is adapted"


def test_adapt_lowers_the_support_loss(tiny: Tiny, model: RankerModel) -> None:
    """The step sizes are the initial ones."""
    support = draw_tasks(tiny, model, CASES).columns(0, 8)
    fresh = MetaLearner(MetaConfig(code=6, support=8), model.default_meta)
    *inputs, real = support.tensors()

    def losses(vectors: Tensor) -> Tensor:
        return (event_losses(model, KINDS, vectors, *inputs) * real).sum(1).detach()

    assert (losses(fresh.vectors(model, KINDS, support)) < losses(model.default_meta.expand(len(CASES), -1))).all()


def test_outer_gradient_is_first_order(tiny: Tiny, model: RankerModel, learner: MetaLearner) -> None:
    """The gradient of the initialisation is that of the adapted parameters: inner gradients count as constants."""
    tasks = draw_tasks(tiny, model, CASES)
    adapted = learner.adapt(model, KINDS, tasks.columns(0, 8))
    *inputs, real = tasks.columns(8, 12).tensors()
    loss = (event_losses(model, KINDS, learner.outputs(adapted), *inputs) * real).sum()
    at_adapted = torch.autograd.grad(loss, adapted["inner.weight"], retain_graph=True)[0].sum(0)
    torch.testing.assert_close(torch.autograd.grad(loss, learner.block.inner.weight)[0], at_adapted)


def test_meta_epoch_does_not_change_ranker_or_default(tiny: Tiny) -> None:
    before = {name: value.clone() for name, value in tiny.trainer.model.state_dict().items()}
    trainer = MetaTrainer(tiny.trainer.model, tiny.trainer.data, tiny.config.meta)
    code = trainer.learner.block.code.detach().clone()
    trainer.run_epoch()
    assert not torch.equal(trainer.learner.block.code, code)
    torch.testing.assert_close(
        trainer.learner.block().detach(), tiny.trainer.model.default_meta.detach(), rtol=0, atol=0
    )
    for name, value in tiny.trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad for parameter in tiny.trainer.model.parameters())


def test_task_equals_the_ranker_called_for_each_event(tiny: Tiny, model: RankerModel) -> None:
    """An event of a task against a request: the history before it, and its item as the only candidate."""
    data = tiny.trainer.data
    (user, now) = CASES[1]
    tasks = draw_tasks(tiny, model, CASES)
    s = data.sequences
    start = int(s.offsets[user])
    for column, with_numeric in (
        (3, False),
        (9, True),
    ):  # an event of the support, which has no request, and one of the query
        event = now - 8 + column
        read = slice(start, start + event)
        history = torch.cat([torch.tensor([1]), torch.from_numpy(s.items[read])])[None]
        actions = torch.cat([torch.tensor([0]), torch.from_numpy(s.actions[read])])[None]
        gaps = torch.cat([torch.tensor([0]), torch.from_numpy(gap_buckets(s.timestamps[read]))])[None]
        state, users = model.encode(model.tokens(model.item_table()[history], actions, gaps))
        item = torch.tensor([[int(s.items[start + event])]])
        numeric = torch.from_numpy(data.catalogue.numeric)[item] if with_numeric else torch.full((1, 1, 2), torch.nan)
        context = torch.from_numpy(request_context(float(s.timestamps[start + event - 1])))[None, None]
        fused = model.fuse(numeric, model.default_meta, context)
        vector = model.item_table()[item]
        hidden = model.hidden(vector, state, torch.tensor([event + 1]), None, fused)
        shifted = tasks.base[1, column, :1] + model.meta_shift(model.default_meta)
        torch.testing.assert_close(shifted, hidden[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            tasks.dot[1, column, :1], model.dot_logits(users[:, -1:], vector)[0], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(tasks.labels[1, column], s.labels[start + event])


def test_support_does_not_depend_on_later_events(tiny: Tiny, model: RankerModel) -> None:
    before = draw_tasks(tiny, model, CASES)
    sequences = tiny.trainer.data.sequences
    (user, now) = CASES[1]
    items = sequences.items.copy()
    items[sequences.offsets[user] + now : sequences.offsets[user + 1]] = FIRST_ITEM + 3
    other = copy.copy(tiny.trainer)
    other.data = dataclasses.replace(tiny.trainer.data, sequences=dataclasses.replace(sequences, items=items))
    after = draw_tasks(dataclasses.replace(tiny, trainer=other), model, CASES)
    for one, two in zip(before.columns(0, 8).tensors(), after.columns(0, 8).tensors(), strict=True):
        torch.testing.assert_close(
            one[:, :, 0] if one.ndim > 2 else one, two[:, :, 0] if two.ndim > 2 else two, equal_nan=True
        )
    assert not torch.equal(before.columns(8, 12).base, after.columns(8, 12).base)


def test_task_ignores_events_of_unknown_items(tiny: Tiny, model: RankerModel) -> None:
    sequences = tiny.trainer.data.sequences
    (user, now) = CASES[1]
    items = sequences.items.copy()
    items[sequences.offsets[user] + now - 2] = UNKNOWN_ITEM
    other = copy.copy(tiny.trainer)
    other.data = dataclasses.replace(tiny.trainer.data, sequences=dataclasses.replace(sequences, items=items))
    real = draw_tasks(dataclasses.replace(tiny, trainer=other), model, CASES).real
    assert real[1].tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]


def test_stored_vector_gives_the_scores_of_the_adapted_block(
    tiny: Tiny, ranker: Ranker, model: RankerModel, learner: MetaLearner
) -> None:
    """Compare the adapted block in torch with its vector, read from the store and scored by the served graph."""
    data = tiny.trainer.data
    (user, now) = CASES[1]
    support = draw_tasks(tiny, model, CASES).columns(0, 8)
    adapted = {name: p[1].detach() for name, p in learner.adapt(model, KINDS, support).items()}
    s = data.sequences
    start = int(data.sequences.offsets[user])
    read = slice(start, start + now)
    rows = np.arange(FIRST_ITEM, FIRST_ITEM + 30)
    engine = ranker.engines["fp32"]
    context = request_context(float(s.timestamps[start + now - 1]))[None]
    history = History(s.items[read], s.actions[read], gap_buckets(s.timestamps[read]))
    candidates = Candidates(ranker.items[rows], data.catalogue.numeric[rows], context)
    vector = functional_call(learner.block, adapted, ()).numpy()
    stored, generation, _ = unpack(pack(vector, 7, 1.0), len(vector))
    assert generation == 7
    state = engine.extend(engine.start, history)
    served = engine.point(candidates, stored, state).probabilities
    np.testing.assert_allclose(served, engine.point(candidates, vector, state).probabilities, rtol=0, atol=1e-6)
    assert np.abs(served - engine.point(candidates, ranker.default_meta, state).probabilities).max() > 1e-4, (
        "the vector has an effect"
    )
    hidden = torch.zeros(1, 30, model.config.width)
    torch.testing.assert_close(  # the ranker's late fusion, against the shift that the inner loop adds
        model.fuse(
            torch.from_numpy(candidates.numeric)[None],
            functional_call(learner.block, adapted, ()),
            torch.from_numpy(context)[None],
        ),
        hidden
        + model.fuse(
            torch.from_numpy(candidates.numeric)[None],
            torch.zeros(model.config.meta_size),
            torch.from_numpy(context)[None],
        )
        + model.meta_shift(torch.from_numpy(stored)),
        rtol=0,
        atol=1e-6,
    )


def test_resumed_meta_training_equals_uninterrupted(tiny: Tiny, tmp_path: Path) -> None:
    def trainer(epochs: int) -> MetaTrainer:
        return MetaTrainer(tiny.trainer.model, tiny.trainer.data, dataclasses.replace(tiny.config.meta, epochs=epochs))

    whole = trainer(2).train(tmp_path / "whole")
    first = trainer(2)
    first.run_epoch()
    first.save(tmp_path / "parts")
    resumed = trainer(2).train(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_checkpoint_of_another_ranker_raises(tiny: Tiny, tmp_path: Path) -> None:
    MetaTrainer(tiny.trainer.model, tiny.trainer.data, tiny.config.meta).save(tmp_path)
    other = copy.deepcopy(tiny.trainer.model)
    with torch.no_grad():
        other.user_norm.bias += 0.1
    with pytest.raises(ValueError, match="belongs to another ranker"):
        MetaTrainer(other, tiny.trainer.data, tiny.config.meta).train(tmp_path)


def test_saved_learner_is_loaded_unchanged(
    tiny: Tiny, model: RankerModel, learner: MetaLearner, tmp_path: Path
) -> None:
    save_learner(tmp_path / "meta_block.npz", learner, KINDS)
    loaded, kinds = load_learner(tmp_path / "meta_block.npz")
    assert kinds == KINDS and loaded.config == learner.config
    sequences = tiny.trainer.data.sequences
    expected = user_vectors(learner, model, KINDS, sequences, 128)
    np.testing.assert_array_equal(user_vectors(loaded, model, KINDS, sequences, 128), expected)
    np.testing.assert_array_equal(
        expected, user_vectors(learner, model, KINDS, sequences, 128), "the same negatives each time"
    )
    content = (tmp_path / "meta_block.npz").read_bytes()
    (tmp_path / "meta_block.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="no meta block"):
        load_learner(tmp_path / "meta_block.npz")


def test_meta_trainer_without_long_histories_raises(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="no user has 100005 training events"):
        MetaTrainer(tiny.trainer.model, tiny.trainer.data, MetaConfig(shortest=100_000, query=5))
