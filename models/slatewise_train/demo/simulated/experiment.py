"""Train rankers on simulated worlds and compare them with the known answer. All of its numbers are *simulated*.

The last slate of each user is held out. Its items are ranked by each exit, and NDCG has their exact probabilities as
gains, see `oracle.py`.

Called by: `__main__.py`. Calls: `world.py`, `oracle.py`, `tables.py`, `train.py`, `evaluation/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import make_batch
from slatewise_train.config import read_config
from slatewise_train.data import Data, load_data
from slatewise_train.demo.simulated.oracle import context_free, expected_ndcg, random_ndcg
from slatewise_train.demo.simulated.tables import write_world
from slatewise_train.demo.simulated.world import Log, World, WorldConfig, simulate
from slatewise_train.evaluation.diversity import list_distance, mmr
from slatewise_train.evaluation.metrics import BOOTSTRAPS, interval
from slatewise_train.evaluation.report import Interval, interval_cell, markdown_table, save_figure
from slatewise_train.slates import read_slates
from slatewise_train.train import Trainer, train

TRADES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of MMR between the score and the distance to items above
EVALUATED = 2_000  # users whose last slate is ranked
AT_ONCE = 500  # of them
ORACLE = "oracle"
ALONE = "oracle without neighbours"


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


def last_slates(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Return up to `EVALUATED` users, and the last slate of each: (n,) indices in Sequences.users, (n,) in Exposures.

    The split's own choice, the first slate after the training events, may be an earlier one: a slate without a choice
    has no event after it.
    """
    assert data.exposures is not None
    users = np.arange(min(EVALUATED, len(data.sequences)))
    slates = np.searchsorted(data.exposures.slate_users, users, side="right") - 1
    assert (data.exposures.history[slates] >= data.split.train_lengths[users]).all(), "training knows a held-out slate"
    return users, slates


@torch.no_grad()
def score_slates(trainer: Trainer, world: World, log: Log) -> Result:
    """Score the last slate of users with each exit, and with the oracle that knows no neighbours."""
    data, shown, model = trainer.data, trainer.shown, trainer.model.eval()
    assert data.exposures is not None and shown is not None
    table = model.item_table()
    users, slates = last_slates(data)
    head = next(k for k, one in enumerate(data.config.heads) if one.kind == "label")
    found: dict[str, list[np.ndarray]] = {exit: [] for exit in model.exits}
    for first in range(0, len(users), AT_ONCE):
        part = slice(first, first + AT_ONCE)
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
    who = np.array([int(data.sequences.users[u]) for u in users])
    last, recent, relevance = log.slates[who, -1], log.recent[who, -1], log.relevance[who, -1]
    row = {item: k for k, item in enumerate(data.catalogue.vocabulary.items, start=FIRST_ITEM)}
    rows = np.array([row[item] for item in world.films["item_id"]])[last]
    ranked = data.exposures.items[data.exposures.offsets[slates][:, None] + np.arange(last.shape[1])]
    assert (ranked == rows).all(), "the scores are those of another slate"
    scores = {exit: np.concatenate(parts) for exit, parts in found.items()}
    scores |= {ALONE: context_free(world, who, last, recent), ORACLE: relevance}
    return Result(scores, relevance, rows, [data.catalogue.field_values["genres"]])


def add_mmr(result: Result, trade: float) -> str:
    """Add the order of MMR on the exit `point` to the scores, and return its name. trade: see `diversity.mmr`."""
    name = f"point, MMR {trade}"
    places = mmr(result.scores["point"], result.rows, result.fields, trade, result.rows.shape[1])
    scores = np.empty(places.shape)
    np.put_along_axis(scores, places, -np.arange(places.shape[1], dtype=float)[None].repeat(len(places), 0), axis=1)
    result.scores[name] = scores
    return name


def as_diverse(result: Result, names: list[str]) -> str:
    """Return the name of the order with the highest NDCG@10 among those that are at least as diverse as `set`.

    Without such an order, it is the most diverse one.
    """
    distance = {name: float(result.distance(name).mean()) for name in names}
    enough = [name for name in names if distance[name] >= result.distance("set").mean()]
    return (
        max(enough, key=lambda name: result.ndcg(name, 10).mean())
        if enough
        else max(distance, key=distance.__getitem__)
    )


def table(result: Result) -> list[str]:
    """Return Markdown: NDCG against the known relevance, and genre distance, with 95 % intervals over users."""
    rows = []
    for name in result.scores:
        columns = (result.ndcg(name, 5), result.ndcg(name, 10), result.distance(name))
        rows.append([name, *(interval_cell(interval(values)) for values in columns)])
    chance = (f"{random_ndcg(result.relevance, depth).mean():.4f}" for depth in (5, 10))
    titles = ["simulated", "NDCG@5", "NDCG@10", "genre distance of the ten best"]
    return markdown_table(titles, [*rows, ["any order", *chance, ""]])


def difference(result: Result, name: str, other: str, depth: int) -> Interval:
    """Return the difference of two orders in NDCG, with its paired 95 % interval over users."""
    return interval(result.ndcg(name, depth) - result.ndcg(other, depth))


def ratio(parts: np.ndarray, wholes: np.ndarray, seed: int = 0) -> Interval:
    """Return the ratio of two means with its 95 % bootstrap interval over users: (n,), (n,) of the same users."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(parts), len(parts)) for _ in range(BOOTSTRAPS))
    found = [parts[rows].mean() / wholes[rows].mean() for rows in draws]
    return [float(parts.mean() / wholes.mean()), *(float(v) for v in np.quantile(found, [0.025, 0.975]))]


def share_of_gain(result: Result, best_alone: str, depth: int = 5) -> Interval:
    """Return the gain in NDCG of `set` over `point`, as a share of the gain of the oracle over another order."""
    base = result.ndcg("point", depth)
    return ratio(result.ndcg("set", depth) - base, result.ndcg(ORACLE, depth) - result.ndcg(best_alone, depth))


def recovered(result: Result, unbiased: Result, exit: str) -> tuple[Interval, Interval]:
    """Return NDCG@10 as a share of that of the ranker without click bias, and the same for the gain over any order.

    The results are those of the same users, and of different slates.
    """
    one, other = (r.ndcg(exit, 10) for r in (result, unbiased))
    chance, fair_chance = (random_ndcg(r.relevance, 10) for r in (result, unbiased))
    return ratio(one, other), ratio(one - chance, other - fair_chance)


def plot(result: Result, frontier: list[str], path: Path) -> None:
    """Plot NDCG@10 over genre distance: the exits, the oracles, and MMR as a line from `point` on."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    places = {name: (result.distance(name).mean(), result.ndcg(name, 10).mean()) for name in result.scores}
    axes.plot(*zip(*(places[name] for name in ["point", *frontier]), strict=True), "o-", label="MMR on point")
    for name in ("point", "set", ALONE, ORACLE):
        axes.plot(*places[name], "s", label=name)
    axes.set(xlabel="genre distance of the ten best (simulated)", ylabel="NDCG@10 (simulated)")
    axes.legend(loc="center left")
    save_figure(figure, path, 120)
