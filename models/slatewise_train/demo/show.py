"""What a ranker shows to a user: python -m slatewise_train.demo.show models/movielens.toml small:1 small:15

Prints, as Markdown, the end of the user's history and the ten best of the catalogue that the user has not met (the
exit `set` over the hundred best of `point`). Before: `export.py`. After: a person decides whether it is plausible.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from slatewise.bundle.features import make_candidates
from slatewise.bundle.loader import load_bundle, read_json, versions
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM, Candidates
from slatewise.schemas import RankRequest
from slatewise_train.config import read_config
from slatewise_train.data import Data, build_sequences, clean_events, load_data, read_table
from slatewise_train.evaluation.offline import RERANKED


def recommend(
    ranker: Ranker, data: Data, request: RankRequest, seen: np.ndarray, count: int
) -> list[tuple[str, float]]:
    """The best (item id, score) of the catalogue without `seen`."""
    engine = ranker.engines[ranker.default_variant]
    weights = ranker.score_weights(None)
    history, _ = ranker.history(request)
    meta = ranker.embedded_meta_of(str(request.user))
    state = engine.extend(engine.start, history) if len(history) else engine.start
    rows = np.setdiff1d(np.arange(FIRST_ITEM, len(ranker.items)), seen)

    def of(rows: np.ndarray) -> Candidates:
        return make_candidates(ranker.items, rows, data.catalogue.numeric[rows], request.request_time or 0.0)

    rows = rows[np.argsort(-(engine.point(of(rows), meta, state).probabilities @ weights), kind="stable")[:RERANKED]]
    point = engine.point(of(rows), meta, state)
    scores = (engine.set(point) if "set" in ranker.manifest.exits else point.probabilities) @ weights
    best = np.argsort(-scores, kind="stable")[:count]
    return [(data.catalogue.vocabulary.items[rows[k] - FIRST_ITEM], float(scores[k])) for k in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toml", type=Path)
    parser.add_argument("users", nargs="+")
    parser.add_argument("--bundle", type=Path, help="default: the newest version under models/bundles/NAME")
    args = parser.parse_args()
    toml = read_config(args.toml)
    config = toml.data
    home = Path("models/bundles") / config.name
    folder = args.bundle or home / str(max(versions(home), default=0))
    ranker = load_bundle(folder, 1)
    data = load_data(config, toml.tables)
    source = toml.demo or toml.tables
    events, _ = clean_events(read_table(Path(source.events)), config.max_bad_share)
    sequences = build_sequences(events, data.catalogue.vocabulary, config)
    display: dict[str, dict[str, Any]] = read_json(folder / "display.json")
    actions = [None, *data.catalogue.vocabulary.actions]

    def line(item: str) -> str:
        shown = display.get(item, {"title": item})
        return f"{shown['title']} | {', '.join(shown.get('genres', []))}"

    for name in args.users:
        user = sequences.users.index(name.removeprefix(toml.demo.user_prefix if toml.demo else ""))
        rows = np.arange(sequences.offsets[user], sequences.offsets[user + 1])
        rows = rows[sequences.items[rows] != UNKNOWN_ITEM]
        items = [data.catalogue.vocabulary.items[r - FIRST_ITEM] for r in sequences.items[rows]]
        request = RankRequest.model_validate(
            {
                "user": name,
                "history": {
                    "item_ids": items,
                    "actions": [actions[a] for a in sequences.actions[rows]],
                    "timestamps": sequences.timestamps[rows].tolist(),
                },
                "candidates": {"item_ids": items[:1]},
                "request_time": float(sequences.timestamps[rows[-1]]),
            }
        )
        print(
            f"**{name}**, {len(items)} known events; the last of those rated 4 or more\n\n| title | genres |\n| --- | --- |"
        )
        for k in [k for k, r in enumerate(rows) if actions[sequences.actions[r]] in ("like", "love")][-6:]:
            print(f"| {line(items[k])} |")
        print("\nthe ten best of what is new to the user\n\n| title | genres | score |\n| --- | --- | --- |")
        for item, score in recommend(ranker, data, request, sequences.items[rows], 10):
            print(f"| {line(item)} | {score:.3f} |")
        print()


if __name__ == "__main__":
    main()
