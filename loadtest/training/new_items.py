"""How well are new items ranked? python -m loadtest.training.new_items models/movielens.toml --out build/new_items

A tenth of the items is held out of training, with all their events. Then 1,500 users with many events of held-out items
are ranked, none of whose events of these items is used for anything else:

- the slate: the user's last 20 events of held-out items, at least 10, in the order of the head `label`;
- the next item: the user's last event, in the full catalogue, by the exit `dot`. For most users it is a known item, so
  a vector that lifts new items above their due shows as a loss there.

The vectors of the held-out items come from their fields alone, and from their first 1, 5 and 20 events of other users,
as `slatewise refresh` adapts them. Beside them stand lists without a model: the share of likes among the same first
events, and the number of all events of the item, which nobody knows in time. `--known` trains a second ranker on the
other users' events of these items, for the NDCG of known items on the same slates.

Every training is that of the TOML, or shorter with `--epochs`. Stop the command at any time: the same command continues
after the last whole epoch. The folder gets `results.json`.

Called by: the command line. Its numbers appear in docs/meta_embeddings.md. Calls: `meta/new_items.py`, the trainer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from loadtest.markdown import table
from slatewise.cli import run_main
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.process import cpu_name
from slatewise_train.config import Config, read_config
from slatewise_train.data import Data, Sequences, build_sequences, clean_events, load_data, read_table
from slatewise_train.defaults import choose_training
from slatewise_train.evaluation.metrics import gains, hits, interval, ndcg
from slatewise_train.meta.fit_fields import fit_fields
from slatewise_train.meta.new_items import ItemAdapter, Positions, encode, point_logits
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel
from slatewise_train.rankers.weights import serving_form
from slatewise_train.train import train

SHARE = 0.1  # of the items, held out
SLATE_USERS = 1_500
LEAST_SLATE = 10
SLATE = 20
LEAST_HISTORY = 5
FIRST_EVENTS = (1, 5, 20)
LIKES_BEFORE = 3.0  # of the list by likes: so many events of the mean item are added to each item
SEED = 7


@dataclass(frozen=True)
class HeldOut:
    """All events, with the held-out items as rows above the table of the ranker."""

    sequences: Sequences
    users: np.ndarray  # (E,) of each event
    is_new: np.ndarray  # (E,) bool
    slates: dict[int, np.ndarray]  # user -> rows of the sequences, oldest first
    known_items: int  # rows of the ranker's table

    def kept(self, keep: np.ndarray) -> Sequences:
        """Return the sequences with some of the events: keep (E,) bool."""
        s = self.sequences
        offsets = np.concatenate([[0], np.cumsum(keep)])[s.offsets]
        columns = (s.items, s.actions, s.timestamps, s.labels)
        return Sequences(s.users, offsets, *(column[keep] for column in columns))

    def first_events(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which events adapt the new items, the first `count` of each by other users than those of the slates.

        The second result is the number of all events from an item's first event to its last of these: (n,).
        """
        s = self.sequences
        others = self.is_new & ~np.isin(self.users, list(self.slates))
        order = np.flatnonzero(others)
        order = order[np.argsort(s.timestamps[order], kind="stable")]
        by_item = order[np.argsort(s.items[order], kind="stable")]
        items, begins, counts = np.unique(s.items[by_item], return_index=True, return_counts=True)
        chosen = np.zeros(len(s.items), bool)
        times = np.sort(s.timestamps)
        exposures = np.zeros(int(s.items.max()) + 1 - self.known_items, np.int64)
        for item, begin, number in zip(items, begins, counts, strict=True):
            rows = by_item[begin : begin + min(count, int(number))]
            chosen[rows] = True
            first, last = np.searchsorted(times, s.timestamps[rows[[0, -1]]])
            exposures[item - self.known_items] = last - first + 1
        return chosen, exposures


def hold_out(config: Config, out: Path) -> tuple[Config, Path, list[str]]:
    """Write the events without the held-out items. Returns the TOML's config for them, all events, and these items."""
    events = read_table(Path(config.tables.events))
    items = read_table(Path(config.tables.items or ""))
    ids = items["item_id"].cast(pl.String).to_list()
    held = sorted(np.random.default_rng(SEED).permutation(ids)[: int(SHARE * len(ids))].tolist())
    out.mkdir(parents=True, exist_ok=True)
    text = pl.col("item_id").cast(pl.String)
    events.filter(~text.is_in(held)).write_parquet(out / "known.parquet")
    tables = dataclasses.replace(config.tables, events=str(out / "known.parquet"))
    return dataclasses.replace(config, tables=tables), Path(config.tables.events), held


def read_held_out(data: Data, path: Path, held: list[str]) -> HeldOut:
    """Read all events, and draw the slates. data: of the known events."""
    vocabulary = data.catalogue.vocabulary
    known = [item for item in vocabulary.items if item not in set(held)]
    moved = dataclasses.replace(vocabulary, items=[*known, *held])
    events, _ = clean_events(read_table(path), 1.0)
    sequences = build_sequences(events.with_columns(pl.col("item_id").cast(pl.String)), moved, data.config)
    users = np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))
    is_new = sequences.items >= FIRST_ITEM + len(known)
    like = label_head(data)
    slates: dict[int, np.ndarray] = {}
    for user in np.random.default_rng(SEED).permutation(len(sequences)):
        rows = np.flatnonzero(is_new[sequences.offsets[user] : sequences.offsets[user + 1]]) + sequences.offsets[user]
        rows = rows[-SLATE:]
        labels = sequences.labels[rows, like]
        if len(rows) < LEAST_SLATE or rows[0] - sequences.offsets[user] < LEAST_HISTORY or len(set(labels)) < 2:
            continue
        slates[int(user)] = rows
        if len(slates) == SLATE_USERS:
            break
    return HeldOut(sequences, users, is_new, slates, FIRST_ITEM + len(known))


def label_head(data: Data) -> int:
    return next(k for k, head in enumerate(data.config.heads) if head.kind == "label")


@torch.no_grad()
def split_table(model: RankerModel, data: Data, held: list[str]) -> tuple[RankerModel, Tensor, Tensor]:
    """Return the model without the held-out items, and all vectors and those from fields alone, these items last."""
    place = {item: row for row, item in enumerate(data.catalogue.vocabulary.items, FIRST_ITEM)}
    new = torch.tensor([place[item] for item in held])
    is_known = torch.ones(len(data.catalogue.numeric), dtype=torch.bool)
    is_known[new] = False
    both = [
        torch.cat([vectors[is_known], vectors[new]])
        for vectors in (model.item_table(), model.cold_item_vectors(model.item_table()))
    ]
    count = int(is_known.sum())
    served = families.build(model.family, dataclasses.replace(model.config, fields={}, items=count))
    served.load_state_dict(serving_form(model).state_dict() | {"item.weight": both[0][:count]})
    return served.eval().requires_grad_(False), both[0], both[1]


@torch.no_grad()
def score_slates(model: RankerModel, out: HeldOut, vectors: Tensor, longest: int, head: int) -> np.ndarray:
    """Return NDCG@10 of each slate."""
    found = []
    for user, rows in out.slates.items():
        at = Positions(np.array([user]), np.array([rows[0] - out.sequences.offsets[user]]))
        contexts = encode(model, out.sequences, at, longest)
        logits = point_logits(model, contexts, vectors[torch.from_numpy(out.sequences.items[rows])][None])
        found.append(ndcg(logits[0, :, head].numpy(), out.sequences.labels[rows, head]))
    return np.array(found)


@torch.no_grad()
def next_ranks(model: RankerModel, out: HeldOut, vectors: Tensor, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank of the last event of each user of a slate, and whether its item is new: (n,) twice.

    The user's other events are no candidates, also those of the slate.
    """
    s = out.sequences
    users = np.array(list(out.slates))
    lengths = s.offsets[users + 1] - s.offsets[users] - 1
    ranks = np.zeros(len(users), np.int64)
    for k in range(len(users)):
        contexts = encode(model, s, Positions(users[k : k + 1], lengths[k : k + 1]), longest)
        scores = (vectors @ contexts.users[0]).numpy()
        items = s.items[s.offsets[users[k]] : s.offsets[users[k] + 1]]
        mine = scores[items[-1]]
        scores[:FIRST_ITEM] = -np.inf
        scores[items] = -np.inf
        ranks[k] = (scores > mine).sum()
    return ranks, s.items[s.offsets[users + 1] - 1] >= out.known_items


def list_rows(out: HeldOut, head: int) -> dict[str, dict[str, object]]:
    """Measure the lists without a model."""
    s = out.sequences
    rows: dict[str, dict[str, object]] = {}

    def add(name: str, scores: np.ndarray) -> None:
        found = [ndcg(scores[s.items[slate]], s.labels[slate, head]) for slate in out.slates.values()]
        rows[name] = {"slates": interval(np.array(found))}

    add("number of all events", np.bincount(s.items).astype(float))
    for count in FIRST_EVENTS:
        chosen, _ = out.first_events(count)
        likes = np.bincount(s.items[chosen], weights=s.labels[chosen, head], minlength=int(s.items.max()) + 1)
        events = np.bincount(s.items[chosen], minlength=len(likes))
        mean = float(s.labels[chosen, head].mean())
        add(f"likes of the first {count}", (likes + LIKES_BEFORE * mean) / (events + LIKES_BEFORE))
    return rows


def measure(
    model: RankerModel, out: HeldOut, vectors: Mapping[str, Tensor], data: Data
) -> dict[str, dict[str, object]]:
    """Measure vectors of all items, by name."""
    rows: dict[str, dict[str, object]] = {}
    for name, found in vectors.items():
        slates = score_slates(model, out, found, data.config.history_length, label_head(data))
        ranks, is_new = next_ranks(model, out, found, data.config.history_length)
        rows[name] = {
            "slates": interval(slates),
            "hr10_all": round(float(hits(ranks).mean()), 4),
            "hr10_known": round(float(hits(ranks[~is_new]).mean()), 4),
            "hr10_new": round(float(hits(ranks[is_new]).mean()), 4),
            "ndcg10_all": round(float(gains(ranks).mean()), 4),
            "users_known_new": [int((~is_new).sum()), int(is_new.sum())],
        }
        print(name, rows[name], flush=True)
    return rows


def adapted(model: RankerModel, out: HeldOut, table: Tensor, cold: Tensor, data: Data, count: int) -> Tensor:
    """Return all vectors, those of the new items adapted to their first `count` events."""
    chosen, exposures = out.first_events(count)
    kept = out.kept(~out.is_new | chosen)
    kinds = [head.kind for head in data.config.heads]
    adapter = ItemAdapter(model, kinds, cold, kept, data.config.history_length)
    rows = np.unique(out.sequences.items[chosen])
    result = table.clone()
    result[torch.from_numpy(rows)] = torch.from_numpy(adapter.adapt(rows, exposures[rows - out.known_items]))
    return result


def trained(config: Config, folder: Path) -> tuple[Data, RankerModel]:
    data = load_data(config.data, config.tables, config.stated)
    config = choose_training(
        dataclasses.replace(config, data=data.config),
        data.split.train_lengths,
        len(data.catalogue.vocabulary.items),
        False,
    )
    model = train(data, config.model, config.train, folder).model.eval()
    return data, fit_fields(model, data) if config.export.fit_fields else model


def run(config: Config, folder: Path, with_known: bool) -> None:
    """Train, measure, print a table, and write results.json."""
    cold_config, path, held = hold_out(config, folder)
    data, model = trained(cold_config, folder / "cold")
    out = read_held_out(data, path, held)
    served, table_, cold = split_table(model, data, held)
    vectors = {"fields alone": table_}
    vectors |= {f"first {n} events": adapted(served, out, table_, cold, data, n) for n in FIRST_EVENTS}
    rows = list_rows(out, label_head(data)) | measure(served, out, vectors, data)
    if with_known:
        events = read_table(path).with_columns(
            user=pl.col("user_id").cast(pl.String), item=pl.col("item_id").cast(pl.String)
        )
        of_slates = pl.col("user").is_in([out.sequences.users[user] for user in out.slates]) & pl.col("item").is_in(
            held
        )
        events.filter(~of_slates).drop("user", "item").write_parquet(folder / "others.parquet")
        tables = dataclasses.replace(config.tables, events=str(folder / "others.parquet"))
        data, model = trained(dataclasses.replace(config, tables=tables), folder / "known")
        known, table_, _ = split_table(model, data, held)
        rows |= measure(known, out, {"known items": table_}, data)
    (folder / "results.json").write_text(json.dumps(rows, indent=1))
    print(f"{len(out.slates):,} slates of held-out items; {cpu_name()}\n")
    names = ("hr10_all", "hr10_known", "hr10_new")
    cells = [[name, row["slates"], *(row.get(column, "") for column in names)] for name, row in rows.items()]
    print(table(["vectors of the new items", "NDCG@10 of `like`", "HR@10 of the last event", "known", "new"], cells))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.new_items",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("toml", type=Path, help="config of the ranker, for example models/movielens.toml")
    parser.add_argument("--out", type=Path, default=Path("build/new_items"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, metavar="N", help="of every training; default: those of the TOML")
    parser.add_argument("--known", action="store_true", help="also train a ranker that knows the items")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = read_config(args.toml)
    if args.epochs:
        cascade = min(config.train.cascade_epochs, -(-args.epochs // 2))
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, epochs=args.epochs, cascade_epochs=cascade)
        )
    run(config, args.out, args.known)


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.new_items", main, sys.argv[1:]))
