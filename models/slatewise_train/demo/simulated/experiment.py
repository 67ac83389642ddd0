"""Train rankers on simulated worlds and compare them with the known answer. All of its numbers are *simulated*.

Worlds: with neighbours that replace each other; without any effect of the slate; and with clicks that depend on the
position. The last slate of every user is held out. Its items are ranked by each exit, and NDCG has their exact
probabilities as gains, see `oracle.py`.

Called by: `__main__.py`. Calls: `world.py`, `oracle.py`, `tables.py`, `train.py`, `evaluation/diversity.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch.nn import functional as F

from slatewise_train.batches import make_batch
from slatewise_train.config import read_config
from slatewise_train.data import load_data
from slatewise_train.demo.simulated.oracle import context_free, expected_ndcg, random_ndcg
from slatewise_train.demo.simulated.tables import write_world
from slatewise_train.demo.simulated.world import Log, World, WorldConfig, simulate
from slatewise_train.evaluation.diversity import list_distance, mmr
from slatewise_train.evaluation.metrics import interval
from slatewise_train.exposures import first_held_out
from slatewise_train.slates import read_slates
from slatewise_train.train import Trainer, train

TRADES = (0.9, 0.7, 0.5)  # of MMR between the score and the distance to items above
EVALUATED = 500  # users of one call


@dataclass(frozen=True)
class Result:
    """The order of the held-out slates by each exit, and by the oracles."""

    scores: dict[str, np.ndarray]  # by name (users, C)
    relevance: np.ndarray  # (users, C)
    rows: np.ndarray  # (users, C) item rows of the catalogue
    fields: list[np.ndarray]  # of the catalogue

    def ndcg(self, name: str, depth: int) -> np.ndarray:
        return expected_ndcg(self.scores[name], self.relevance, depth)

    def distance(self, name: str) -> np.ndarray:
        """Return the genre distance of the ten best items of each slate: (users,)."""
        order = np.argsort(-self.scores[name], axis=1, kind="stable")[:, :10]
        return list_distance(np.take_along_axis(self.rows, order, axis=1), self.fields)


def run_world(folder: Path, name: str, config: WorldConfig, films: pl.DataFrame, lines: str) -> Result:
    """Simulate a world, train on its tables, and score the held-out slates. lines: of the table `[train]`."""
    world = World(config, films)
    log = simulate(world)
    config_of_ranker = read_config(write_world(folder / name, world, log, lines, name))
    data = load_data(config_of_ranker.data, config_of_ranker.tables)
    trainer = train(data, config_of_ranker.model, config_of_ranker.train, folder / name / "train")
    return score_slates(trainer, world, log)


@torch.no_grad()
def score_slates(trainer: Trainer, world: World, log: Log) -> Result:
    """Score the last slate of every user with each exit, and with the oracle that knows no neighbours."""
    data, shown, model = trainer.data, trainer.shown, trainer.model.eval()
    assert data.exposures is not None and shown is not None
    table = model.item_table()
    users = np.arange(len(data.sequences))
    slates = first_held_out(data.exposures, users, data.split.train_lengths)
    users, slates = users[slates >= 0], slates[slates >= 0]
    who = np.array([int(data.sequences.users[u]) for u in users])
    head = next(k for k, one in enumerate(data.config.heads) if one.kind == "label")
    found: dict[str, list[np.ndarray]] = {exit: [] for exit in model.exits}
    for first in range(0, len(users), EVALUATED):
        part = slice(first, first + EVALUATED)
        lengths = data.exposures.history[slates[part]]
        firsts = np.maximum(0, lengths - data.config.history_length)
        batch = make_batch(data.sequences, np.stack([users[part], firsts, lengths], axis=1))
        history, vectors = model.encode(model.tokens(F.embedding(batch.items, table), batch.actions, batch.gaps))
        some = shown.padded(slates[part], np.arange(len(lengths)), lengths - firsts)
        candidates = F.embedding(some.slates.candidates, table)
        meta = model.default_meta.expand(len(lengths), 1, -1)
        dot, hidden = read_slates(model, some.slates, history, vectors, candidates, meta)
        for exit, logits in model.logits_by_exit(dot, hidden).items():
            found[exit].append(logits[..., head].numpy())
    scores = {exit: np.concatenate(parts) for exit, parts in found.items()}
    last, recent = log.slates[who, -1], log.recent[who, -1]
    scores["oracle without neighbours"] = context_free(world, who, last, recent)
    scores["oracle"] = log.relevance[who, -1]
    row = {item: k + 2 for k, item in enumerate(data.catalogue.vocabulary.items)}
    rows = np.array([row[item] for item in world.films["item_id"]])[last]
    return Result(scores, log.relevance[who, -1], rows, [data.catalogue.field_values["genres"]])


def add_mmr(result: Result, trade: float) -> str:
    """Add the order of MMR on the exit `point` to the scores, and return its name. trade: see `diversity.mmr`."""
    name = f"point, MMR {trade}"
    places = mmr(result.scores["point"], result.rows, result.fields, trade, result.rows.shape[1])
    scores = np.empty(places.shape)
    np.put_along_axis(scores, places, -np.arange(places.shape[1], dtype=float)[None].repeat(len(places), 0), axis=1)
    result.scores[name] = scores
    return name


def table(result: Result) -> list[str]:
    """Return Markdown: NDCG against the known relevance, and genre distance, with 95 % intervals over users."""
    lines = ["| simulated | NDCG@5 | NDCG@10 | genre distance of the ten best |", "| --- | --- | --- | --- |"]
    for name in result.scores:
        cells = [interval(values) for values in (result.ndcg(name, 5), result.ndcg(name, 10), result.distance(name))]
        lines.append(f"| {name} | " + " | ".join(f"{m:.4f} ({low:.4f} to {high:.4f})" for m, low, high in cells) + " |")
    chance = random_ndcg(result.relevance, 5).mean(), random_ndcg(result.relevance, 10).mean()
    return [*lines, f"| any order | {chance[0]:.4f} | {chance[1]:.4f} | |"]


def share_of_gain(result: Result, depth: int = 5) -> tuple[float, float]:
    """Return the gain in NDCG of `set` over `point`, as a share of two gains.

    They are the gain of the oracle over the oracle that knows no neighbours, and its gain over the exit `point`.
    """
    mean = {name: float(result.ndcg(name, depth).mean()) for name in result.scores}
    gain = mean["set"] - mean["point"]
    return gain / (mean["oracle"] - mean["oracle without neighbours"]), gain / (mean["oracle"] - mean["point"])


def recovered(result: Result, unbiased: Result, exit: str) -> float:
    """Return the gain in NDCG@10 over any order, as a share of that of the ranker without click bias."""

    def gain(one: Result) -> float:
        return float(one.ndcg(exit, 10).mean() - random_ndcg(one.relevance, 10).mean())

    return gain(result) / gain(unbiased)
