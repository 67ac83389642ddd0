"""Build the content that a bundle shows and tests with.

It consists of users with their vectors, titles of items, an example request, and requests to warm up a server. Users
of the training data never become part of it: without a table `[demo]` the only user is made up.

Called by: `export.py`, `demo/reference.py`, `demo/show.py`. Calls: `data.py`, `tables/`; `meta/limaml.py` for the
users' vectors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM
from slatewise.inference.engine import CANDIDATE_CHUNK, HISTORY_CHUNK, SLATE
from slatewise_train.config import Config, TablesConfig
from slatewise_train.data import (
    Data,
    Sequences,
    build_sequences,
    request_times,
    taken_events,
    values_of,
)
from slatewise_train.meta.limaml import MetaLearner, user_vectors
from slatewise_train.rankers.base import RankerModel
from slatewise_train.tables.events import read_events
from slatewise_train.tables.items import join_ids, plain_ids, read_items

EXAMPLE_CANDIDATES = 24
EXAMPLE_EVENTS = 40
SHORTEST = 3  # events of a user with a request of its own: two to read, and one as a candidate
LONG_HISTORY = 100  # the example's user has at least this many events, if any user has
POPULAR = 500  # the example's candidates are among this many most popular items
EXAMPLE_USERS = 12  # demo users with a request of their own, at most
MADE_UP_USER = "example-1"
MADE_UP_START = 1_700_000_000  # unix seconds of the made-up user's first event
MADE_UP_GAP = 40_000  # seconds between two events, at most
MADE_UP_EVENTS = EXAMPLE_EVENTS + EXAMPLE_CANDIDATES // 2


@dataclass(frozen=True)
class DemoData:
    """Users with their events and vectors, titles and fields of items."""

    sequences: Sequences
    users: list[str]
    vectors: np.ndarray  # (users, M) float32; (0, M) without a meta block
    titles: dict[str, dict[str, Any]]  # item id -> {"title": ..., column: [values]}


def demo_data(data: Data, model: RankerModel, learner: MetaLearner | None, config: Config) -> DemoData:
    """Read the users of the TOML's table `[demo]`, or make one up when there is no such table."""
    demo = config.demo
    items, _ = join_ids(plain_ids(read_items(demo_tables(config))), id_frame(data.catalogue.vocabulary.items))
    columns: dict[str, list[list[str]]] = {
        c: values_of(items[c]) if c in items.columns else [[]] * len(items) for c in data.config.categorical
    }
    known = set(data.catalogue.vocabulary.items)
    titles = {
        item: {"title": title} | {c: values[k] for c, values in columns.items()}
        for k, (item, title) in enumerate(zip(items["item_id"], titles_of(items, data.config.title)))
        if item in known
    }
    if demo is None:
        sequences = made_up_sequences(data, np.random.default_rng(0))
        users = sequences.users
    else:
        sequences = demo_sequences(data, config)
        users = [demo.user_prefix + user for user in sequences.users]
    if learner is None:
        vectors = np.zeros((0, model.meta_size), np.float32)
    else:
        kinds = [head.kind for head in data.config.heads]
        vectors = user_vectors(learner, model, kinds, sequences, data.config.history_length)
    return DemoData(sequences, users, vectors, titles)


def titles_of(items: pl.DataFrame, column: str) -> pl.Series:
    """Return the titles as text. A column of another type, such as a date, is written as text as well."""
    if column not in items.columns or items[column].dtype.is_nested():
        return pl.repeat(None, len(items), dtype=pl.String, eager=True)
    return items[column].cast(pl.String, strict=False)


def demo_tables(config: Config) -> TablesConfig:
    """Return the tables of `[demo]`, or without it those of `[data]`. `[data]` and `[columns]` say how to read both."""
    if config.demo is None:
        return config.tables
    items = config.demo.items or config.tables.items
    return dataclasses.replace(config.tables, events=config.demo.events, items=items)


def demo_sequences(data: Data, config: Config) -> Sequences:
    """Read the histories of the users in `demo_tables`. Rows that were only shown are left out, as in the training."""
    tables = demo_tables(config)
    events, _ = read_events(tables, data.config.max_bad_share)
    _, events = join_ids(id_frame(data.catalogue.vocabulary.items), events)
    taken = taken_events(events, tables.history_actions, data.config.heads, tables.events)
    return build_sequences(taken, data.catalogue.vocabulary, data.config)


def id_frame(ids: list[str]) -> pl.DataFrame:
    return pl.DataFrame({"item_id": ids}, schema={"item_id": pl.String})


def made_up_sequences(data: Data, rng: np.random.Generator) -> Sequences:
    """Make up the events of one user: distinct items by popularity, actions by frequency, invented times and labels.

    Each item is drawn apart from the others, so the events are not those of any user.
    """
    s = data.sequences
    counts = np.bincount(s.items, minlength=len(data.catalogue.numeric))[FIRST_ITEM:]
    size = min(MADE_UP_EVENTS, int((counts > 0).sum()))
    items = FIRST_ITEM + rng.choice(len(counts), size, replace=False, p=counts / counts.sum())
    actions = np.bincount(s.actions, minlength=1)
    times = MADE_UP_START + np.cumsum(rng.integers(60, MADE_UP_GAP, size)).astype(np.float64)
    labels = np.ones((size, len(data.config.heads)), np.float32)
    for k, head in enumerate(data.config.heads):
        if head.kind == "label":
            labels[:, k] = rng.integers(0, 2, size)
    drawn = rng.choice(len(actions), size, p=actions / actions.sum())
    return Sequences([MADE_UP_USER], np.array([0, size]), items, drawn, times, labels)


def example_request(shown: DemoData, data: Data, rng: np.random.Generator) -> dict[str, Any]:
    """Build a request of the first user with a long history, or of the user with the longest one."""
    lengths = np.diff(shown.sequences.offsets)
    long = lengths >= LONG_HISTORY
    user = int(np.flatnonzero(long)[0]) if long.any() else int(lengths.argmax())
    return make_request(shown, data, user, rng)


def example_requests(
    shown: DemoData, data: Data, example: dict[str, Any], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Build requests of demo users with at least `least_events` events, the given one first, and print their number.

    The other users are spread over the demo users in the order of the length of their histories.
    """
    lengths = np.diff(shown.sequences.offsets)
    least = least_events(lengths)
    long = np.flatnonzero(lengths >= least)
    long = long[np.argsort(lengths[long], kind="stable")]
    picked = long[np.unique(np.linspace(0, len(long) - 1, EXAMPLE_USERS).astype(int))] if len(long) else long
    others = [make_request(shown, data, int(user), rng) for user in picked if shown.users[user] != example["user"]]
    requests = [example, *others[: EXAMPLE_USERS - 1]]
    if shown.users != [MADE_UP_USER]:
        reason = f"of the {len(long)} with at least {least} known events, and at most {EXAMPLE_USERS}"
        print(f"[demo] {len(requests)} of {len(lengths)} users have a request in the bundle: {reason}", flush=True)
    return requests


def least_events(lengths: np.ndarray) -> int:
    """Return the events of a user with a request of its own: EXAMPLE_EVENTS, or less if too few users have these."""
    nth = int(np.sort(lengths)[-EXAMPLE_USERS:][0]) if len(lengths) else 0
    return min(EXAMPLE_EVENTS, max(SHORTEST, nth))


def make_request(shown: DemoData, data: Data, user: int, rng: np.random.Generator) -> dict[str, Any]:
    """Build a request of a demo user, as JSON.

    The user's last events are not in the history. They are candidates, among popular items that do not occur in the
    user's events.
    """
    s = shown.sequences
    rows = np.arange(s.offsets[user], s.offsets[user + 1])
    rows = rows[s.items[rows] != UNKNOWN_ITEM]
    count = len(rows) - min(EXAMPLE_CANDIDATES // 2, len(rows) // 3)  # a user with one or two events has them read
    ahead = rows[count:]
    read = rows[:count][-EXAMPLE_EVENTS:]
    slate = draw_slate(shown, data, s.items[rows], s.items[ahead], rng)
    numeric = data.catalogue.numeric[slate]
    vocabulary = data.catalogue.vocabulary
    actions = [None, *vocabulary.actions]
    history: dict[str, Any] = {"item_ids": [vocabulary.items[r - FIRST_ITEM] for r in s.items[read]]}
    if vocabulary.actions:
        history["actions"] = [actions[a] for a in s.actions[read]]
    times = s.timestamps[read]
    if not np.isnan(times).any():  # `time_unit = "row"`: the events have no times
        history["timestamps"] = [int(t) for t in times]
    features = {
        f: [None if np.isnan(v) else round(float(v), 3) for v in numeric[:, k]]
        for k, f in enumerate(data.config.numeric)
    }
    return {
        "user": shown.users[user],
        "history": history,
        "candidates": {"item_ids": [vocabulary.items[r - FIRST_ITEM] for r in slate], "features": features},
        "request_time": int(request_times(times)[-1]) if len(times) else MADE_UP_START,
    }


def draw_slate(shown: DemoData, data: Data, met: np.ndarray, ahead: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the item rows of the candidates, shuffled.

    They are `ahead`, filled up with popular items that have a title and are not among `met`.
    """
    vocabulary = data.catalogue.vocabulary
    counts = np.bincount(data.sequences.items, minlength=len(data.catalogue.numeric))[FIRST_ITEM:]
    popular = FIRST_ITEM + np.argsort(-counts, kind="stable")
    titled = np.array([vocabulary.items[r - FIRST_ITEM] in shown.titles for r in popular[:POPULAR]])
    unmet = np.setdiff1d(popular[:POPULAR][titled], met)
    among = next(rows for rows in (unmet, met, popular) if len(rows))
    wanted = EXAMPLE_CANDIDATES - len(ahead)
    drawn = rng.choice(among, wanted, replace=len(among) < wanted)  # a small catalogue repeats items
    slate = np.concatenate([ahead, drawn])
    rng.shuffle(slate)
    return slate


def warmup_requests(
    example: dict[str, Any], ids: list[str], longest_history: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Build requests of the smallest and largest shapes.

    A server runs them at its start, so that memory is allocated before the first client's request.
    """
    result = []
    for events, n in ((0, 1), (1, 20), (longest_history, CANDIDATE_CHUNK), (HISTORY_CHUNK, SLATE)):
        history = rng.integers(0, len(ids), events)
        slate = rng.integers(0, len(ids), n)
        result.append(
            {
                "history": {"item_ids": [ids[k] for k in history]},
                "candidates": {"item_ids": [ids[k] for k in slate]},
                "request_time": example["request_time"],
            }
        )
    return result
