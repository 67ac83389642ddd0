"""Students: their initial weights come from the teacher, and distillation brings them closer to it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise_train.batches import make_batch
from slatewise_train.compression.distill import DistillConfig, Distiller, distill, encoded
from slatewise_train.compression.item_codes import LearnedCodes
from slatewise_train.config import ModelConfig, TrainConfig
from slatewise_train.losses import distillation_loss, listwise_kl
from slatewise_train.rankers.ligr import Ligr, LigrConfig
from slatewise_train.rankers.ligr_student import half, regroup, shrink
from slatewise_train.rankers.weights import serving_form
from slatewise_train.train import Trainer
from tests.conftest import Tiny
from tests.train.test_shown import load, random_events

torch.set_num_threads(1)


def make_teacher(**shape: int) -> Ligr:
    torch.manual_seed(1)
    given = {"width": 16, "blocks": 4, "attention_heads": 2, "set_blocks": 2, "meta_size": 4} | shape
    teacher = Ligr(LigrConfig(40, 4, {}, 2, 2, **given), {}, torch.full((2,), 2.0), torch.full((2,), 3.0))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return teacher.eval()


def test_shrink_to_the_same_shape_copies_the_teacher() -> None:
    teacher = make_teacher()
    student = shrink(teacher, {"blocks": 4, "key_heads": 2, "key_size": 8})
    wanted = teacher.state_dict()
    found = student.state_dict()
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)
        assert value.data_ptr() != found[name].data_ptr(), "and shares nothing with it"


@given(
    blocks=st.integers(1, 4),
    set_blocks=st.integers(1, 2),
    feed_forward=st.integers(1, 4),
    heads=st.sampled_from([(2, 2), (2, 1), (1, 1)]),
    key_size=st.sampled_from([2, 4, 8]),
)
@settings(max_examples=25, deadline=None)
def test_shrink_returns_a_student_of_the_shape(
    blocks: int, set_blocks: int, feed_forward: int, heads: tuple[int, int], key_size: int
) -> None:
    teacher = make_teacher()
    shape = {
        "blocks": blocks,
        "set_blocks": set_blocks,
        "feed_forward": feed_forward,
        "attention_heads": heads[0],
        "key_heads": heads[1],
        "key_size": key_size,
    }
    student = shrink(teacher, shape)
    assert {name: getattr(student.config, name) for name in shape} == shape
    for name in (
        "item.weight",
        "action.weight",
        "gap.weight",
        "fusion.weight",
        "point_up.weight",
        "set_out.weight",
        "numeric_mean",
        "default_meta",
    ):
        torch.testing.assert_close(student.state_dict()[name], teacher.state_dict()[name])
    state, users = student.encode(
        student.tokens(
            student.item.weight[None, :9], torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)
        )
    )
    assert (
        len(state) == blocks
        and state[0][0].shape == (1, heads[1], 9, key_size)
        and state[0][1].shape == (1, heads[1], 9, 16 // heads[0])
    )
    hidden = student.hidden(student.item.weight[None, 9:20], state, torch.tensor([9]), None, torch.zeros(1, 11, 16))
    assert torch.isfinite(student.set_logits(hidden)).all() and users.shape == (1, 9, 16)


def test_shrink_takes_evenly_spaced_blocks() -> None:
    teacher = make_teacher()
    student = shrink(teacher, {"blocks": 2})
    for k, original in enumerate((0, 2)):
        torch.testing.assert_close(student.blocks[k].up.weight, teacher.blocks[original].up.weight)


@pytest.mark.parametrize(
    ("teacher", "shape", "expected"),
    [
        ({}, {"decoder_blocks": 1}, (4, 1)),
        ({}, {"blocks": 2}, (2, 2)),
        ({"decoder_blocks": 1}, {"feed_forward": 2}, (4, 1)),
        ({"decoder_blocks": 3}, {"blocks": 2}, (2, 2)),
        ({"decoder_blocks": 3}, {"blocks": 3, "decoder_blocks": 2}, (3, 2)),
    ],
)
def test_student_has_at_most_the_decoder_blocks_of_its_teacher(
    teacher: dict[str, int], shape: dict[str, int], expected: tuple[int, int]
) -> None:
    config = shrink(make_teacher(**teacher), shape).config
    assert (config.blocks, config.blocks - config.first_decoder_block) == expected


def test_shrink_copies_hidden_units_of_largest_norm() -> None:
    teacher = make_teacher(blocks=1)
    with torch.no_grad():
        teacher.blocks[0].down.weight[:, ::2] *= 1e-3
    student = shrink(teacher, {"feed_forward": 2})
    torch.testing.assert_close(student.blocks[0].up.weight, teacher.blocks[0].up.weight[1::2])
    torch.testing.assert_close(student.blocks[0].down.weight, teacher.blocks[0].down.weight[:, 1::2])


def test_regroup_selects_the_frequencies_of_a_smaller_head() -> None:
    rows = torch.arange(16.0)[:, None]  # two heads of 8: pairs (0, 4), (1, 5), ... and (8, 12), ...
    assert regroup(rows, 2, 2, 8, 4)[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert regroup(rows, 2, 1, 8, 8)[:, 0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11], "shared heads are averaged"
    before, after = (10_000.0 ** (-np.arange(half) / half) for half in (4, 2))
    np.testing.assert_allclose(before[::2], after)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"width": 8}, "has its teacher's width"),
        ({"blocks": 5}, "blocks = 4"),
        ({"blocks": 0}, "blocks = 4"),
        ({"decoder_blocks": 5}, "decoder_blocks = 4"),
        ({"blocks": 1, "decoder_blocks": 2}, "must not be more than blocks = 1"),
        ({"key_size": 16}, "key_size = 8"),
        ({"key_size": 3}, "must be even"),
        ({"key_heads": 3}, "key_heads = 2"),
        ({"attention_heads": 3, "key_heads": 1}, "attention_heads = 2"),
    ],
)
def test_shrink_to_impossible_shape_is_refused(shape: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        shrink(make_teacher(), shape)


def test_shrink_to_a_count_that_splits_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="must divide"):
        shrink(make_teacher(attention_heads=4), {"key_heads": 3})
    with pytest.raises(ValueError, match="keeps its attention_heads"):
        shrink(make_teacher(attention_heads=4, key_heads=2), {"attention_heads": 2})


@pytest.mark.parametrize("key_heads", [1, 2])
def test_shrink_of_equal_key_heads_does_not_change_output(key_heads: int) -> None:
    """The mean of equal heads equals each head."""
    teacher = make_teacher(attention_heads=4, blocks=1)
    with torch.no_grad():
        for layer in (teacher.blocks[0].key, teacher.blocks[0].value):
            for part in (layer.weight, layer.bias):
                heads = part.unflatten(0, (key_heads, 4 // key_heads, -1))
                part.copy_(heads[:, :1].expand_as(heads).flatten(0, 2))
    student = shrink(teacher, {"key_heads": key_heads})
    x = torch.randn(1, 9, 16)
    for one, other in zip(*(model.encode(x)[1] for model in (teacher, student)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_default_student_has_half_of_each_size() -> None:
    assert half(make_teacher().config) == {"blocks": 2, "feed_forward": 2, "key_size": 4}
    least = make_teacher(blocks=1, feed_forward=1)
    assert shrink(least, half(least.config)).config.blocks == 1


def test_distillation_loss_of_equal_logits_is_zero() -> None:
    logits = 3 * torch.randn(5, 7, 2)
    assert abs(distillation_loss(logits, logits)) < 1e-6 and distillation_loss(logits + 1, logits) > 0
    assert abs(listwise_kl(logits + 1, logits)) < 1e-6, "a shift changes scores and no order"
    assert listwise_kl(-logits, logits) > listwise_kl(0.9 * logits, logits) > 0


@pytest.fixture
def trainer(tiny: Tiny) -> Trainer:
    """A trainer of the tiny ranker in serving form, as a bundle gives it."""
    model = serving_form(tiny.trainer.model)
    return Trainer(tiny.trainer.data, model, tiny.config.train)


CONFIG = DistillConfig(
    epochs=3, batch_events=1024, positions=128, items=256, windows=8, warmup_steps=2, learning_rate=0.01
)
VECTORS = np.random.default_rng(0).normal(0, 0.3, (10, 8)).astype(np.float32)


def test_distill_changes_neither_teacher_nor_item_table(trainer: Trainer, tmp_path: Path) -> None:
    student = shrink(trainer.model, {"blocks": 1, "feed_forward": 1})
    teacher = copy.deepcopy(trainer.model.state_dict())
    items = student.item.weight.detach().clone()
    losses = distill(student, trainer, VECTORS, CONFIG, tmp_path / "student.pt")
    assert len(losses) == 3 and losses[-1] < 0.7 * losses[0]
    torch.testing.assert_close(student.item.weight.detach(), items, rtol=0, atol=0)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, teacher[name], rtol=0, atol=0)


def test_distillation_loss_of_a_copy_of_the_teacher_is_zero(trainer: Trainer) -> None:
    distiller = Distiller(copy.deepcopy(trainer.model), trainer, VECTORS, CONFIG)
    assert abs(float(distiller.loss([(user, 0, 20) for user in range(10)]).detach())) < 1e-5


def test_distillation_trains_a_table_of_codes(trainer: Trainer, tmp_path: Path) -> None:
    """It gives the same codes after a stop, and leaves the teacher's table."""
    items = trainer.model.item_table().detach().clone()

    def learn(config: DistillConfig, name: str) -> tuple[list[float], np.ndarray]:
        codes = LearnedCodes(items.numpy(), np.zeros((0, items.shape[1]), np.float32))
        student = copy.deepcopy(trainer.model)
        return distill(student, trainer, VECTORS, config, tmp_path / name, codes), codes.record()

    losses, whole = learn(CONFIG, "whole.pt")
    assert losses[-1] < 0.8 * losses[0]
    start = LearnedCodes(items.numpy(), np.zeros((0, items.shape[1]), np.float32)).record()
    assert (start["codes"] != whole["codes"]).any()
    again = learn(CONFIG, "whole.pt")
    assert again[0] == losses and (again[1]["codes"] == whole["codes"]).all()
    torch.testing.assert_close(trainer.model.item_table(), items, rtol=0, atol=0)


def test_checkpoint_of_codes_belongs_to_their_coordinates(trainer: Trainer) -> None:
    items = trainer.model.item_table().detach().numpy()
    none = np.zeros((0, items.shape[1]), np.float32)
    tables = [LearnedCodes(items, users) for users in (none, none, items[:30])]
    found = [Distiller(copy.deepcopy(trainer.model), trainer, VECTORS, CONFIG, table).identity for table in tables]
    assert found[0] == found[1] != found[2]


def test_recovery_on_the_task_lowers_its_loss(trainer: Trainer, tmp_path: Path) -> None:
    """It trains the student alone, with the training's own loss, and gives the same student after a stop."""
    student = shrink(trainer.model, {"feed_forward": 1})
    teacher = copy.deepcopy(trainer.model.state_dict())
    items = student.item.weight.detach().clone()
    again = copy.deepcopy(student)
    task = dataclasses.replace(CONFIG, loss="task")
    losses = distill(student, trainer, VECTORS, task, tmp_path / "student.pt")
    assert losses[-1] < losses[0] and not student.training
    torch.testing.assert_close(student.item.weight.detach(), items, rtol=0, atol=0)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, teacher[name], rtol=0, atol=0)
    assert distill(again, trainer, VECTORS, task, tmp_path / "student.pt") == losses, "the finished checkpoint"
    for name, value in student.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_recovery_on_the_task_learns_from_shown_slates(tmp_path: Path) -> None:
    """The weights of its loss for the position in a slate are trained and kept in the checkpoint."""
    data = load(tmp_path, random_events(0).with_columns(position=1 + pl.int_range(pl.len()) % 4))
    shape = {"width": 8, "blocks": 1, "attention_heads": 1, "set_blocks": 1, "meta_size": 4}
    trainer = Trainer(data, ModelConfig("ligr", shape), TrainConfig(cascade_positions=2, position_bias=True))
    task = dataclasses.replace(CONFIG, epochs=1, loss="task")
    distiller = Distiller(copy.deepcopy(trainer.model), trainer, np.zeros((1, 4), np.float32), task)
    assert distiller.shown is not None and distiller.task is not None
    before = copy.deepcopy(distiller.shown.state_dict())
    distiller.run_epoch()
    after = distiller.shown.state_dict()
    assert before and any(not torch.equal(after[name], value) for name, value in before.items())
    distill(copy.deepcopy(trainer.model), trainer, np.zeros((1, 4), np.float32), task, tmp_path / "student.pt")
    kept = torch.load(tmp_path / "student.pt", weights_only=True)["shown"]
    assert all(torch.equal(kept[name], value) for name, value in after.items())


def test_distillation_learns_from_slates_that_were_shown(tmp_path: Path) -> None:
    data = load(tmp_path, random_events(0))
    shape = {"width": 8, "blocks": 1, "attention_heads": 1, "set_blocks": 1, "meta_size": 4}
    trainer = Trainer(data, ModelConfig("ligr", shape), TrainConfig(cascade_positions=2, cascade_negatives=3))
    for name in ("point_down.weight", "set_out.weight"):  # zero before training
        torch.nn.init.normal_(trainer.model.get_parameter(name))
    student = copy.deepcopy(trainer.model.eval())
    distiller = Distiller(student, trainer, np.zeros((1, 4), np.float32), CONFIG)
    assert trainer.shown is not None
    batch = make_batch(data.sequences, [(user, 0, int(n)) for user, n in enumerate(data.split.train_lengths) if n])
    shown = trainer.shown.draw(batch)
    assert shown is not None and not shown.slates.exists.all(), "slates of two lengths"
    read = encoded(trainer.model, batch, distiller.table)
    assert [float(loss.detach()) for loss in distiller.slate_losses(batch, read, read)] == [
        pytest.approx(0, abs=1e-5)
    ] * 4, "point and set of drawn slates, then of shown ones"
    rows = read.take(shown.rows)
    with torch.no_grad():
        student.get_parameter("point_down.weight").mul_(2)
    losses = []
    for padding in (0.0, 5.0):  # the vector of the item row that stands for padding
        distiller.table[0] = padding
        torch.manual_seed(0)
        exists = shown.slates.exists[:, 0]
        losses.append([float(loss.detach()) for loss in distiller.exit_losses(shown.slates, rows, rows, exists)])
    assert losses[0] == losses[1] and min(losses[0]) > 1e-4


def test_resumed_distillation_gives_the_same_student(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"blocks": 1, "key_size": 4}
    whole = shrink(trainer.model, shape)
    stopped = shrink(trainer.model, shape)
    losses = distill(whole, trainer, VECTORS, CONFIG, tmp_path / "whole.pt")
    with monkeypatch.context() as patch:
        original = Distiller.run_epoch
        calls = []

        def twice(distiller: Distiller) -> float:
            if calls.append(0) or len(calls) > 2:
                raise KeyboardInterrupt
            return original(distiller)

        patch.setattr(Distiller, "run_epoch", twice)
        with pytest.raises(KeyboardInterrupt):
            distill(stopped, trainer, VECTORS, CONFIG, tmp_path / "stopped.pt")
    again = shrink(trainer.model, shape)
    assert distill(again, trainer, VECTORS, CONFIG, tmp_path / "stopped.pt") == losses
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)
    assert not list(tmp_path.glob("*.part"))


def test_distill_replaces_a_checkpoint_of_other_work(trainer: Trainer, tmp_path: Path) -> None:
    checkpoint = tmp_path / "student.pt"
    distill(shrink(trainer.model, {"blocks": 1}), trainer, VECTORS, CONFIG, checkpoint)
    losses = distill(shrink(trainer.model, {"blocks": 1, "key_size": 4}), trainer, VECTORS, CONFIG, checkpoint)
    assert len(losses) == 3 and losses[0] > 0
