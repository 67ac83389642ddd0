"""A bundle holds no user's id and no user's history, unless the TOML names demo users."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slatewise.bundle.loader import load_bundle
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from slatewise_train import bundle_writer
from slatewise_train.config import Config, DataConfig, DemoConfig, MetaConfig, ModelConfig, TablesConfig, TrainConfig
from slatewise_train.data import Data, load_data, read_table
from slatewise_train.demo.content import made_up_sequences
from slatewise_train.evaluation import parity
from slatewise_train.export import ExportOptions, export
from slatewise_train.meta.limaml import MetaTrainer
from slatewise_train.train import Trainer, train
from tests.support.application import serve
from tests.train.test_export import BUY, HELD_OUT, NEXT, train_shop
from tests.train.test_offline import make_data

PREFIX = "secret-customer-"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Any, Config, Path]:
    """A ranker with a meta block, of users with ids that a search finds."""
    folder = tmp_path_factory.mktemp("shop")
    train_shop(folder, DataConfig("shop", (NEXT, BUY), **HELD_OUT), items=90)
    events = read_table(folder / "events.csv")
    events.with_columns(
        user_id=PREFIX + events["user_id"], action=events["label_buy"].replace_strict({"0": "view", "1": "buy"})
    ).write_csv(folder / "events.csv")
    config = DataConfig("shop", (NEXT, BUY), numeric=("price",), **HELD_OUT)
    tables = TablesConfig(str(folder / "events.csv"), str(folder / "items.csv"))
    shape = {"width": 8, "blocks": 1, "attention_heads": 1, "set_blocks": 1, "meta_size": 4}
    short = TrainConfig(epochs=2, cascade_epochs=1, batch_events=256, negatives=16, warmup_steps=1)
    trainer = train(load_data(config, tables), ModelConfig("ligr", shape), short, folder / "with-actions")
    meta = MetaConfig(shortest=2, query=3, support=5, epochs=1)
    learner = MetaTrainer(trainer.model, trainer.data, meta).train(folder / "meta")
    return trainer, learner, Config(config, tables), folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
    monkeypatch.setattr(parity, "measure_parity", lambda *_: {"padding": 0.0})


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a bundle; archives are unpacked."""
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            yield path.name, content
            if zipfile.is_zipfile(io.BytesIO(content)):
                with zipfile.ZipFile(path) as archive:
                    yield from ((name, archive.read(name)) for name in archive.namelist())


def runs(items: list[str], length: int = 3) -> set[tuple[str, ...]]:
    return {tuple(items[k : k + length]) for k in range(len(items) - length + 1)}


def histories(data: Data) -> list[list[str]]:
    names = data.catalogue.vocabulary.items
    s = data.sequences
    return [
        [names[row - FIRST_ITEM] for row in s.items[first:last]]
        for first, last in zip(s.offsets, s.offsets[1:], strict=False)
    ]


@pytest.mark.parametrize("with_block", [True, False])
def test_bundle_contains_no_id_of_a_training_user(
    shop: tuple[Trainer, Any, Config, Path], tmp_path: Path, quick: None, with_block: bool
) -> None:
    trainer, learner, config, _ = shop
    options = ExportOptions(force=True)
    folder = export(trainer, learner if with_block else None, config, tmp_path, 1, options)
    names = set()
    for name, content in contents(folder):
        names.add(name)
        assert b"secret" not in content, name
    assert {"manifest.json", "warmup.jsonl", "report.json", "report.md", "weights.npz"} <= names
    assert ("users.json" in names) == with_block
    bundle = load_bundle(folder)
    assert list(bundle.embedded_users) == (["example-1"] if with_block else [])
    with serve(Settings(bundles=tmp_path)) as client:
        card = client.get("/models/shop")
        assert "secret" not in card.text
        answer = client.post("/rerank", json=card.json()["example"])
    assert answer.status_code == 200 and len(answer.json()["results"]["item_ids"]) >= 20
    assert answer.json()["meta_embedding"]["status"] == ("hit" if with_block else "off")


def test_requests_of_a_bundle_hold_no_history_of_a_user(
    shop: tuple[Trainer, Any, Config, Path], tmp_path: Path, quick: None
) -> None:
    trainer, learner, config, _ = shop
    folder = export(trainer, learner, config, tmp_path, 1, ExportOptions(force=True))
    example = json.loads((folder / "manifest.json").read_text())["example"]
    RankRequest.model_validate(example)
    assert example["user"] == "example-1"
    assert set(example["history"]["actions"]) <= {"view", "buy"}
    s = trainer.data.sequences
    assert not set(example["history"]["timestamps"]) & set(s.timestamps.tolist()), "times are invented"
    real = set().union(*(runs(items) for items in histories(trainer.data)))
    asked = [example, *map(json.loads, (folder / "warmup.jsonl").read_text().splitlines())]
    for request in asked:
        assert not runs([str(item) for item in request["history"]["item_ids"]]) & real


def test_named_demo_users_are_in_the_bundle(
    shop: tuple[Trainer, Any, Config, Path], tmp_path: Path, quick: None
) -> None:
    trainer, learner, config, folder = shop
    events = read_table(folder / "events.csv").filter(read_table(folder / "events.csv")["user_id"] == PREFIX + "u3")
    events.write_csv(tmp_path / "demo.csv")
    demo = DemoConfig(str(tmp_path / "demo.csv"), config.tables.items, "demo:")
    bundle = load_bundle(export(trainer, learner, replace(config, demo=demo), tmp_path, 1, ExportOptions(force=True)))
    assert list(bundle.embedded_users) == [f"demo:{PREFIX}u3"] and bundle.manifest.example["user"] == f"demo:{PREFIX}u3"
    for name, content in contents(tmp_path / "shop" / "1"):
        assert content.count(b"secret-customer-") == content.count(b"demo:secret-customer-u3"), name


def test_made_up_events_follow_popularity() -> None:
    data = make_data({f"u{u}": ["hit", f"rare{u}", "hit"] for u in range(300)}, ["never"])
    first = [made_up_sequences(data, np.random.default_rng(seed)) for seed in range(20)]
    hit = data.catalogue.vocabulary.items.index("hit") + FIRST_ITEM
    assert all(hit in made.items for made in first), "two of three events"
    never = data.catalogue.vocabulary.items.index("never") + FIRST_ITEM
    for made in first:
        assert never not in made.items and len(set(made.items.tolist())) == len(made.items) == 52
        assert (np.diff(made.timestamps) >= 60).all() and made.users == ["example-1"]
        assert set(made.labels[:, 1].tolist()) <= {0.0, 1.0}


def test_made_up_events_of_a_tiny_catalogue_are_few() -> None:
    made = made_up_sequences(make_data({"u": ["a", "b"], "v": ["a"]}, ["c"]), np.random.default_rng(0))
    assert len(made.items) == 2 and made.offsets.tolist() == [0, 2]
