"""`slatewise.load`: the scores and the errors of the server, in this process, from threads and from an event loop."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import slatewise
from slatewise import Client, LocalRanker
from slatewise.bundle.manifest import ManifestError
from slatewise.client.errors import DeadlineExceeded, Invalid, NotFound, SlatewiseError
from tests.conftest import DEMO

AT = {"request_time": 1.2e9}
MEMBERS: dict[str, Any] = {
    "user": "small:99",
    "history": [("318", "love", 1e9), ("500", "like", 1.1e9), ("nothing", None, None)],
    "candidates": ["595", "589", "1", "2028", "unheard"],
}


@pytest.fixture(scope="module")
def local() -> Iterator[LocalRanker]:
    with slatewise.load(DEMO / "movielens", "fp32", threads=1) as ranker:
        yield ranker


@pytest.fixture(scope="module")
def remote(demo_url: str) -> Iterator[Client]:
    with Client(demo_url, timeout=30) as client:
        yield client


CASES: list[dict[str, Any]] = [
    MEMBERS,
    MEMBERS | {"history": None},
    MEMBERS | {"user": None, "exit": "dot"},
    MEMBERS | {"candidates": ["1"], "exit": "point"},
    MEMBERS | {"head_weights": {"like": 3.0}, "top_n": 2},
    MEMBERS | {"prune": {"point": 3, "set": 2}, "top_n": 1, "explain": True},
    MEMBERS | {"prune": False, "top_n": 2},
    MEMBERS | {"explain": True, "return_fields": ["title", "genres"], "id": "mine"},
    {"candidates": [*range(1500)], "history": [*range(1, 700)]},
    {
        "candidates": {
            "item_ids": [1, 2],
            "features": {"popularity": [1.5, None]},
            "fields": {"genres": ["Drama", None]},
        }
    },
]


@pytest.mark.parametrize("members", CASES)
@pytest.mark.parametrize("method", ["rerank", "score"])
def test_answer_is_the_servers_bit_for_bit(
    local: LocalRanker, remote: Client, members: dict[str, Any], method: str
) -> None:
    here, there = (getattr(ranker, method)(**members, **AT).response for ranker in (local, remote))
    assert (here["id"] == there["id"]) == ("id" in members) and len(here["id"]) == len(there["id"])
    for response in (here, there):
        response.pop("id")
        response.pop("timings_ms")
        response["history"].pop("cache")
        response["meta_embedding"].pop("age_seconds")
    assert here == there


WRONG: list[dict[str, Any]] = [
    {"candidates": []},
    {"candidates": [1], "top_n": 0, "priority": 1000},
    {"candidates": [1], "nothing": 1},
    {"candidates": [1], "request_time": 1.7e12},
    {"candidates": [1], "return_fields": ["nothing"]},
    {"candidates": [1], "ranker": "other"},
    {"candidates": [1], "variant": "other"},
    {"candidates": [1], "exit": "other"},
    {"candidates": [*range(5000)]},
    {"candidates": {"item_ids": [1], "features": {"unheard": [1.0]}}},
    {"candidates": [1], "history": {"item_ids": [1], "actions": []}},
    {"candidates": [1], "user": ""},
]


@pytest.mark.parametrize("members", WRONG)
def test_errors_are_the_servers(local: LocalRanker, remote: Client, members: dict[str, Any]) -> None:
    found = []
    for ranker in (local, remote):
        with pytest.raises(SlatewiseError) as caught:
            ranker.rerank(**members)
        found.append((type(caught.value), caught.value.detail, caught.value.faults, caught.value.status))
    assert found[0] == found[1]


def test_deadline_is_kept(local: LocalRanker) -> None:
    with pytest.raises(DeadlineExceeded):
        local.rerank(**MEMBERS, deadline_ms=0.001, allow_degraded=False)
    degraded = local.rerank(**MEMBERS, deadline_ms=0.001)
    assert degraded.exit == "input_order" and degraded.scores is None and degraded.degraded == ("deadline",)


def test_description_is_the_servers(local: LocalRanker, remote: Client) -> None:
    assert local.models() == remote.models()
    assert local.model() == local.model("movielens") == remote.model()
    with pytest.raises(NotFound):
        local.model("other")
    assert local.titles("movielens", ["1", "unheard"]) == {"1": "Toy Story (1995)"}
    local.wait_until_ready()


def test_frames_are_ranked_as_by_the_server(local: LocalRanker, remote: Client) -> None:
    frame = pl.DataFrame({"user": [*"abcab"] * 4, "item_id": [*range(1, 21)]})
    assert local.rank_many(frame, **AT).equals(remote.rank_many(frame, **AT))


def test_threads_share_it_without_refusals(local: LocalRanker) -> None:
    expected = local.rerank(**MEMBERS, **AT).scores
    with ThreadPoolExecutor(16) as pool:
        found = [*pool.map(lambda _: local.rerank(**MEMBERS, **AT), range(64))]
    assert all(ranking.scores == expected and not ranking.degraded for ranking in found)


def test_it_works_inside_a_running_event_loop(local: LocalRanker) -> None:
    async def ask() -> Any:
        return local.rerank(**MEMBERS, **AT)

    assert asyncio.run(ask()).scores == local.rerank(**MEMBERS, **AT).scores


def test_history_cache_is_used(local: LocalRanker) -> None:
    members = MEMBERS | {"user": "someone-new"}
    assert [local.rerank(**members).history["cache"] for _ in range(2)] == ["miss", "hit"]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("slatewise-")}


def test_close_and_collection_free_the_threads() -> None:
    gc.collect()
    before = threading.active_count()
    ranker = slatewise.load(DEMO / "movielens", "int8", threads=2)
    ranker.rerank(candidates=[1])
    assert threading.active_count() > before
    ranker.close()
    ranker.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match=r"after close\(\)"):
        ranker.rerank(candidates=[1])
    ranker = slatewise.load(DEMO / "movielens", "int8", threads=2)
    del ranker
    gc.collect()
    give_up = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < give_up, threads()
        time.sleep(0.02)


def test_close_answers_the_requests_of_others() -> None:
    ranker = slatewise.load(DEMO / "movielens", "int8", threads=1)
    outcomes = []

    def ask() -> None:
        try:
            while True:
                ranker.rerank(candidates=[*range(2000)], history=[*range(300)])
        except (SlatewiseError, RuntimeError) as error:
            outcomes.append(str(error))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    time.sleep(0.1)
    ranker.close()
    for thread in asking:
        thread.join(20)
    assert len(outcomes) == 4 and all("close" in outcome for outcome in outcomes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_is_told() -> None:
    """It has no copy of the threads, so waiting for them would take for ever."""
    code = f"""
import os, slatewise
ranker = slatewise.load({str(DEMO / "movielens")!r}, "int8", threads=1)
if os.fork():
    os.wait()
else:
    try:
        ranker.rerank(candidates=[1])
    except RuntimeError as error:
        print(error, flush=True)
    ranker.close()
    os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert "forked" in done.stdout and done.stderr == "" and done.returncode == 0


def test_interrupt_ends_a_request_quietly() -> None:
    code = f"""
import gc, signal, slatewise
ranker = slatewise.load({str(DEMO / "movielens")!r}, "int8", threads=1)
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    while True:
        ranker.rerank(candidates=[*range(4000)], history=[*range(2000)])
except KeyboardInterrupt:
    print(len(ranker.rerank(candidates=[1])))
ranker.close()
gc.collect()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_process_ends_quietly_without_close() -> None:
    code = f'import slatewise; print(slatewise.load({str(DEMO / "movielens")!r}, "int8").rerank(candidates=[1]))'
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("<Ranking of 1 candidates")


def test_bundles_are_found_by_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("movielens", DEMO / "movielens", max((DEMO / "movielens").glob("[0-9]*"))):
        with slatewise.load(path, "int8", threads=1) as ranker:
            assert [model["variants"] for model in ranker.models()] == [["int8"]]
    with pytest.raises(ManifestError, match="no such folder, and no ranker of this name; known: movielens"):
        slatewise.load("movielans")
    with pytest.raises(ManifestError, match="no bundle"):
        slatewise.load(tmp_path)
    with pytest.raises(ManifestError, match="it has fp32"):
        slatewise.load("movielens", "other")


def test_missing_package_names_the_extra() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import slatewise; slatewise.load"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    remedy = "pip install 'slatewise[serve]' (in a clone: pip install '.[serve]')"
    assert f"slatewise.load needs prometheus_client; run: {remedy}\n" in done.stderr


def test_values_are_refused_before_they_are_sent(local: LocalRanker) -> None:
    with pytest.raises(Invalid, match="a missing value is no id"):
        local.rerank(candidates=[None])
