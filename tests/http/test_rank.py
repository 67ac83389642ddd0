"""/rerank and /score over HTTP, on a real server and a real socket."""

from __future__ import annotations

import gzip
import json
import threading
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slatewise.settings import Settings
from tests.conftest import Tiny
from tests.http.support import (
    BOUND,
    RESPONSE,
    ask,
    assert_alive,
    assert_problem,
    by_item,
    sums,
)
from tests.support.application import serve


def test_response_has_exactly_the_documented_members(client: httpx.Client, example: dict[str, Any]) -> None:
    for path in ("/rerank", "/score"):
        answer = client.post(path, json=example)
        RESPONSE.validate_json(answer.content)  # forbids extra members
        assert set(answer.json()["timings_ms"]) >= {"parse", "features", "embed", "queue", "encode", "score", "total"}
        assert "total;dur=" in answer.headers["Server-Timing"]


def test_rerank_equals_score_sorted_and_cut_to_top_n(client: httpx.Client, example: dict[str, Any]) -> None:
    scored = ask(client, example)
    ranked = ask(client, example, "/rerank")
    n = len(example["candidates"]["item_ids"])
    assert scored["results"]["index"] == list(range(n))
    assert ranked["results"]["scores"] == sorted(scored["results"]["scores"], reverse=True)
    assert [example["candidates"]["item_ids"][i] for i in ranked["results"]["index"]] == ranked["results"]["item_ids"]
    assert ask(client, example, "/rerank", top_n=3)["results"]["index"] == ranked["results"]["index"][:3]
    assert len(ask(client, example, "/score", top_n=3)["results"]["index"]) == n


def test_pruned_answer_names_its_numbers(client: httpx.Client, example: dict[str, Any]) -> None:
    n = len(example["candidates"]["item_ids"])
    prune = {"point": n - 1, "set": n - 2}
    body = example | {"exit": "set", "prune": prune, "top_n": 3}
    answer = client.post("/rerank", json=body)
    RESPONSE.validate_json(answer.content)
    found = answer.json()
    assert (found["exit"], found["pruned"], len(found["results"]["index"])) == ("set", prune, 3)
    assert found["results"]["scores"] == sorted(found["results"]["scores"], reverse=True)
    assert "pruned" not in ask(client, body, "/rerank", prune=False)
    scored = ask(client, body, "/score")
    assert "pruned" not in scored and scored["results"]["index"] == list(range(n))


@pytest.mark.parametrize(
    ("prune", "pointer", "word"),
    [
        ({"point": 5, "set": 6}, "/prune", "`set` must be at most `point`"),
        ({"point": 0}, "/prune/point", "greater than or equal to 1"),
        ({"set": "5"}, "/prune/set", "integer"),
        ({"dot": 5}, "/prune/dot", "known: point, set"),
        (True, "/prune", "or false"),
        ([5, 6], "/prune", "or false"),
    ],
)
def test_wrong_prune_is_refused(
    client: httpx.Client, example: dict[str, Any], prune: Any, pointer: str, word: str
) -> None:
    answer = client.post("/rerank", json=example | {"prune": prune})
    (fault,) = answer.json()["errors"]
    assert answer.status_code == 422 and fault["pointer"] == pointer and word in fault["detail"]


def test_input_order_response_has_no_scores_heads_or_variant(client: httpx.Client, example: dict[str, Any]) -> None:
    ids = example["candidates"]["item_ids"]
    for path, n in (("/rerank", 3), ("/score", len(ids))):
        answer = client.post(path, json=example | {"deadline_ms": 0.001, "top_n": 3})
        RESPONSE.validate_json(answer.content)
        found = answer.json()
        assert (found["exit"], found["variant"], found["degraded"]) == ("input_order", None, ["deadline"])
        assert found["results"] == {"index": list(range(n)), "item_ids": ids[:n], "scores": None, "heads": {}}


def test_duplicate_candidates_are_each_ranked(client: httpx.Client, example: dict[str, Any]) -> None:
    item = example["candidates"]["item_ids"][0]
    answer = ask(client, example, candidates={"item_ids": [item, item, item]}, exit="point")
    scores = answer["results"]["scores"]
    assert answer["results"]["item_ids"] == [item] * 3 and scores == pytest.approx([scores[0]] * 3, abs=BOUND)


def test_integer_ids_up_to_64_bits_equal_their_strings(client: httpx.Client, example: dict[str, Any]) -> None:
    ids = [int(i) for i in example["candidates"]["item_ids"]]
    assert by_item(ask(client, example)) == by_item(
        ask(client, example, candidates=example["candidates"] | {"item_ids": ids})
    )
    assert ask(client, example, candidates={"item_ids": [2**63, -1, 0, 18446744073709551615]})[
        "unknown_candidates"
    ] == [0, 1, 2, 3]
    assert_problem(client.post("/score", json=example | {"candidates": {"item_ids": [2**70]}}), 422)
    mixed: list[Any] = [str(i) if k % 2 else i for k, i in enumerate(ids)]
    found = ask(client, example, candidates=example["candidates"] | {"item_ids": mixed})["results"]
    assert found["item_ids"] == example["candidates"]["item_ids"], "the answer has them as text"


def test_unknown_items_are_flagged_and_ranked_by_their_fields(client: httpx.Client, example: dict[str, Any]) -> None:
    ids = [*example["candidates"]["item_ids"][:3], "no-such-item", "nor-this"]
    plain = ask(client, example, candidates={"item_ids": ids}, exit="point")
    assert plain["unknown_candidates"] == [3, 4] and len(plain["results"]["scores"]) == 5
    assert plain["results"]["scores"][3] == pytest.approx(plain["results"]["scores"][4], abs=BOUND)
    fields = {
        "genres": [None, None, None, ["Comedy", "never heard of"], None],
        "decade": [None, None, None, "1990s", None],
    }
    described = ask(client, example, candidates={"item_ids": ids, "fields": fields}, exit="point")
    assert abs(described["results"]["scores"][3] - plain["results"]["scores"][3]) > 10 * BOUND
    assert described["results"]["scores"][4] == pytest.approx(plain["results"]["scores"][4], abs=BOUND)


def test_field_text_with_separators_equals_a_list(client: httpx.Client, example: dict[str, Any]) -> None:
    ids = [*example["candidates"]["item_ids"][:2], "new", "newer"]
    answers = []
    for genres in (["Comedy", "Drama", "never heard of"], "Comedy|Drama|never heard of"):
        candidates = {"item_ids": ids, "fields": {"genres": ["never heard of", None, genres, None]}}
        answers.append(ask(client, example, candidates=candidates))
        assert answers[-1]["unknown_values"] == {"genres": 1}, "fields of known items are not read"
    assert answers[0]["results"]["scores"] == pytest.approx(answers[1]["results"]["scores"], abs=BOUND)
    assert ask(client, example)["unknown_values"] == {}


def test_newest_first_history_scores_as_oldest_first(client: httpx.Client, example: dict[str, Any]) -> None:
    history = example["history"]
    base = ask(client, example, user="oldest-first")
    assert base["history"]["reordered"] == 0
    backwards = {name: column[::-1] for name, column in history.items()}
    other = ask(client, example, history=backwards, user="newest-first")
    assert other["history"]["reordered"] > 0
    assert by_item(other) == pytest.approx(by_item(base), abs=BOUND)
    again = ask(client, example, user="newest-first")
    assert again["history"]["cache"] == "hit", "the cached events are those that are read"


def test_every_member_of_the_request_changes_scores(client: httpx.Client, example: dict[str, Any]) -> None:
    base = by_item(ask(client, example, user="fresh-0"))
    history = example["history"]
    candidates = example["candidates"]
    changes: dict[str, dict[str, Any]] = {
        "item_ids": {"history": history | {"item_ids": history["item_ids"][::-1]}},
        "actions": {"history": history | {"actions": ["hate"] * len(history["item_ids"])}},
        "timestamps": {"history": history | {"timestamps": [t * 2 for t in history["timestamps"]]}},
        "request_time": {"request_time": example["request_time"] + 40_000},
        "head_weights": {"head_weights": {"like": 1.0}},
        "exit": {"exit": "dot"},
        "user": {"user": example["user"]},
    }
    for name, column in candidates["features"].items():
        changes[name] = {
            "candidates": candidates | {"features": candidates["features"] | {name: [v + 1 for v in column]}}
        }
    for k, (name, change) in enumerate(changes.items()):
        other = by_item(ask(client, example | {"user": f"fresh-{k + 1}"} | change))
        assert max(abs(base[i] - other[i]) for i in base) > BOUND, name


def test_history_offset_moves_the_window_of_read_events(client: httpx.Client, example: dict[str, Any]) -> None:
    """At most 128 events are read, from a multiple of 64 on."""
    many = {name: (column * 10)[:200] for name, column in example["history"].items()}
    many["timestamps"] = sorted(many["timestamps"])
    for offset, first in (
        (0, 128),
        (8, 120),
        (56, 72),
        (60, 132),
    ):  # the last 128 of 200 events begin at 72, and 60 + 72 = 132 is above 128
        answer = ask(client, example, history=many | {"offset": offset}, user=f"offset-{offset}")
        assert (answer["history"]["used"], answer["history"]["dropped"]) == (200 - first, first)


def test_request_id_and_user_come_from_body_or_header(client: httpx.Client, example: dict[str, Any]) -> None:
    answer = client.post("/rerank", json=example | {"id": "r-81f4"})
    assert answer.json()["id"] == answer.headers["X-Request-ID"] == "r-81f4"
    answer = client.post("/rerank", json=example, headers={"X-Request-ID": "r-2"})
    assert answer.json()["id"] == answer.headers["X-Request-ID"] == "r-2"
    without = {k: v for k, v in example.items() if k != "user"}
    answer = client.post("/score", json=without, headers={"X-User-ID": example["user"]})
    assert answer.json()["meta_embedding"]["status"] == "hit"
    assert_problem(client.post("/score", json=example, headers={"X-User-ID": "another"}), 422)
    number = client.post("/score", json=without | {"user": 6040}, headers={"X-User-ID": "6040"})
    assert number.status_code == 200, "an integer is its decimal string, in the body as in the header"
    problem = assert_problem(client.post("/score", json=example | {"id": "r-3", "ranker": "none"}), 404)
    assert problem["request_id"] == "r-3"
    assert_problem(client.post("/score", json=example, headers={"X-Request-ID": "x" * 300}), 422)


def test_body_is_limited_as_sent_and_decompressed(client: httpx.Client, example: dict[str, Any]) -> None:
    body = json.dumps(example).encode()
    kind = {"Content-Type": "application/json"}
    packed = client.post("/score", content=gzip.compress(body), headers=kind | {"Content-Encoding": "gzip"})
    assert by_item(packed.json()) == by_item(ask(client, example))
    assert_problem(client.post("/score", content=b" " * 1_000_001, headers=kind), 413)
    assert_problem(client.post("/score", content=iter([b" " * 100_000] * 11), headers=kind), 413)  # chunked, no length
    bomb = gzip.compress(b" " * 50_000_000)
    assert_problem(client.post("/score", content=bomb, headers=kind | {"Content-Encoding": "gzip"}), 413)
    assert_problem(
        client.post("/score", content=gzip.compress(body)[:-5], headers=kind | {"Content-Encoding": "gzip"}), 400
    )
    assert_problem(client.post("/score", content=body, headers=kind | {"Content-Encoding": "br"}), 415)
    assert_problem(client.post("/score", content=body, headers={"Content-Type": "text/plain"}), 415)


def test_upgrade_to_http_2_is_refused_with_the_reason(client: httpx.Client, example: dict[str, Any]) -> None:
    """Java's HttpClient requests an upgrade by default. The HTTP parser then drops the body."""
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}
    problem = assert_problem(client.post("/score", json=example, headers=headers), 400)
    assert "Upgrade" in problem["detail"]
    ask(client, example)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_request_with_random_member_gets_ranking_or_problem(
    client: httpx.Client, example: dict[str, Any], data: st.DataObject
) -> None:
    body = json.loads(json.dumps(example))
    place: Any = body
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    answer = client.post(
        "/score",
        content=json.dumps(body).encode("utf-8", "surrogatepass"),
        headers={"Content-Type": "application/json"},
    )
    if answer.status_code == 200:
        RESPONSE.validate_json(answer.content)
    else:
        assert_problem(answer, 400, 404, 413, 422)
    assert_alive(client)


def test_concurrent_clients_get_their_own_responses(client: httpx.Client, example: dict[str, Any]) -> None:
    ids = example["candidates"]["item_ids"]
    bodies = [
        example | {"user": f"own-{k}", "candidates": {"item_ids": ids[k % 7 : k % 7 + 1 + k % 9]}} for k in range(24)
    ]
    alone = [ask(client, body)["results"] for body in bodies]
    together: list[Any] = [None] * len(bodies)

    def one(k: int) -> None:
        together[k] = ask(client, bodies[k] | {"user": f"own-again-{k}"})["results"]

    threads = [threading.Thread(target=one, args=(k,)) for k in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert a["item_ids"] == b["item_ids"]
        assert a["scores"] == pytest.approx(b["scores"], abs=BOUND)


def test_server_starts_with_limits_below_the_warm_up_requests(tiny: Tiny, example: dict[str, Any]) -> None:
    with serve(Settings(bundles=tiny.root, max_candidates=30, max_history=50)) as client:
        assert client.get("/models/tiny").json()["limits"]["max_candidates"] == 30
        ask(client, example)


@pytest.mark.parametrize(
    "weights", [None, {"like": 3}, {"watch": 1e6, "like": 1e-6}, {"watch": 1, "like": -1}, {"like": -2}, {"like": 0}]
)
def test_scores_are_in_0_to_1_for_all_weights(
    client: httpx.Client, example: dict[str, Any], weights: dict[str, float] | None
) -> None:
    body = example | ({} if weights is None else {"head_weights": weights})
    found = ask(client, body)["results"]
    assert all(0 <= score <= 1 for score in found["scores"])
    used = weights or client.get("/models/tiny").json()["heads"]
    weighted = [sum(used.get(head, 0) * column[k] for head, column in found["heads"].items()) for k in found["index"]]
    best = sorted(found["index"], key=lambda k: -weighted[k])
    ranked = ask(client, body, "/rerank")["results"]["index"]
    assert [weighted[k] for k in ranked] == pytest.approx(
        [weighted[k] for k in best], abs=1e-9 * max(map(abs, used.values()))
    )


def test_unknown_actions_and_values_are_in_answer_and_metrics(client: httpx.Client, example: dict[str, Any]) -> None:
    names = ("slatewise_unknown_actions_total{", 'slatewise_unknown_values_total{field="genres"')
    before = sums(client, *names)
    fields = {"genres": [["Drama", "Dramma"], "Dramma|Comedyy", None]}
    wrong = {
        "history": {"item_ids": ["1", "2", "3", "4"], "actions": ["purchase", None, "view", "purchase"]},
        "candidates": {"item_ids": ["new", "newer", "1"], "fields": fields},
    }
    for path in ("/rerank", "/score"):
        answer = ask(client, wrong, path)
        assert answer["history"]["unknown_actions"] == 2 and answer["unknown_values"] == {"genres": 3}
    assert [after - b for after, b in zip(sums(client, *names), before, strict=True)] == [4, 6]
    right = ask(client, example)
    assert right["history"]["unknown_actions"] == 0 and right["unknown_values"] == {}
    assert [after - b for after, b in zip(sums(client, *names), before, strict=True)] == [4, 6]


@pytest.mark.parametrize("name", ["X-Request-Timeout-Ms", "x-envoy-expected-rq-timeout-ms"])
def test_headers_of_proxies_limit_the_deadline(client: httpx.Client, example: dict[str, Any], name: str) -> None:
    def exit_of(milliseconds: str, **members: Any) -> str:
        answer = client.post("/rerank", json=example | members, headers={name: milliseconds})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["exit"])

    assert exit_of("0.001") == "input_order"
    assert exit_of("60000") == "set"
    assert exit_of("60000", deadline_ms=0.001) == "input_order", "the earliest deadline counts"
    assert exit_of("0") == "set", "0 is no limit"
    for wrong in ("", "soon", "-1", "1e3", "NaN", "1" * 40):
        refused = client.post("/rerank", json=example, headers={name: wrong})
        assert_problem(refused, 422)
        assert name.lower() in refused.json()["detail"]
