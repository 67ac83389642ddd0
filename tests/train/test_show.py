from __future__ import annotations

import numpy as np

from slatewise.bundle.ranker import Ranker
from slatewise.schemas import RankRequest
from slatewise_train.demo.show import recommend
from tests.conftest import Tiny


def test_what_is_shown_is_new_to_the_user_and_in_order(tiny: Tiny, ranker: Ranker) -> None:
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
