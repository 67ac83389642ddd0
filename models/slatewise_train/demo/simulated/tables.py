"""Write a simulated world as the tables and the TOML that training reads.

Every item of a slate is a row of the events: action `buy` if it was chosen, else `shown`. Choices before the first
slate are rows without a slate.

Called by: `experiment.py`, `__main__.py`. Calls: `world.py`, polars.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from slatewise_train.demo.simulated.world import Log, World

START = 1_700_000_000  # unix seconds
HOUR = 3_600
DAY = 24 * HOUR

TOML = """\
# Simulated users, items of MovieLens latest-small. Written by `python -m slatewise_train.demo.simulated`.
name = "{name}"

[data]
events = "{folder}/events.parquet"
items = "{folder}/items.parquet"
trained_on = "simulated choices among films of MovieLens latest-small (GroupLens), seed {seed}"
history_actions = ["buy"]   # the other rows were only shown

[items]
title = "title"
categorical = ["genres"]

[heads.buy]
kind = "label"
weight = 1.0

[split]
kind = "time"
test_from = {test_from}     # the last slate of every user
history_length = 128

[model]
width = 32
blocks = 1
attention_heads = 2
set_blocks = 1
meta_size = 4
dropout = 0.0

[train]
{train}
"""


def slate_time(slate: np.ndarray | int) -> np.ndarray | int:
    """Return the unix seconds of a user's slates of these numbers, from 0. Choices without a slate are older."""
    return START + (slate + 2) * DAY


def user_names(users: np.ndarray) -> pl.Series:
    return pl.Series(users).cast(pl.String).str.zfill(6)


def events_table(world: World, log: Log) -> pl.DataFrame:
    """Return the events: a row for each choice without a slate, then one for each item of each slate."""
    u, t, c = log.slates.shape
    names = world.films["item_id"].to_numpy()
    organic = log.organic.shape[1]
    alone = pl.DataFrame(
        {
            "user_id": user_names(np.repeat(np.arange(u), organic)),
            "item_id": names[log.organic.ravel()],
            "timestamp": np.tile(START + np.arange(organic) * HOUR, u),
            "action": ["buy"] * (u * organic),
        }
    )
    slate = np.arange(u * t)
    shown = pl.DataFrame(
        {
            "user_id": user_names(np.repeat(np.arange(u), t * c)),
            "item_id": names[log.slates.ravel()],
            "timestamp": np.repeat(np.tile(slate_time(np.arange(t)), u), c),
            "action": np.where(log.chosen.ravel(), "buy", "shown"),
            "slate_id": np.repeat(slate, c),
            "position": np.tile(np.arange(1, c + 1), u * t),
            "label_buy": log.chosen.ravel().astype(np.int8),
        }
    )
    return pl.concat([alone, shown], how="diagonal")


def write_world(folder: Path, world: World, log: Log, train: str, name: str = "simulated") -> Path:
    """Write events.parquet, items.parquet and NAME.toml into a folder, and return the path of the TOML.

    train: the lines of the table `[train]`. Raises ValueError if the folder has another world or training: its
    checkpoint would count as that of this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    toml = folder / f"{name}.toml"
    last = slate_time(world.config.slates - 1)
    text = TOML.format(name=name, folder=folder.as_posix(), seed=world.config.seed, test_from=float(last), train=train)
    if toml.exists() and toml.read_text(encoding="utf-8") != text:
        raise ValueError(f"{toml}: was written by other options; choose another folder")
    events_table(world, log).write_parquet(folder / "events.parquet")
    world.films.write_parquet(folder / "items.parquet")
    toml.write_text(text, encoding="utf-8")
    return toml
