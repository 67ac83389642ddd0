"""The demo of recommendations."""

from __future__ import annotations

import numpy as np

from slatewise.bundle.ranker import Ranker
from slatewise.schemas import RankRequest
from slatewise_train.demo.show import describe, known_rows, recommend, whole_history
from tests.conftest import Tiny


def test_recommend_returns_new_items_in_order(tiny: Tiny, ranker: Ranker) -> None:
    data = tiny.trainer.data
    user = next(iter(ranker.embedded_users))
    seen = data.sequences.items[data.sequences.offsets[0] : data.sequences.offsets[1]]
    history = [data.catalogue.vocabulary.items[row - 2] for row in seen]
    request = RankRequest.model_validate(
        {"user": user, "history": {"item_ids": history}, "candidates": {"item_ids": history[:1]}, "request_time": 0}
    )
    best = recommend(ranker, data, request, np.array(seen), 10)
    items, scores = zip(*best, strict=True)
    assert len(set(items)) == 10 and not set(items) & set(history)
    assert list(scores) == sorted(scores, reverse=True)


def test_describe_shows_liked_items_and_recommendations(tiny: Tiny, ranker: Ranker) -> None:
    data = tiny.trainer.data
    request = whole_history("1", data, data.sequences, known_rows(data.sequences, 0))
    display = {item: {"title": f"Title {item}", "genres": ["Drama"]} for item in ranker.vocabulary.items}
    text = describe("1", ranker, data, request, display)
    assert text.startswith(f"**1**, {len(request.history.item_ids)} known events")
    liked = sum(action in ("like", "love") for action in request.history.actions or [])
    assert liked and text.count("| Drama |") == 10 + min(6, liked), "ten recommendations, at most six liked items"
