"""Meta-learning: the inner loop against a loop over users, what a task may see, what the outer loop leaves alone, stop and resume."""

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
from slatewise_train.meta.limaml import (
    MetaConfig,
    MetaLearner,
    MetaTrainer,
    Tasks,
    event_losses,
    load_learner,
    make_tasks,
    save_learner,
    user_vectors,
)
from slatewise_train.rankers.ligr import Ligr
from tests.conftest import Tiny

KINDS = ["next", "label"]


@pytest.fixture
def model(tiny: Tiny) -> Ligr:
    return copy.deepcopy(tiny.trainer.model).eval().requires_grad_(False)


@pytest.fixture
def learner(tiny: Tiny) -> MetaLearner:
    """Drawn, not learned: every part of it does something."""
    torch.manual_seed(3)
    learner = MetaLearner(MetaConfig(code=6, steps=3, support=8), tiny.trainer.model.default_meta)
    for rates in learner.log_rates.values():
        torch.nn.init.uniform_(rates, -1.0, 0.5)
    return learner


def draw_tasks(tiny: Tiny, model: Ligr, cases: list[tuple[int, int]], support: int = 8, query: int = 4) -> Tasks:
    torch.manual_seed(0)
    data = tiny.trainer.data
    numeric = torch.from_numpy(data.catalogue.numeric)
    return make_tasks(
        model, model.item_table(), numeric, data.sequences, cases, data.config.history_length, support, query, 6
    )


CASES = [(0, 5), (1, 12), (2, 8), (3, 3)]  # (3, 3) and (0, 5) have fewer events than the support has columns


def adapt_slowly(learner: MetaLearner, model: Ligr, support: Tasks, user: int) -> dict[str, Tensor]:
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


def test_all_users_at_once_are_adapted_as_each_alone(tiny: Tiny, model: Ligr, learner: MetaLearner) -> None:
    support = draw_tasks(tiny, model, CASES).columns(0, 8)
    assert support.real.sum(1).tolist() == [5, 8, 8, 3]
    together = learner.adapt(model, KINDS, support)
    for user in range(len(CASES)):
        for name, expected in adapt_slowly(learner, model, support, user).items():
            torch.testing.assert_close(together[name][user], expected, rtol=1e-4, atol=1e-6)
    assert (learner.outputs(together) - model.default_meta).abs().amax(1).min() > 1e-3, "every user moved"


def test_the_inner_loop_descends(tiny: Tiny, model: Ligr) -> None:
    """With steps as short as they are where learning begins."""
    support = draw_tasks(tiny, model, CASES).columns(0, 8)
    fresh = MetaLearner(MetaConfig(code=6, support=8), model.default_meta)
    *inputs, real = support.tensors()

    def losses(vectors: Tensor) -> Tensor:
        return (event_losses(model, KINDS, vectors, *inputs) * real).sum(1).detach()

    assert (losses(fresh.vectors(model, KINDS, support)) < losses(model.default_meta.expand(len(CASES), -1))).all()


def test_first_order_through_the_last_step(tiny: Tiny, model: Ligr, learner: MetaLearner) -> None:
    """The outer gradient of what is learned is that of the adapted parameters: the inner gradients count as constants."""
    tasks = draw_tasks(tiny, model, CASES)
    adapted = learner.adapt(model, KINDS, tasks.columns(0, 8))
    *inputs, real = tasks.columns(8, 12).tensors()
    loss = (event_losses(model, KINDS, learner.outputs(adapted), *inputs) * real).sum()
    at_adapted = torch.autograd.grad(loss, adapted["inner.weight"], retain_graph=True)[0].sum(0)
    torch.testing.assert_close(torch.autograd.grad(loss, learner.block.inner.weight)[0], at_adapted)


def test_what_is_learned_leaves_the_ranker_and_the_default_vector_alone(tiny: Tiny) -> None:
    before = {name: value.clone() for name, value in tiny.trainer.model.state_dict().items()}
    trainer = MetaTrainer(tiny.trainer.model, tiny.trainer.data, MetaConfig(**tiny.toml["meta"]))
    code = trainer.learner.block.code.detach().clone()
    trainer.run_epoch()
    assert not torch.equal(trainer.learner.block.code, code)
    torch.testing.assert_close(
        trainer.learner.block().detach(), tiny.trainer.model.default_meta.detach(), rtol=0, atol=0
    )
    for name, value in tiny.trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad for parameter in tiny.trainer.model.parameters())


def test_a_task_is_what_the_ranker_says_of_the_event(tiny: Tiny, model: Ligr) -> None:
    """One event of a task against the served way of scoring: history up to it, the event's item as the candidate."""
    data = tiny.trainer.data
    (user, now) = CASES[1]
    tasks = draw_tasks(tiny, model, CASES)
    s = data.sequences
    start = int(s.offsets[user])
    for column, with_numeric in ((3, False), (9, True)):  # of the support, which has no request, and of the query
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


def test_a_support_does_not_see_what_comes_after(tiny: Tiny, model: Ligr) -> None:
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


def test_an_unknown_item_is_no_event_to_learn_from(tiny: Tiny, model: Ligr) -> None:
    sequences = tiny.trainer.data.sequences
    (user, now) = CASES[1]
    items = sequences.items.copy()
    items[sequences.offsets[user] + now - 2] = UNKNOWN_ITEM
    other = copy.copy(tiny.trainer)
    other.data = dataclasses.replace(tiny.trainer.data, sequences=dataclasses.replace(sequences, items=items))
    real = draw_tasks(dataclasses.replace(tiny, trainer=other), model, CASES).real
    assert real[1].tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]


def test_the_stored_vector_does_what_the_adapted_block_does(
    tiny: Tiny, ranker: Ranker, model: Ligr, learner: MetaLearner
) -> None:
    """B2: the live block in torch, and its vector through the store's bytes and the served graph."""
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
        "the vector says something"
    )
    hidden = torch.zeros(1, 30, model.config.width)
    torch.testing.assert_close(  # in torch: fused as the ranker fuses it, against what the inner loop added
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


def test_stopped_and_resumed_learns_the_same(tiny: Tiny, tmp_path: Path) -> None:
    def trainer(epochs: int) -> MetaTrainer:
        return MetaTrainer(tiny.trainer.model, tiny.trainer.data, MetaConfig(**tiny.toml["meta"] | {"epochs": epochs}))

    whole = trainer(2).train(tmp_path / "whole")
    first = trainer(2)
    first.run_epoch()
    first.save(tmp_path / "parts")
    resumed = trainer(2).train(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_a_checkpoint_of_another_ranker_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    MetaTrainer(tiny.trainer.model, tiny.trainer.data, MetaConfig(**tiny.toml["meta"])).save(tmp_path)
    other = copy.deepcopy(tiny.trainer.model)
    with torch.no_grad():
        other.user_norm.bias += 0.1
    with pytest.raises(ValueError, match="belongs to another ranker"):
        MetaTrainer(other, tiny.trainer.data, MetaConfig(**tiny.toml["meta"])).train(tmp_path)


def test_a_learner_comes_back_from_its_file(tiny: Tiny, model: Ligr, learner: MetaLearner, tmp_path: Path) -> None:
    save_learner(tmp_path / "meta_block.npz", learner, KINDS)
    loaded, kinds = load_learner(tmp_path / "meta_block.npz")
    assert kinds == KINDS and loaded.config == learner.config
    sequences = tiny.trainer.data.sequences
    expected = user_vectors(learner, model, KINDS, sequences, 128)
    np.testing.assert_array_equal(user_vectors(loaded, model, KINDS, sequences, 128), expected)
    np.testing.assert_array_equal(
        expected, user_vectors(learner, model, KINDS, sequences, 128), "drawn alike every time"
    )
    content = (tmp_path / "meta_block.npz").read_bytes()
    (tmp_path / "meta_block.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="no meta block"):
        load_learner(tmp_path / "meta_block.npz")


def test_no_user_with_events_enough_is_an_error_that_says_how_many(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="no user has 100005 training events"):
        MetaTrainer(tiny.trainer.model, tiny.trainer.data, MetaConfig(shortest=100_000, query=5))
