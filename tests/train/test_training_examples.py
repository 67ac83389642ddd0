"""The three examples for training: their TOMLs, on a small part of MovieLens latest-small, up to a served request."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import torch

from slatewise import cli
from slatewise.settings import Settings
from slatewise_train import bundle_writer
from slatewise_train.config import read_config
from slatewise_train.data import Data, load_data
from slatewise_train.demo import movielens
from slatewise_train.evaluation import parity
from tests.support.application import serve

ROOT = Path(__file__).parents[2]
PART = ROOT / "tests" / "data" / "ml-latest-small"
TOMLS = {
    "ratings": ROOT / "models" / "movielens.toml",
    "baskets": ROOT / "examples" / "baskets.toml",
    "exposures": ROOT / "examples" / "exposures.toml",
}
SHORT = {
    "model": "width = 16\nblocks = 1\nset_blocks = 1\nmeta_size = 8\n",
    "train": "epochs = 4\ncascade_epochs = 1\nbatch_events = 1024\nlearning_rate = 0.01\n"
    "negatives = 64\nwarmup_steps = 2\n",
}


def shortened(name: str) -> str:
    """The TOML of an example, with a small model and little training."""
    text = TOMLS[name].read_text()
    for table, lines in SHORT.items():
        text = re.sub(rf"^\[{table}\]\n(?:(?!\[).*\n)*", "", text, flags=re.MULTILINE) + f"\n[{table}]\n{lines}"
    if name == "ratings":  # 60 users, not 6,040
        text = text.replace("slate_users = 1000", "slate_users = 12").replace(
            "validation_users = 500", "validation_users = 12"
        )
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with the tables and a trained and exported bundle of each example, as the commands make them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(bundle_writer, "measure_latency", lambda engines, _: {name: {} for name in engines})
        patch.setattr(parity, "SLATES", (1, 5))
        for data_set in ("ml-1m", "ml-latest-small"):  # the demo trains on the one and shows the other
            movielens.main(["ml-latest-small", "--source", str(PART), "--out", f"build/data/{data_set}"])
        script().main([])
        for name in TOMLS:
            Path(f"{name}.toml").write_text(shortened(name))
            for command in (["train"], ["export", "--root", "bundles", "--force"]):
                assert cli.main([command[0], f"{name}.toml", *command[1:]]) == 0, (name, command)
        yield folder


def script() -> Any:
    """The module `examples/make_tables.py`."""
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "examples" / "make_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data_of(name: str) -> Data:
    config = read_config(Path(f"{name}.toml"))
    return load_data(config.data, config.tables)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with serve(Settings(bundles=folder / "bundles")) as client:
        yield client


@pytest.mark.parametrize(
    ("name", "ranker", "heads"),
    [
        ("ratings", "movielens", ["watch", "like"]),
        ("baskets", "baskets", ["next"]),
        ("exposures", "exposures", ["next", "click"]),
    ],
)
def test_example_is_trained_exported_and_ranks(
    folder: Path, client: httpx.Client, name: str, ranker: str, heads: list[str]
) -> None:
    losses = pl.read_csv(folder / "build" / "train" / ranker / "log.csv")["loss"].to_list()
    assert losses[2] < losses[0], "of the epochs with the same loss"
    card = client.get(f"/models/{ranker}").json()
    assert list(card["heads"]) == heads
    request = card["example"] | {"ranker": ranker}
    answer = client.post("/rerank", json=request).json()
    scores = answer["results"]["scores"]
    assert sorted(answer["results"]["item_ids"]) == sorted(request["candidates"]["item_ids"])
    assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all() and len(set(scores)) > len(scores) / 2
    assert answer["unknown_candidates"] == [] and answer["history"]["unknown"] == 0
    scores, without = (
        client.post("/score", json=request | more).json()["results"]["scores"] for more in ({}, {"history": {}})
    )
    assert np.ptp(np.subtract(scores, without)) > 1e-5, "the history changes the distances between candidates"


def test_genres_of_a_new_film_are_written_as_in_the_table(client: httpx.Client) -> None:
    cell = "Comedy|Drama"
    for ranker in ("movielens", "baskets", "exposures"):
        body = {"ranker": ranker, "exit": "dot", "candidates": {"item_ids": ["a new film"] * 3}}
        body["candidates"]["fields"] = {"genres": [cell, cell.split("|"), None]}
        answer = client.post("/score", json=body).json()
        cells, lists, plain = answer["results"]["scores"]
        assert cells == pytest.approx(lists, abs=1e-6) and cells != pytest.approx(plain, abs=1e-6)
        assert answer["unknown_values"] == {}


def test_a_basket_is_in_order_of_rows_with_gaps_of_zero(folder: Path) -> None:
    """Also when the baskets of several users are mixed, as long as the rows of one basket keep their order."""
    data = data_of("baskets")
    rows = pl.read_csv("build/data/examples/baskets/events.csv", infer_schema_length=0)
    ids = np.array(["", "", *data.catalogue.vocabulary.items])
    for user, name in enumerate(data.sequences.users):
        mine = rows.filter(pl.col("customer") == name).sort("bought_at", maintain_order=True)
        events = slice(*data.sequences.offsets[user : user + 2])
        assert ids[data.sequences.items[events]].tolist() == mine["product"].to_list()
        same = np.diff(data.sequences.timestamps[events]) == 0
        assert same.tolist() == [a == b for a, b in itertools.pairwise(mine["bought_at"])]


def test_baskets_have_several_items_and_no_order_of_ids(folder: Path) -> None:
    rows = pl.read_csv("build/data/examples/baskets/events.csv", schema_overrides={"product": pl.Int64})
    baskets = rows.group_by("customer", "bought_at", maintain_order=True).agg("product")["product"]
    sizes = baskets.list.len()
    assert sizes.median() == 4 and (sizes > 1).mean() > 0.6
    rising = [np.mean(np.diff(basket) > 0) for basket in baskets.to_list() if len(basket) > 1]
    assert np.mean(rising) == pytest.approx(0.5, abs=0.03)


def test_only_clicks_are_history_of_exposures(folder: Path) -> None:
    data = data_of("exposures")
    rows = pl.read_csv(
        "build/data/examples/exposures/events.csv", schema_overrides={"user_id": pl.String, "item_id": pl.String}
    )
    clicked = rows.filter(pl.col("action") == "click")
    assert len(data.sequences.items) == len(clicked) < len(rows)
    assert data.catalogue.vocabulary.actions == ["click"]
    ids = np.array(["", "", *data.catalogue.vocabulary.items])
    read = set(
        zip(np.repeat(data.sequences.users, np.diff(data.sequences.offsets)), ids[data.sequences.items], strict=True)
    )
    assert read == set(clicked.select("user_id", "item_id").iter_rows())


def test_shown_items_are_labelled_in_their_slate(folder: Path) -> None:
    data = data_of("exposures")
    slates = data.exposures
    assert slates is not None
    texts = {"user_id": pl.String, "item_id": pl.String}
    rows = pl.read_csv("build/data/examples/exposures/events.csv", schema_overrides=texts)
    ids = np.array(["", "", *data.catalogue.vocabulary.items])
    click = [head.name for head in data.config.heads].index("click")
    found = sorted(
        sorted(zip(slates.positions[s:e].tolist(), ids[slates.items[s:e]], slates.labels[s:e, click], strict=True))
        for s, e in itertools.pairwise(slates.offsets)
    )
    slates_of_table = rows.group_by("slate_id").agg("position", "item_id", "label_click")
    expected = slates_of_table.filter(pl.col("item_id").list.len() > 1).iter_rows()  # one item has no other to beat
    assert found == sorted(sorted(zip(*lists, strict=True)) for _, *lists in expected)


def test_history_before_a_slate_is_earlier_than_the_slate(folder: Path) -> None:
    data = data_of("exposures")
    slates, sequences = data.exposures, data.sequences
    assert slates is not None
    for user, read, now in zip(slates.slate_users, slates.history, slates.times, strict=True):
        first, last = sequences.offsets[user : user + 2]
        times = sequences.timestamps[first:last]
        assert read == (times < now).sum()
