"""The committed demo bundle, and the response that the README shows."""

from __future__ import annotations

import json

import pytest

from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.http.support import (
    BOUND,
    ask,
    by_item,
)
from tests.support.application import serve


def test_committed_demo_serves_its_example() -> None:
    with serve(Settings(bundles=DEMO)) as client:
        card = client.get("/models/movielens").json()
        assert card["refused_variants"] == {}
        example = card["example"]
        assert len(example["candidates"]["item_ids"]) >= 20 and len(example["history"]["item_ids"]) >= 10
        answer = ask(client, example, "/rerank")
        assert answer["meta_embedding"]["status"] == "hit" and answer["exit"] == "set" and not answer["degraded"]
        assert len(set(answer["results"]["scores"])) > 10
        half = {"item_ids": example["candidates"]["item_ids"][:10]}
        a, b = (
            by_item(ask(client, example, user=f"set-{k}", candidates=c))
            for k, c in enumerate((half, {"item_ids": example["candidates"]["item_ids"]}))
        )
        assert max(abs(a[i] - b[i]) for i in a) > 10 * BOUND, "the demo is not set-wise"


def test_readme_shows_the_real_response_of_the_demo() -> None:
    text = (DEMO.parent.parent / "README.md").read_text()
    request, answer = (
        json.loads(text[start : text.index(end, start)])
        for start, end in ((text.index('{"user"'), "'\n```"), (text.index('{"id": '), "\n```"))
    )
    with serve(Settings(bundles=DEMO)) as client:
        found = ask(client, request, "/rerank")
    assert found.keys() == answer.keys() and found["timings_ms"].keys() == answer["timings_ms"].keys()
    for member in ("ranker", "version", "variant", "exit", "unknown_candidates", "history", "degraded"):
        assert found[member] == answer[member]
    assert (
        found["results"]["index"] == answer["results"]["index"]
        and found["results"]["item_ids"] == answer["results"]["item_ids"]
    )
    assert found["results"]["scores"] == pytest.approx(answer["results"]["scores"], abs=1e-4)
