"""The part of `slatewise refresh` for new items: read their events, adapt their vectors, and write them to the store.

Called by: `refresh.py`. Calls: `new_items.py`, `changed_users.py`, `logged_events.py`, `store/adapted_items.py`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from slatewise.bundle.adapted_items import AdaptedItems
from slatewise.bundle.features import field_change
from slatewise.bundle.manifest import Manifest, read_manifest
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM
from slatewise.store.adapted_items import MOST_ITEMS, read_items, write_items
from slatewise.store.client import connect
from slatewise.store.codec import Corrupt, Mismatched
from slatewise_train.config import DataConfig, TablesConfig
from slatewise_train.data import Sequences, TrainingVocabulary
from slatewise_train.meta.changed_users import Events
from slatewise_train.meta.limaml import META_BLOCK, load_learner
from slatewise_train.meta.logged_events import config_of, history_of
from slatewise_train.meta.new_items import ItemAdapter
from slatewise_train.rankers.weights import load_model
from slatewise_train.tables.files import collect
from slatewise_train.tables.items import join_ids, value_lists
from slatewise_train.tables.items import read_items as read_table_of_items

OTHER_USERS = 500  # whose events stand for those in which a new item was not taken


@dataclass(frozen=True)
class NewItems:
    """The items of a log that a ranker does not know, most events first."""

    ids: list[str]
    written: list[str]  # the same ids, as the log has them: `1.0` for the item `1`
    events: np.ndarray  # (n,) int64
    exposures: np.ndarray  # (n,) int64, events of the log since the first one of the item


def find_new_items(events: Events, known: pl.DataFrame) -> NewItems:
    """Find the new items, at most MOST_ITEMS of them. known: the column `item_id`, of the ranker's items."""
    files = events.scanned[1]
    usable = events.taken.drop_nulls().filter(pl.col("timestamp").is_finite())
    counted = collect(
        usable.group_by("item_id").agg(
            pl.len().cast(pl.Int64).alias("events"), pl.col("timestamp").min().alias("first")
        ),
        files,
    )
    _, joined = join_ids(known, counted)
    counted = counted.with_columns(written="item_id", item_id=joined["item_id"].cast(pl.String))
    new = counted.join(known, on="item_id", how="anti").sort("events", "item_id", descending=[True, False])
    new = new.head(MOST_ITEMS)
    times = collect(usable.select("timestamp"), files)["timestamp"].sort().to_numpy()
    exposures = len(times) - np.searchsorted(times, new["first"].to_numpy(), "left")
    return NewItems(new["item_id"].to_list(), new["written"].to_list(), new["events"].to_numpy(), exposures)


def read_sequences(
    events: Events, known: pl.DataFrame, new: NewItems, vocabulary: TrainingVocabulary, config: DataConfig
) -> Sequences:
    """Read all events of the users who took a new item, and of OTHER_USERS.

    vocabulary: its items are the known ones, then the new ones.
    """
    files = events.scanned[1]
    took = events.taken.filter(pl.col("item_id").is_in(new.written)).select(pl.col("user_id").unique())
    everybody = events.users(None)
    users = {*collect(took, files)["user_id"].drop_nulls(), *everybody[:: max(1, len(everybody) // OTHER_USERS)]}
    rows = collect(events.table.filter(pl.col("user_id").is_in(list(users))), files)
    return history_of(rows, known, vocabulary, config, events.history_actions)


def kinds_of_heads(folder: Path, manifest: Manifest, events: Events) -> list[str]:
    """Find the kinds of the heads: in the meta block, or else by the label columns of the events."""
    if (folder / META_BLOCK).exists():
        return load_learner(folder / META_BLOCK)[1]
    columns = events.table.collect_schema().names()
    return ["label" if f"label_{name}" in columns else "next" for name in manifest.heads]


def vectors_of_fields(folder: Path, manifest: Manifest, ids: list[str], items: pl.DataFrame) -> Tensor:
    """Return each item's vector from its fields alone, as a server computes it: (FIRST_ITEM + n, d).

    ids: (n,); items: a table with the manifest's fields. An item that is not in it has no fields.
    """
    unknown = np.load(folder / "items.npy", mmap_mode="r")[UNKNOWN_ITEM]
    tables = np.load(folder / "fields.npy")
    result = np.tile(unknown, (FIRST_ITEM + len(ids), 1)).astype(np.float32)
    if "item_id" in items.columns and len(items):
        wanted, items = join_ids(pl.DataFrame({"item_id": ids}, schema={"item_id": pl.String}), items)
        rows = wanted.join(items.unique("item_id", keep="first"), on="item_id", how="left", maintain_order="left")
        for name, field in manifest.fields.items():
            if name in rows.columns:
                values = {value: row for row, value in enumerate(field.values, field.offset + 1)}
                cells = rows[name].to_list() if field.text else value_lists(rows[name]).to_list()
                change, _ = field_change(cells, np.arange(len(ids)), values, tables, field.offset, field.text)
                result[FIRST_ITEM:] += change
    return torch.from_numpy(result)


def refresh_items(folder: Path, events: Events, redis_url: str, tables: TablesConfig) -> dict[str, Any]:
    """Adapt the new items whose number of events has changed, and write the vectors of all. Returns a summary.

    tables: `items` names the table with their fields; without it, an item starts without fields. Raises RedisError,
    ManifestError, OSError or ValueError.
    """
    begin = time.time()
    manifest = read_manifest(folder)
    known = pl.DataFrame({"item_id": json.loads((folder / "ids.json").read_text())}, schema={"item_id": pl.String})
    new = find_new_items(events, known)
    client = connect(redis_url)
    place = manifest.ranker, manifest.version
    try:
        stored = read_items(client, *place, manifest.width)
    except (Corrupt, Mismatched):
        stored = None
    same = np.full(len(new.ids), -1) if stored is None else stored.find(new.ids)
    if stored is not None:
        same[(same >= 0) & (stored.events[same] != new.events)] = -1
    changed = np.flatnonzero(same < 0)
    summary = {"new": len(new.ids), "adapted": len(changed), "seconds": 0.0}
    if len(changed):
        kinds = kinds_of_heads(folder, manifest, events)
        config = config_of(manifest, kinds)
        vocabulary = TrainingVocabulary([*known["item_id"], *new.ids], manifest.actions, {})
        cold = vectors_of_fields(folder, manifest, vocabulary.items, read_table_of_items(tables))
        model = load_model(folder, manifest).requires_grad_(False)
        sequences = read_sequences(events, known, new, vocabulary, config)
        adapter = ItemAdapter(model, kinds, cold, sequences, config.history_length)
        rows = FIRST_ITEM + len(known) + changed
        usable = np.isin(rows, sequences.items)
        rows, changed = rows[usable], changed[usable]
        vectors = np.zeros((len(new.ids), manifest.width), np.float32)
        if stored is not None:
            vectors[same >= 0] = stored.vectors[same[same >= 0]]
        vectors[changed] = adapter.adapt(rows, new.exposures[changed])
        kept = np.union1d(np.flatnonzero(same >= 0), changed)
        ids = [new.ids[k] for k in kept]
        write_items(client, *place, AdaptedItems(ids, vectors[kept], new.events[kept], begin))
        summary["adapted"] = len(changed)
    return summary | {"seconds": round(time.time() - begin, 2)}
