"""Show a ranker's recommendations for users, as Markdown, so that a person can judge them.

    python -m slatewise_train.demo.show models/movielens.toml small:1 small:15

Prints a user's last six items rated 4 or more, and the ten best new items. The exit `point` selects 100 items from the
catalogue; the exit `set` reranks them.

Called by: the command line. Calls: `bundle/loader.py`, `content.py`, `data.py`,
`evaluation/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slatewise.bundle.files import Files
from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import bundle_folder
from slatewise.bundle.ranker import Ranker, weighted_mean
from slatewise.cli import run_main
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM, Candidates
from slatewise.schemas import RankRequest
from slatewise_train.config import read_config
from slatewise_train.data import Data, Sequences, load_data
from slatewise_train.demo.content import demo_sequences
from slatewise_train.evaluation.offline import RERANKED
from slatewise_train.evaluation.report import markdown_table

BEST = 10
LIKED_SHOWN = 6
LIKED = ("like", "love")  # actions of MovieLens events rated 4 or more


def recommend(
    ranker: Ranker, data: Data, request: RankRequest, seen: np.ndarray, count: int
) -> list[tuple[str, float]]:
    """Return the `count` best (item id, score) of the catalogue in descending order, without the item rows `seen`."""
    engine = ranker.engines[ranker.default_variant]
    weights = ranker.score_weights(None)
    history = ranker.history(request)
    given, _ = ranker.candidates(request, request.request_time or 0.0)
    meta = ranker.embedded_meta_of(str(request.user))
    state = engine.extend(engine.start, history) if len(history) else engine.start
    rows = np.setdiff1d(np.arange(FIRST_ITEM, len(ranker.items)), seen)

    def candidates(rows: np.ndarray) -> Candidates:
        return Candidates(engine.items.take(rows, axis=0), data.catalogue.numeric[rows], given.context)

    first = weighted_mean(engine.point(candidates(rows), meta, state).probabilities, weights)
    rows = rows[np.argsort(-first, kind="stable")[:RERANKED]]
    point = engine.point(candidates(rows), meta, state)
    probabilities = engine.set(point) if "set" in ranker.manifest.exits else point.probabilities
    scores = weighted_mean(probabilities, weights)
    best = np.argsort(-scores, kind="stable")[:count]
    return [(data.catalogue.vocabulary.items[rows[k] - FIRST_ITEM], float(scores[k])) for k in best]


def known_rows(sequences: Sequences, user: int) -> np.ndarray:
    """Return the rows of a user's events whose item the ranker knows."""
    rows: np.ndarray = np.arange(sequences.offsets[user], sequences.offsets[user + 1])
    known: np.ndarray = rows[sequences.items[rows] != UNKNOWN_ITEM]
    return known


def whole_history(name: str, data: Data, sequences: Sequences, rows: np.ndarray) -> RankRequest:
    """Build a request with the events in `rows` as the history, at the time of the last event."""
    actions = [None, *data.catalogue.vocabulary.actions]
    items = [data.catalogue.vocabulary.items[r - FIRST_ITEM] for r in sequences.items[rows]]
    history = {
        "item_ids": items,
        "actions": [actions[a] for a in sequences.actions[rows]],
        "timestamps": sequences.timestamps[rows].tolist(),
    }
    time = float(sequences.timestamps[rows[-1]])
    body = {"user": name, "history": history, "candidates": {"item_ids": items[:1]}, "request_time": time}
    return RankRequest.model_validate(body)


def describe(name: str, ranker: Ranker, data: Data, request: RankRequest, display: dict[str, dict[str, Any]]) -> str:
    """Return Markdown of the user's last liked items and of the recommendations."""

    def cells(item: str) -> list[str]:
        shown = display.get(item, {"title": item})
        return [shown["title"], ", ".join(shown.get("genres", []))]

    items = [str(item) for item in request.history.item_ids]
    liked = [item for item, action in zip(items, request.history.actions or [], strict=True) if action in LIKED]
    seen = np.array([ranker.vocabulary.items[item] for item in items])
    best = recommend(ranker, data, request, seen, BEST)
    return "\n".join(
        [
            f"**{name}**, {len(items)} known events; the last of those rated 4 or more",
            "",
            *markdown_table(["title", "genres"], [cells(item) for item in liked[-LIKED_SHOWN:]]),
            "",
            "the ten best of the items that are new to the user",
            "",
            *markdown_table(["title", "genres", "score"], [[*cells(item), f"{score:.3f}"] for item, score in best]),
            "",
        ]
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toml", type=Path)
    parser.add_argument("users", nargs="+")
    parser.add_argument("--bundle", type=Path, help="default: the newest version under models/bundles/NAME")
    args = parser.parse_args(argv)
    config = read_config(args.toml)
    folder = bundle_folder(args.bundle or Path("models/bundles") / config.data.name)
    ranker = load_bundle(folder)
    data = load_data(config.data, config.tables, config.stated)
    sequences = demo_sequences(data, config)
    prefix = config.demo.user_prefix if config.demo else ""
    display = Files(folder, None).read_json("display.json")
    for name in args.users:
        user = sequences.users.index(name.removeprefix(prefix))
        request = whole_history(name, data, sequences, known_rows(sequences, user))
        print(describe(name, ranker, data, request, display))


if __name__ == "__main__":
    sys.exit(run_main("python -m slatewise_train.demo.show", main, sys.argv[1:]))
