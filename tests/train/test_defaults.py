"""Values that a TOML leaves out are chosen from the tables; values in the TOML stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from slatewise_train.config import Config, DataConfig, Head, ModelConfig, TablesConfig, TrainConfig
from slatewise_train.defaults import choose_split, choose_training
from slatewise_train.split import split_sequences

NEXT = Head("next", "next")
LIKE = Head("like", "label")


@dataclasses.dataclass(frozen=True)
class Times:
    offsets: np.ndarray
    timestamps: np.ndarray


def histories(lengths: list[int]) -> Times:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Times(offsets, np.arange(offsets[-1], dtype=float))


def config_of(heads: tuple[Head, ...] = (NEXT,), stated: frozenset[str] = frozenset(), **train: Any) -> Config:
    data = DataConfig("shop", heads)
    return Config(data, TablesConfig("e.csv"), train=TrainConfig(**train), stated=stated)


def test_short_histories_validate_with_one_event_of_many_users() -> None:
    sparse = histories([5, 6, 7, 9] * 2_000 + [300] * 40)
    chosen = choose_split(config_of().data, frozenset(), sparse)
    assert (chosen.history_length, chosen.slate_size, chosen.slate_users) == (32, 1, 0)
    assert chosen.validation_users == 2_000
    split = split_sequences(sparse, chosen)
    assert split.next_users.tolist() == split.validation_users.tolist()
    known = np.diff(sparse.offsets)[split.validation_users]
    assert np.median(known) <= 7, "the validation users are like all users"
    assert (split.train_lengths[split.validation_users] == known - 2).all()


def test_slates_fit_the_median_history() -> None:
    chosen = choose_split(config_of((NEXT, LIKE)).data, frozenset(), histories([41] * 300))
    assert (chosen.slate_size, chosen.slate_users, chosen.validation_users) == (10, 30, 60)
    long = choose_split(config_of((NEXT, LIKE)).data, frozenset(), histories([900] * 300))
    assert (long.history_length, long.slate_size) == (256, 20)


def test_stated_keys_of_the_split_stay() -> None:
    config = dataclasses.replace(config_of().data, slate_size=3, history_length=77)
    chosen = choose_split(config, frozenset({"split.slate_size", "split.history_length"}), histories([9] * 100))
    assert (chosen.slate_size, chosen.history_length, chosen.validation_users) == (3, 77, 50)
    assert choose_split(config, None, histories([9] * 100)) == config


def test_more_validation_users_than_exist_are_reduced(capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(config_of().data, validation_users=5_000, slate_size=1)
    chosen = choose_split(config, None, histories([6] * 50))
    assert chosen.validation_users == 50 and "5000 is reduced to 50" in capsys.readouterr().out


def test_long_slates_do_not_choose_the_validation_users() -> None:
    lengths = [6] * 300 + [40] * 20
    config = dataclasses.replace(config_of((NEXT, LIKE)).data, slate_size=20, validation_users=100)
    split = split_sequences(histories(lengths), config)
    assert len(split.validation_users) == 20 and len(split.next_users) == 100
    short = split.next_users[split.next_users < 300]
    assert len(short) > 80 and (split.train_lengths[short] == 4).all()
    assert (split.train_lengths[split.validation_users] == 19).all()
    assert (split.test_lengths == np.array(lengths) - 1).all()


def test_training_of_a_sparse_table_is_small_and_of_a_dense_one_larger(capsys: pytest.CaptureFixture[str]) -> None:
    sparse = choose_training(config_of(), np.full(22_000, 8), 12_000)
    dense = choose_training(config_of((NEXT, LIKE)), np.full(6_000, 160), 3_700)
    assert sparse.model.shape["blocks"] == 1 and dense.model.shape["blocks"] == 2
    assert sparse.model.shape["set_blocks"] == 0 and dense.model.shape["set_blocks"] == 1
    assert sparse.train.batch_events == 1024 < dense.train.batch_events
    assert sparse.train.learning_rate < dense.train.learning_rate
    assert sparse.train.epochs == 200 > dense.train.epochs
    assert sparse.train.patience and sparse.train.cascade_draw == "log"
    assert "[model]: width = " in capsys.readouterr().out


@pytest.mark.parametrize(("length", "share"), [(8, 0.5), (160, 0.0)])
def test_fields_of_short_histories_are_dropped_half_of_the_time(length: int, share: float) -> None:
    config = config_of()
    assert "field_dropout" not in choose_training(config, np.full(900, length), 500).model.shape, "no fields"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, categorical=("genres",)))
    assert choose_training(config, np.full(900, length), 500).model.shape["field_dropout"] == share


def test_stated_keys_of_model_and_training_stay() -> None:
    stated = frozenset({"train.epochs", "train.learning_rate", "model.width"})
    config = config_of(stated=stated, epochs=7, learning_rate=0.5)
    config = dataclasses.replace(config, model=ModelConfig("ligr", {"width": 24}))
    chosen = choose_training(config, np.full(100, 8), 500)
    assert (chosen.train.epochs, chosen.train.learning_rate, chosen.model.shape["width"]) == (7, 0.5, 24)
    assert chosen.train.cascade_epochs < 7


def test_one_event_is_enough_to_choose() -> None:
    data = choose_split(config_of().data, frozenset(), histories([2]))
    assert data.validation_users == 0
    assert choose_training(config_of(), np.array([1]), 1).train.batch_events >= 1
