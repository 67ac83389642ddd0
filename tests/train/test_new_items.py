"""Vectors of new items: the objective against a loop over events, causes of changes, and the refresh job."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import redis
import torch
from pydantic import SecretStr
from torch import Tensor
from torch.nn.functional import logsigmoid

from slatewise.bundle.manifest import read_manifest
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM
from slatewise.settings import Settings
from slatewise.store.adapted_items import items_key, read_items
from slatewise_train.batches import make_batch, served_window_start
from slatewise_train.config import TablesConfig
from slatewise_train.data import Sequences, read_table
from slatewise_train.meta import new_items
from slatewise_train.meta.new_items import ItemAdapter, prior
from slatewise_train.meta.refresh import Options, refresh
from slatewise_train.meta.refresh_items import vectors_of_fields
from slatewise_train.rankers.base import RankerModel
from slatewise_train.rankers.weights import load_model
from tests.conftest import Tiny
from tests.support.application import serve

LONGEST = 8
KINDS = ("next", "label")


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> RankerModel:
    return load_model(tiny.folder, read_manifest(tiny.folder)).requires_grad_(False)


def random_sequences(model: RankerModel, new: int, labels: float | None = None) -> Sequences:
    """Six users with 1 to 30 events, of which about a third are of the new items."""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 3, 30, 12, 9, 20])
    events = int(lengths.sum())
    items = rng.integers(FIRST_ITEM, model.config.items, events)
    is_new = rng.random(events) < 0.4
    items[is_new] = model.config.items + rng.integers(0, new, int(is_new.sum()))
    columns = np.ones((events, 2), np.float32)
    columns[:, 1] = rng.integers(0, 2, events) if labels is None else labels
    columns[::7, 1] = np.nan
    times = np.sort(rng.integers(0, 10**6, events)).astype(float)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    actions = rng.integers(0, model.config.actions, events)
    return Sequences([f"u{k}" for k in range(6)], offsets, items, actions, times, columns)


def cold_vectors(model: RankerModel, new: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(model.config.items + new, model.config.width, generator=generator)


def adapter_of(model: RankerModel, sequences: Sequences, new: int) -> ItemAdapter:
    return ItemAdapter(model, KINDS, cold_vectors(model, new), sequences, LONGEST)


def slow_likelihood(model: RankerModel, sequences: Sequences, vector: Tensor, row: int, known: Tensor) -> float:
    """Return minus the log likelihood of the events of an item, one event after the other, without padding."""
    total = 0.0
    table = model.item_table()
    for user in range(len(sequences)):
        begin, end = int(sequences.offsets[user]), int(sequences.offsets[user + 1])
        for place in range(begin, end):
            if sequences.items[place] != row:
                continue
            length = place - begin
            batch = make_batch(sequences, [(user, served_window_start(length, LONGEST), length)])
            rows = batch.items.masked_fill(batch.items >= len(table), UNKNOWN_ITEM)
            history, users = model.encode(model.tokens(table[rows], batch.actions, batch.gaps))
            numeric = torch.full((1, 1, model.config.numeric), math.nan)
            fused = model.fuse(numeric, model.default_meta, batch.contexts[:, -1:])
            position = torch.tensor([rows.shape[1]])
            hidden = model.hidden(vector[None, None], history, position, None, fused)
            dot = model.dot_logits(users[:, -1:], vector[None, None])
            like = float((dot + model.point_logits(hidden))[0, 0, 1])
            label = float(sequences.labels[place, 1])
            if not math.isnan(label):
                total -= float(logsigmoid(torch.tensor(like if label else -like)))
            z = float(users[0, -1] @ vector * model.dot_scale[0])
            rivals = float(torch.logsumexp(known @ users[0, -1] * model.dot_scale[0], dim=0))
            total += math.log1p(math.exp(rivals - z))
    return total


def test_the_likelihood_is_that_of_a_loop_over_events(model: RankerModel) -> None:
    sequences = random_sequences(model, new=2)
    adapter = adapter_of(model, sequences, new=2)
    vectors = torch.randn(2, model.config.width, generator=torch.Generator().manual_seed(2))
    for k in range(2):
        row = model.config.items + k
        events = np.flatnonzero(sequences.items == row)
        owner = torch.zeros(len(events), dtype=torch.long)
        labels = torch.from_numpy(sequences.labels[events])
        found = adapter.negative_log_likelihood(
            vectors[k : k + 1], owner, adapter.contexts(events), labels, torch.zeros(1)
        )
        slow = slow_likelihood(model, sequences, vectors[k], row, adapter.known)
        assert float(found) == pytest.approx(slow, rel=1e-4)


def test_chunks_and_the_order_of_items_change_nothing(model: RankerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = random_sequences(model, new=5)
    rows = model.config.items + np.arange(5)
    exposures = np.array([100, 0, 1_000, 50, 75])
    adapter = adapter_of(model, sequences, new=5)
    together = adapter.adapt(rows, exposures)
    monkeypatch.setattr(new_items, "CHUNK_EVENTS", 1)
    order = np.array([3, 0, 4, 2, 1])
    apart = adapter.adapt(rows[order], exposures[order])
    np.testing.assert_allclose(apart, together[order], atol=2e-3)  # Adam amplifies differences of rounding


def test_events_move_a_vector_and_no_events_do_not(model: RankerModel) -> None:
    """Likes raise the probability of a like, exposures without events lower that of being next."""
    row = np.array([model.config.items])

    def measure(likes: float, exposure: int) -> tuple[float, float]:
        sequences = random_sequences(model, new=1, labels=likes)
        adapter = adapter_of(model, sequences, new=1)
        vector = torch.from_numpy(adapter.adapt(row, np.array([exposure])))
        contexts = adapter.contexts(np.flatnonzero(sequences.items == row[0]))
        logits = new_items.point_logits(model, contexts, vector[None].expand(len(contexts.users), -1, -1))
        return float(logits[:, 0, 1].mean()), float((adapter.others @ vector[0] * model.dot_scale[0]).mean())

    liked, disliked, seldom = measure(1.0, 100), measure(0.0, 100), measure(1.0, 100_000)
    assert liked[0] > disliked[0]
    assert liked[1] > seldom[1]


def test_one_event_does_not_make_a_favourite() -> None:
    """One event in as many as there are items is added to each rate."""
    events, exposures = np.array([1, 1, 50, 50]), np.array([1, 4_000, 50, 100_000])
    found = new_items.events_of_others(events, exposures, 4_000)
    assert found.tolist() == pytest.approx([4_001 / 2 - 1, 3_999, 50 * 4_050 / 51 - 50, 50 * 104_000 / 51 - 50])
    assert new_items.events_of_others(np.array([3]), np.array([3]), 1).tolist() == [0.0]


def test_the_prior_is_what_training_added() -> None:
    rng = torch.Generator().manual_seed(0)
    added = torch.randn(5_000, 3, generator=rng) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, -1.0])
    cold = torch.randn(5_000, 3, generator=rng)
    mean, precision = prior(cold + added, cold)
    assert mean.tolist() == pytest.approx([0.0, 1.0, -1.0], abs=0.1)
    assert precision.diagonal().tolist() == pytest.approx([1.0, 0.25, 4.0], rel=0.1)


def test_a_ranker_without_trained_items_is_refused(model: RankerModel) -> None:
    cold = torch.cat([model.item_table(), torch.zeros(1, model.config.width)])
    with pytest.raises(ValueError, match="no item of the ranker was trained"):
        ItemAdapter(model, KINDS, cold, random_sequences(model, 1), LONGEST)


# The job


@pytest.fixture
def url(redis_port: int) -> Iterator[str]:
    with redis.Redis(port=redis_port) as client:
        client.flushall()
    yield f"redis://127.0.0.1:{redis_port}/0"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def with_new_item(tiny: Tiny, folder: Path, times: int) -> tuple[Path, str]:
    """Write a log in which the most frequent item has another id, with its first events only. Returns both."""
    events = read_table(Path(tiny.config.tables.events)).with_columns(pl.col("timestamp").cast(pl.Float64))
    item = events["item_id"].cast(pl.String).value_counts(sort=True)["item_id"][0]
    is_item = pl.col("item_id").cast(pl.String) == item
    number = pl.when(is_item).then(pl.col("timestamp").rank("ordinal").over("item_id"))
    log = events.filter(~is_item | (number <= times))
    log = log.with_columns(item_id=pl.when(is_item).then(pl.lit("brand new")).otherwise("item_id"))
    timeless = log.head(1).with_columns(item_id=pl.lit("no time"), timestamp=pl.lit(None, pl.Float64))
    pl.concat([log, timeless]).write_parquet(folder / "log.parquet")
    return folder / "log.parquet", item


def test_a_running_server_ranks_a_new_item_by_its_events(tiny: Tiny, url: str, tmp_path: Path) -> None:
    manifest = read_manifest(tiny.folder)
    example: dict[str, Any] = json.loads(json.dumps(manifest.example))
    ids = ["brand new", *example["candidates"]["item_ids"][:20], "unheard of"]
    body = example | {"candidates": {"item_ids": ids}, "request_time": 1e9}
    del body["user"]  # its vector would change the scores too
    settings = Settings(bundles=tiny.root, redis_url=SecretStr(url))

    def adapt(times: int) -> dict[str, Any]:
        path, _ = with_new_item(tiny, tmp_path, times)
        summary: dict[str, Any] = refresh(tiny.folder, [path], url, Options())["new_items"]
        return summary

    with serve(settings) as server:
        scores = []
        assert "adapted_candidates" not in server.post("/score", json=body).json()
        for times in (5, 6):
            scores.append(server.post("/score", json=body).json()["results"]["scores"])
            summary = adapt(times)
            assert (summary["new"], summary["adapted"]) == (1, 1)
            assert adapt(times)["adapted"] == 0, "no event is new"

            def changed() -> bool:
                answer = server.post("/score", json=body).json()
                return bool(answer["results"]["scores"] != scores[-1])

            until(changed)
            answer = server.post("/score", json=body).json()
            assert answer["adapted_candidates"] == [0]
            assert answer["unknown_candidates"] == [0, len(ids) - 1]
        with redis.Redis.from_url(url) as client:
            client.delete(items_key(manifest.ranker, manifest.version))
        until(lambda: "adapted_candidates" not in server.post("/score", json=body).json())


def test_fields_are_those_that_a_server_computes(tiny: Tiny, url: str) -> None:
    manifest = read_manifest(tiny.folder)
    ids = json.loads((tiny.folder / "ids.json").read_text())
    items = read_table(Path(tiny.config.tables.items or ""))
    found = vectors_of_fields(tiny.folder, manifest, [*ids, "new"], items)
    trainer = tiny.trainer
    cold = trainer.model.cold_item_vectors(trainer.model.item_table()).detach()
    np.testing.assert_allclose(found[FIRST_ITEM:-1], cold[FIRST_ITEM:], atol=1e-5)
    np.testing.assert_allclose(found[-1], cold[UNKNOWN_ITEM], atol=1e-6)


def test_fields_of_new_items_are_their_start(tiny: Tiny, url: str, tmp_path: Path) -> None:
    path, item = with_new_item(tiny, tmp_path, 5)
    manifest = read_manifest(tiny.folder)
    items = read_table(Path(tiny.config.tables.items or ""))
    row = items.filter(pl.col("item_id").cast(pl.String) == item).with_columns(item_id=pl.lit("brand new"))
    pl.concat([items.with_columns(pl.col("item_id").cast(pl.String)), row]).write_parquet(tmp_path / "items.parquet")

    def vector(tables: TablesConfig) -> np.ndarray:
        with redis.Redis.from_url(url) as client:
            client.flushall()
            refresh(tiny.folder, [path], url, Options(), tables)
            found = read_items(client, manifest.ranker, manifest.version, manifest.width)
        assert found is not None
        assert (found.ids, found.events.tolist()) == (["brand new"], [5])
        return np.array(found.vectors[0])

    without = vector(TablesConfig(str(path)))
    described = vector(TablesConfig(str(path), items=str(tmp_path / "items.parquet")))
    assert np.abs(described - without).max() > 1e-3
