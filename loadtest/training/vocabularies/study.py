"""Quality of item tables in few bytes: forms of a trained table, and tables that are trained in a form of few numbers.

Called by: `__main__.py`. Calls: `tables.py`, `forms.py`, the trainer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from loadtest.training.vocabularies.forms import forms
from loadtest.training.vocabularies.tables import (
    Clusters,
    Factored,
    QuotientRemainder,
    graph_clusters,
    parameter_bytes,
    random_clusters,
)
from slatewise_train.compression.source import VECTOR_BATCHES, first_batches, user_vectors
from slatewise_train.config import Config, TrainConfig
from slatewise_train.data import Data, training_events
from slatewise_train.evaluation.held_out import held_out_ranks
from slatewise_train.evaluation.metrics import gains, hits, interval
from slatewise_train.evaluation.sampling import sample_users
from slatewise_train.new_model import build_model, scale_embeddings
from slatewise_train.rankers.base import RankerModel
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.rankers.weights import serving_form
from slatewise_train.train import CHECKPOINT, Trainer, train_epoch

SHARE = 1 / 8  # of float32's bytes, the budget of every trained table
EDGES = 0.05  # share of the training events that make the graph of the clusters
FIRST_RESOLUTION = 64.0
RESOLUTIONS = 5  # that are tried to meet the budget


@dataclass(frozen=True)
class Found:
    """The ranks of the test events with one table."""

    name: str
    bytes: int  # of the table
    error: float | None  # of the table, as a share of its length; None: it is no form of another table
    ranks: dict[str, np.ndarray]  # by exit


class Judge:
    """Ranks the test events of users. exits: see `held_out_ranks`. users: the most of them, None: all."""

    def __init__(self, data: Data, exits: tuple[str, ...], users: int | None) -> None:
        self.data = data
        self.exits = exits
        self.users = sample_users(np.flatnonzero(data.split.test_lengths), users)
        self.head = next(k for k, head in enumerate(data.config.heads) if head.kind == "next")

    def ranks(self, model: RankerModel) -> dict[str, np.ndarray]:
        lengths = self.data.split.test_lengths[self.users]
        return held_out_ranks(model, self.data, self.users, lengths, self.head, self.exits)

    @torch.no_grad()
    def with_forms(self, model: RankerModel, prefix: str = "") -> list[Found]:
        """Rank with the item table of a model in serving form, and with each form of it."""
        weight = model.get_parameter("item.weight")
        items = weight.numpy().copy()
        length = float(np.linalg.norm(items))
        found = []
        batches = first_batches(self.data, self.data.config.history_length, TrainConfig.batch_events, VECTOR_BATCHES)
        for form in forms(items, user_vectors(model.eval(), batches)):
            weight.copy_(torch.from_numpy(form.table))
            error = float(np.linalg.norm(form.table - items)) / length
            found.append(Found(prefix + form.name, form.bytes, error, self.ranks(model)))
            print(found[-1].name, round(float(gains(found[-1].ranks[self.exits[0]]).mean()), 4), flush=True)
        weight.copy_(torch.from_numpy(items))
        return found


def rows_of_table(found: list[Found]) -> list[list[object]]:
    """Return the cells of each table: its bytes, and quality by exit beside that of the first one."""
    exact = found[0]
    rows: list[list[object]] = []
    for one in found:
        row: list[object] = [one.name, f"{one.bytes / 1e3:,.1f}", f"{one.bytes / exact.bytes:.3f}"]
        row.append(None if one.error is None else f"{one.error:.4f}")
        for exit, ranks in one.ranks.items():
            of_one, of_exact = gains(ranks), gains(exact.ranks[exit])
            change, low, high = interval(of_one - of_exact)
            row += [f"{of_one.mean():.4f}", f"{of_one.mean() / of_exact.mean():.1%}"]
            row += [f"{change:+.4f} ({low:+.4f} to {high:+.4f})", f"{hits(ranks).mean():.4f}"]
        rows.append(row)
    return rows


def titles_of_table(exits: tuple[str, ...]) -> list[str]:
    names = ["table", "KB", "of float32", "error"]
    for exit in exits:
        names += [f"NDCG@10 of `{exit}`", "kept", "difference", "HR@10"]
    return names


# Tables that are trained


def remainders_within(rows: int, most_rows: int) -> int:
    """Return the rows of the second table of QR hashing, so that both have at most so many rows together.

    It is the largest number, because the fewer items share a row of it the better.
    """
    return max(m for m in range(1, most_rows) if m + -(-rows // m) <= most_rows)


def clusters_within(data: Data, rows: int, most: int) -> np.ndarray:
    """Return the clusters of `graph_clusters` at the highest resolution that was tried with at most so many."""
    users, items = training_events(data.sequences, data.split)
    some = np.random.default_rng(0).random(len(items)) < EDGES
    best = np.zeros(rows, np.int64)
    low, high, resolution = 1.0, 0.0, FIRST_RESOLUTION
    for _ in range(RESOLUTIONS):
        clusters = graph_clusters(users[some], items[some], rows, resolution)
        print(f"resolution {resolution:.1f}: {clusters.max() + 1} clusters of {rows} rows", flush=True)
        if clusters.max() < most:
            low = resolution
            best = max(best, clusters, key=lambda found: int(found.max()))
        else:
            high = resolution
        resolution = (low * high) ** 0.5 if high else 4 * resolution
    return best


def makers(data: Data, rows: int, width: int, std: float) -> Mapping[str, Callable[[], nn.Module | None]]:
    """Return what makes the id table of each training, by name; `None`: the plain table."""
    budget = int(SHARE * rows * width)  # numbers
    rank = budget // (rows + width)

    def by_graph() -> nn.Module:
        return Clusters(clusters_within(data, rows, budget // width), width, std)

    return {
        "float32": lambda: None,
        "QR": lambda: QuotientRemainder(rows, width, remainders_within(rows, budget // width), std),
        "born factored": lambda: Factored(rows, width, rank, std),
        "random clusters": lambda: Clusters(random_clusters(rows, budget // width), width, std),
        "GraphHash": by_graph,
    }


def train_tables(config: Config, data: Data, names: list[str], folder: Path, judge: Judge) -> list[Found]:
    """Train a ranker with each table, all with the same settings and seed. Then the forms of the first one.

    Stop it at any time: finished trainings are read, and the others continue after the last whole epoch.
    """
    std = config.train.embedding_std or config.model.shape["width"] ** -0.5
    found: list[Found] = []
    plain = None
    for name in names:
        torch.manual_seed(config.train.seed)
        model = build_model(data.catalogue, data.config, config.model)
        assert isinstance(model, Ligr)
        scale_embeddings(model, std)
        made = folder / name.replace(" ", "-") / "clusters.npy"
        width = model.config.width
        rows = len(data.catalogue.numeric)
        table = Clusters(np.load(made), width, std) if made.exists() else makers(data, rows, width, std)[name]()
        if isinstance(table, Clusters):
            made.parent.mkdir(parents=True, exist_ok=True)
            np.save(made, table.get_buffer("clusters").numpy())
        size = rows * width * 4
        if table is not None:
            size = parameter_bytes(table)
            model.add_module("item", table)
        print(f"\n{name}:", flush=True)
        trained = train_table(data, model, config.train, made.parent)
        found.append(Found(name, size, None, judge.ranks(trained)))
        if table is None:
            plain = serving_form(trained)
    return found + ([] if plain is None else judge.with_forms(plain, "of float32: ")[1:])


class TableTrainer(Trainer):
    """A trainer of a ranker whose id table may have fewer numbers than one row an item."""

    def reset_untrained(self) -> None:
        """Leave the rows of items without a training event: their numbers are those of other items too."""
        if isinstance(self.model.get_submodule("item"), nn.Embedding):
            super().reset_untrained()


def train_table(data: Data, model: RankerModel, settings: TrainConfig, folder: Path) -> RankerModel:
    """Train up to the last epoch, from the checkpoint in the folder if there is one. Returns the trained model."""
    trainer = TableTrainer(data, model, settings)
    if (folder / CHECKPOINT).exists():
        trainer.load(folder / CHECKPOINT)
    trainer.progress.join()
    while not trainer.progress.finished:
        train_epoch(trainer, folder)
    return trainer.model


def shortened(config: Config, width: int, blocks: int, epochs: int, history: int) -> Config:
    """Return the config of small trainings of the exit `dot` alone."""
    shape = config.model.shape | {"width": width, "blocks": blocks, "decoder_blocks": 0, "set_blocks": 0}
    settings = dataclasses.replace(config.train, epochs=epochs, cascade_epochs=0, validate_every=epochs)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, history_length=history),
        model=dataclasses.replace(config.model, shape=shape),
        train=settings,
    )


def save(path: Path, found: list[Found]) -> None:
    """Write the quality of each table, without the ranks."""
    rows = [
        {"name": one.name, "bytes": one.bytes, "error": one.error}
        | {f"{exit}_ndcg10": float(gains(ranks).mean()) for exit, ranks in one.ranks.items()}
        for one in found
    ]
    path.write_text(json.dumps(rows))
