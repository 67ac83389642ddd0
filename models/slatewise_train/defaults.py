"""Choose the values that a TOML leaves out from the tables: lengths of histories, size of the catalogue, heads.

This file has all rules, with their reasons. Each run prints the values that it chose. A value in the TOML is never
changed, except for `validation_users` above the number of users that can validate. The rules come from experiments on
a sparse and on a dense table, see LOG.md.

Called by: `data.py` for `[split]`, `loading.py` for `[model]` and `[train]`, `check_data.py`. Calls: `config.py`,
`split.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from slatewise_train.config import Config, DataConfig, ModelConfig
from slatewise_train.rankers import families
from slatewise_train.split import LEAST_TO_VALIDATE, Histories, known_events

Chosen = dict[str, tuple[Any, str]]  # key -> value and the reason

SHORTEST_WINDOW = 32  # events: shorter windows save no time worth having
LONGEST_WINDOW = 256  # events: attention over more costs most of an epoch
MOST_SLATE = 20  # items that a screen shows
MOST_VALIDATED = 2_000  # users: +-.006 in HR@10 of .1, and a second of each validation
LONG_HISTORY = 30  # events of the median user; from here on a second block has something to read
MANY_ITEMS = 2_000
STEPS = 175  # of an epoch. Fewer, larger batches need more epochs; embeddings move once in a step
SMALLEST_BATCH = 512  # events
LARGEST_BATCH = 8_192
LEAST_USERS = 16  # of a batch, for histories of the median length
RATE = 0.002  # learning rate of Adam for batches of RATE_BATCH events
RATE_BATCH = 1_024
MOST_SEEN = 40_000_000  # events of a whole run: about an hour on two cores
EMBEDDING_STD = 0.0127


def choose_split(config: DataConfig, stated: frozenset[str] | None, sequences: Histories) -> DataConfig:
    """Return the config with the keys of `[split]` that the TOML leaves out. stated: as in `Config`; None: all."""
    known, lengths = known_events(sequences, config)
    able = int((known >= LEAST_TO_VALIDATE).sum())
    chosen: Chosen = {}
    if stated is not None:
        labels = any(head.kind == "label" for head in config.heads)
        # The window holds 99 % of the histories; the rest are cut. Powers of two keep the cache's windows aligned.
        q99 = float(np.quantile(lengths, 0.99)) if len(lengths) else 1.0
        window = int(np.clip(2 ** np.ceil(np.log2(max(q99, 1.0))), SHORTEST_WINDOW, LONGEST_WINDOW))
        chosen["history_length"] = (window, f"99 % of the users have at most {q99:.0f} events")
        # Slates train and measure heads of kind `label`. Half of the users should be long enough for one.
        median = float(np.median(known[known > 0])) if (known > 0).any() else 1.0
        size = int(np.clip(median / 4, 1, MOST_SLATE)) if labels else 1
        reason = f"a quarter of the median history of {median:.0f} events" if labels else "no head of kind label"
        chosen["slate_size"] = (size, reason)
        chosen["slate_users"] = (
            min(1_000, able // 10) if labels else 0,
            reason if not labels else "a tenth of the users",
        )
        # Each validation user loses a slate. With one event that is little, so a small table may use half of its users.
        validated = min(MOST_VALIDATED, able // (5 if labels else 2))
        chosen["validation_users"] = (validated, f"{able} users have {LEAST_TO_VALIDATE} events before the test event")
    config = apply(config, "split", chosen, stated)
    if config.validation_users > able:
        print(
            f"validation_users = {config.validation_users} is reduced to {able}: no more users have two events to hold"
        )
        config = dataclasses.replace(config, validation_users=able)
    return config


def choose_training(config: Config, lengths: np.ndarray, items: int, shown: bool = False) -> Config:
    """Return the config with the keys of `[model]` and `[train]` that the TOML leaves out.

    lengths: (U,) training events of each user; items: number of items; shown: whether the tables have slates that users
    were shown.
    """
    events = int(lengths.sum())
    median = float(np.median(lengths[lengths > 0]))
    labels = any(head.kind == "label" for head in config.data.heads)
    long = median >= LONG_HISTORY
    model: Chosen = {}
    if config.model.family == families.DEFAULT_FAMILY:
        model["width"] = (64 if items >= MANY_ITEMS else 32, f"{items} items")
        model["blocks"] = (2 if long else 1, f"the median history has {median:.0f} events")
        model["feed_forward"] = (4 if long else 1, f"the median history has {median:.0f} events")
        # Each event of a sparse table is learned from many times: strong dropout, and more epochs until the plateau.
        model["dropout"] = (0.2 if long else 0.4, f"the median history has {median:.0f} events")
        # A field's few vectors get a gradient in every step, and overfit long before the items' own.
        if config.data.categorical or config.data.text:
            model["field_dropout"] = (0.0 if long else 0.5, f"the median history has {median:.0f} events")
        # Without labels or slates, the order of the other candidates says nothing about the next item.
        reason = "a head of kind label" if labels else "no head of kind label"
        model["set_blocks"] = (1 if labels or shown else 0, "slates that were shown" if shown else reason)
    shape = dict(config.model.shape)
    say("model", {k: v for k, v in model.items() if k not in shape})
    shape = {k: v for k, (v, _) in model.items()} | shape
    least = max(SMALLEST_BATCH, 2 ** int(np.ceil(np.log2(LEAST_USERS * median))))
    batch = min(max(2 ** round(np.log2(max(1, events) / STEPS)), least), LARGEST_BATCH)
    batch = config.train.batch_events if "train.batch_events" in config.stated else batch
    epochs = int(np.clip(MOST_SEEN // max(1, events), 10, 200))
    epochs = config.train.epochs if "train.epochs" in config.stated else epochs
    every = max(1, min(4, epochs // 10))
    train: Chosen = {
        "epochs": (epochs, f"at most; {events} training events"),
        "patience": (5, "validations without a better NDCG@10"),
        "validate_every": (every, "epochs"),
        "cascade_epochs": (max(1, min(8, epochs // 5)), "at the end, with a falling learning rate"),
        "batch_events": (batch, f"about {max(1, round(events / batch))} steps in an epoch"),
        "learning_rate": (round(RATE * (batch / RATE_BATCH) ** 0.5, 5), "by the root of the batch"),
        "warmup": (round(min(0.05, 2 / epochs), 4), "share of the run"),
        "negatives": (1_024, "shared by a batch"),
        # Large random embeddings hide for many epochs that similar items are similar, most of all on sparse tables.
        "embedding_std": (EMBEDDING_STD, "small vectors learn faster"),
        "cascade_draw": ("log", "short histories as well as long ones"),
    }
    if "train.warmup_steps" in config.stated:  # it replaces the share
        del train["warmup"]
    return dataclasses.replace(
        config,
        model=ModelConfig(config.model.family, shape),
        train=apply(config.train, "train", train, config.stated),
    )


def apply(config: Any, table: str, chosen: Chosen, stated: frozenset[str] | None) -> Any:
    """Return a dataclass with the chosen values of the keys that are not stated, and print them."""
    new = {key: value for key, value in chosen.items() if stated is None or f"{table}.{key}" not in stated}
    say(table, new)
    return dataclasses.replace(config, **{key: value for key, (value, _) in new.items()})


def say(table: str, chosen: Mapping[str, tuple[Any, str]]) -> None:
    """Print the chosen values with their reasons."""
    if chosen:
        texts = [f"{key} = {value} ({reason})" for key, (value, reason) in chosen.items()]
        print(f"chosen from the tables, [{table}]: {', '.join(texts)}", flush=True)
