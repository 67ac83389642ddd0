"""The writer on a real Redis: publication, locks, the live list, roll-back, deletion, merge and sweep.

Drawn sequences of operations are compared with a slow model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise.store import generations, pointer, writer
from slatewise.store.client import run_script
from slatewise.store.codec import pack, read_pointer, unpack, user_key
from slatewise.store.generations import MAX_LIVE, Generations
from slatewise.store.pointer import KEPT, live_after
from slatewise.store.writer import Busy, StoreError

DIM = 8


@pytest.fixture
def client(redis_port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_port) as client:
        client.flushall()
        yield client


@pytest.fixture
def store(client: redis.Redis) -> Generations:
    return Generations(client, "r", "s")


def rows(users: list[str], value: float = 0.0) -> np.ndarray:
    return np.full((len(users), DIM), value, np.float32)


def refresh(
    store: Generations, users: list[str], value: float = 0.0, full: bool = False, created_at: float = 1_000.0
) -> int:
    """Write and publish one generation in chunks of two; its number."""
    with store.begin(f"{users} {value}", full) as writing:
        chunks = [users[first : first + 2] for first in range(0, len(users), 2)]
        for chunk, part in enumerate(chunks):
            if chunk not in writing.done:
                store.write_chunk(writing.generation, chunk, part, rows(part, value), created_at)
        store.publish(writing, len(chunks), watermark=created_at)
    return writing.generation


def read(store: Generations, user: str) -> tuple[float, int, float] | None:
    """(value, generation, created_at) that a replica would serve."""
    live = store.live()
    for value in store.client.hmget(user_key("r", "s", user), live) if live else ():
        if value is not None:
            vector, generation, created_at = unpack(value, DIM)
            return float(vector[0]), generation, created_at
    return None


def fields(store: Generations, user: str) -> set[int]:
    return {int(field) for field in store.client.hkeys(user_key("r", "s", user))}


# Writing


def test_a_generation_is_visible_only_after_it_is_published(store: Generations) -> None:
    with store.begin("plan", full=True) as writing:
        assert (writing.generation, writing.done) == (1, set())
        size = store.write_chunk(1, 0, ["a", "b"], rows(["a", "b"], 1.0), 5.0)
        assert size == 2 * len(pack(rows(["a"])[0], 1, 5.0))
        assert store.live() == [] and read(store, "a") is None
        assert store.publish(writing, 1, watermark=4.5) == [1]
    assert read(store, "a") == read(store, "b") == (1.0, 1, 5.0)
    status = store.status()
    assert status["live"] == [1] and status["writing"] is None and status["watermark"] == 4.5
    assert {"kind": "full", "users": 2, "plan": "plan"}.items() <= status["generations"][0].items()
    assert 0 <= status["generations"][0]["age_seconds"] < 60
    json.dumps(status)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_users_of_several_round_trips_get_their_own_vectors(store: Generations, dtype: str) -> None:
    users = [f"u{k}" for k in range(2_345)]
    vectors = np.random.default_rng(0).normal(size=(len(users), DIM)).astype(np.float32)
    with store.begin("p", full=True) as writing:
        store.write_chunk(writing.generation, 0, users, vectors, 5.0, dtype)
        store.publish(writing, 1)
    for k in range(0, len(users), 97):
        found = unpack(store.client.hget(user_key("r", "s", users[k]), "1"), DIM)[0]
        np.testing.assert_array_equal(found, unpack(pack(vectors[k], 1, 5.0, dtype), DIM)[0])


def test_a_generation_with_a_missing_chunk_is_not_published(store: Generations) -> None:
    with store.begin("plan", full=True) as writing:
        store.write_chunk(1, 1, ["a"], rows(["a"]), 5.0)
        with pytest.raises(StoreError, match="1 of 2 chunks"):
            store.publish(writing, 2)
    assert store.live() == []


def test_an_empty_generation_is_refused_only_if_it_is_full(store: Generations) -> None:
    refresh(store, ["a"], 1.0, full=True)
    with pytest.raises(StoreError, match="no users"):
        refresh(store, [], full=True)
    refresh(store, [])
    assert read(store, "a") == (1.0, 1, 1_000.0)


@pytest.mark.parametrize(
    ("users", "vectors"), [(["a", "a"], rows(["a", "b"])), (["a"], rows(["a", "b"])), (["a"], rows(["a"], np.nan))]
)
def test_invalid_chunks_are_refused_before_any_write(store: Generations, users: list[str], vectors: np.ndarray) -> None:
    with store.begin("plan", full=True) as writing, pytest.raises(ValueError):
        store.write_chunk(writing.generation, 0, users, vectors, 5.0)
    assert not store.client.exists(user_key("r", "s", "a"))


def test_an_interrupted_generation_resumes_at_the_missing_chunk(store: Generations) -> None:
    with pytest.raises(KeyboardInterrupt), store.begin("plan", full=True) as writing:
        store.write_chunk(writing.generation, 0, ["a"], rows(["a"], 1.0), 5.0)
        raise KeyboardInterrupt
    assert (
        store.live() == []
        and store.status()["writing"]["chunks_done"] == 1
        and store.status()["writing"]["holder"] is None
    )
    with store.begin("plan", full=True) as writing:
        assert (writing.generation, writing.done) == (1, {0})
        store.write_chunk(1, 1, ["b"], rows(["b"], 2.0), 5.0)
        assert store.publish(writing, 2) == [1]
    assert (read(store, "a"), read(store, "b")) == ((1.0, 1, 5.0), (2.0, 1, 5.0))
    assert store.status()["generations"][0]["users"] == 2


@pytest.mark.parametrize(("plan", "full"), [("another", True), ("plan", False)])
def test_another_plan_abandons_the_interrupted_generation(store: Generations, plan: str, full: bool) -> None:
    with store.begin("plan", full=True) as writing:
        store.write_chunk(writing.generation, 0, ["a"], rows(["a"], 1.0), 5.0)
    with store.begin(plan, full) as writing:
        assert (writing.generation, writing.done) == (2, set())
        with pytest.raises(StoreError, match="1 is not being written"):
            store.write_chunk(1, 1, ["b"], rows(["b"]), 5.0)
        store.write_chunk(2, 0, ["a"], rows(["a"], 2.0), 5.0)
        assert store.publish(writing, 1) == [2]
    assert fields(store, "a") == {2}, "a write removes dead fields"
    assert store.sweep(0.0) == 0 and store.status()["dead"] == []


def test_an_aborted_generation_cannot_be_published(store: Generations) -> None:
    writing = store.begin("plan", full=True)
    store.write_chunk(1, 0, ["a"], rows(["a"]), 5.0)
    store.abort(writing)
    with pytest.raises(StoreError):
        store.publish(writing, 1)
    assert store.status()["writing"] is None and store.live() == [] and store.sweep(0.0) == 1
    assert refresh(store, ["b"]) == 2


def test_a_second_writer_is_refused_with_the_holders_name(store: Generations) -> None:
    with store.begin("plan", full=True), pytest.raises(Busy, match=r"process \d+ on .* for 0 s"):
        store.begin("plan", full=True)
    with store.begin("plan", full=True):
        pass


def test_the_lock_of_a_dead_writer_expires(store: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LOCK_SECONDS", 1)
    alive = store.begin("plan", full=True)
    time.sleep(1.5)
    with pytest.raises(Busy):  # renewed
        store.begin("plan", full=True)
    alive.ended.set()  # as if the process had been killed
    time.sleep(1.5)
    with store.begin("plan", full=True) as other:
        store.write_chunk(other.generation, 0, ["a"], rows(["a"]), 5.0)
        store.publish(other, 1)
    with pytest.raises(StoreError, match="taken over"):
        store.publish(alive, 1)
    assert store.live() == [1]


def test_chunks_can_be_written_by_other_processes(store: Generations, redis_port: int) -> None:
    code = f"""
import sys, numpy as np
from slatewise.store.generations import Generations
from slatewise.store.client import connect
store, k = Generations(connect("redis://127.0.0.1:{redis_port}/0"), "r", "s"), int(sys.argv[1])
store.write_chunk(1, k, [f"u{{k}}"], np.full((1, {DIM}), k, np.float32), 5.0)
"""
    with store.begin("plan", full=True) as writing:
        workers = [subprocess.Popen([sys.executable, "-c", code, str(k)]) for k in range(3)]
        assert [worker.wait(60) for worker in workers] == [0, 0, 0]
        store.publish(writing, 3)
    assert [read(store, f"u{k}") for k in range(3)] == [(float(k), 1, 5.0) for k in range(3)]


def test_a_killed_writers_generation_is_invisible_and_resumed(
    store: Generations, redis_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh(store, ["a"], 1.0, full=True)
    code = f"""
import time, numpy as np
from slatewise.store import writer
from slatewise.store.client import connect
from slatewise.store.generations import Generations
writer.LOCK_SECONDS = 1
store = Generations(connect("redis://127.0.0.1:{redis_port}/0"), "r", "s")
writing = store.begin("plan", True)
store.write_chunk(writing.generation, 0, ["a"], np.full((1, {DIM}), 2, np.float32), 5.0)
print("written", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "written\n"
        worker.kill()
    assert read(store, "a") == (1.0, 1, 1_000.0)
    give_up = time.monotonic() + 30
    while True:
        try:
            writing = store.begin("plan", full=True)
            break
        except Busy:
            assert time.monotonic() < give_up
            time.sleep(0.1)
    assert (writing.generation, writing.done) == (2, {0})
    assert store.publish(writing, 1) == [2, 1]
    assert read(store, "a") == (2.0, 2, 5.0)


def test_a_key_of_another_type_is_replaced_by_a_write(store: Generations) -> None:
    for key in ("a", "c"):
        store.client.set(user_key("r", "s", key), "a string")
    refresh(store, ["a", "b"], 1.0, full=True)
    assert read(store, "a") == read(store, "b") == (1.0, 1, 1_000.0)
    assert store.merge() == [2, 1] and read(store, "a") == (1.0, 2, 1_000.0)
    store.roll_back()
    assert store.sweep(0.0) == 2


def test_a_full_redis_refuses_writes_and_still_serves(
    start_redis: Callable[[int | None], AbstractContextManager[int]],
) -> None:
    with start_redis(None) as port, redis.Redis(port=port) as client:
        store = Generations(client, "r", "s")
        refresh(store, ["a"], 1.0, full=True)
        with store.begin("plan", full=True) as writing:
            store.write_chunk(writing.generation, 0, ["a"], rows(["a"], 2.0), 5.0)
            client.config_set("maxmemory", "1")
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                store.write_chunk(writing.generation, 1, ["b"], rows(["b"], 2.0), 5.0)
            with pytest.raises(StoreError):
                store.publish(writing, 2)
            assert read(store, "a") == (1.0, 1, 1_000.0)
            client.config_set("maxmemory", "0")
            store.write_chunk(writing.generation, 1, ["b"], rows(["b"], 2.0), 5.0)
            store.publish(writing, 2)
        assert read(store, "b") == (2.0, 2, 5.0)


def test_a_write_sets_and_renews_the_time_to_live(client: redis.Redis) -> None:
    store = Generations(client, "r", "s", ttl_days=2)
    refresh(store, ["a", "b"], full=True)
    client.expire(user_key("r", "s", "a"), 100)
    refresh(store, ["a"])
    assert client.ttl(user_key("r", "s", "a")) > 100 and client.ttl(user_key("r", "s", "b")) > 100
    client.expire(user_key("r", "s", "b"), 100)
    store.merge()
    assert 0 < client.ttl(user_key("r", "s", "b")) <= 100, "a merge does not renew the time to live"
    refresh(Generations(client, "r", "s2"), ["a"])
    assert Generations(client, "r", "s").ttl_seconds == 0


# The live list


@given(st.lists(st.booleans(), min_size=1, max_size=25))
def test_the_live_list_is_the_shortest_complete_one(kinds: list[bool]) -> None:
    """Compared with the slow rule: try every length."""
    live: list[int] = []
    full = {g for g, is_full in enumerate(kinds, 1) if is_full}
    for generation in range(1, len(kinds) + 1):
        everything = [generation, *live]
        allowed = [n for n in range(3, len(everything) + 1) if any(g in full for g in everything[2:n])]
        assert live_after(generation, live, full) == everything[: min(allowed, default=len(everything))]
        live = live_after(generation, live, full)
        assert live == sorted(live, reverse=True)


class Model:
    """A slow store: for every published generation the vectors of all users."""

    def __init__(self) -> None:
        self.pictures: list[dict[str, float]] = []

    def publish(self, vectors: dict[str, float]) -> None:
        self.pictures.append((self.pictures[-1] if self.pictures else {}) | vectors)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("incremental"), st.sets(st.sampled_from("abcde"))),
        st.tuples(st.just("full"), st.just(set("abcde"))),
        st.tuples(st.sampled_from(["roll back", "merge", "sweep"]), st.just(set[str]())),
        st.tuples(st.just("delete user"), st.sets(st.sampled_from("abcde"), min_size=1, max_size=1)),
    ),
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(operations)
def test_drawn_operations_match_a_slow_model(redis_port: int, steps: list[tuple[str, set[str]]]) -> None:
    with redis.Redis(port=redis_port) as client:
        client.flushall()
        store = Generations(client, "r", "s")
        model = Model()
        value = 0.0
        highest = 0
        depth = 0
        for step, users in steps:
            value += 1
            if step in ("incremental", "full"):
                generation = refresh(store, sorted(users), value, step == "full")
                assert generation > highest, "a number was given twice"
                highest = generation
                model.publish(dict.fromkeys(users, value))
                depth = min(depth + 1, KEPT)
            elif step == "roll back" and len(store.live()) > 1:
                store.roll_back()
                model.pictures.pop()
                depth = max(1, depth - 1)
            elif step == "merge" and store.live() and model.pictures[-1]:
                highest = store.merge()[0]
                model.publish({})
                depth = min(depth + 1, KEPT)
            elif step == "sweep":
                store.sweep(0.0)
                live = set(store.live())
                assert all(fields(store, user) <= live for user in "abcde")
            elif step == "delete user":
                store.delete_user(next(iter(users)))
                for picture in model.pictures:
                    picture.pop(next(iter(users)), None)
            picture = model.pictures[-1] if model.pictures else {}
            found = {user: read(store, user) for user in "abcde"}
            assert {user: each[0] for user, each in found.items() if each} == picture
            assert len(store.live()) >= depth, "two more roll-backs must be possible"


def test_many_incremental_generations_stay_bounded_by_merges(store: Generations) -> None:
    refresh(store, ["a", "b", "c"], 1.0, full=True, created_at=7.0)
    for k in range(3 * MAX_LIVE):
        refresh(store, ["a"], 2.0 + k)
        assert len(store.live()) <= MAX_LIVE
        assert read(store, "c") is not None and read(store, "c")[0::2] == (1.0, 7.0), "merges keep a vector's age"
        assert read(store, "a")[0] == 2.0 + k
    store.sweep(0.0)
    assert fields(store, "c") <= set(store.live()) and len(fields(store, "a")) <= len(store.live())
    assert store.status()["dead"] == []


def test_a_merge_copies_the_newest_readable_vectors(store: Generations) -> None:
    refresh(store, ["a", "b"], 1.0, full=True)
    refresh(store, ["a", "b"], 2.0)
    store.client.hset(user_key("r", "s", "a"), "2", b"garbage")
    assert store.merge() == [3, 2, 1]
    assert (read(store, "a"), read(store, "b")) == ((1.0, 3, 1_000.0), (2.0, 3, 1_000.0))
    assert store.status()["generations"][0]["users"] == 2 and store.status()["watermark"] == 1_000.0


def test_a_merge_during_a_roll_back_is_aborted(store: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    refresh(store, ["a", "b"], 1.0, full=True)
    refresh(store, ["a"], 2.0)
    put = store.put

    def put_and_roll_back(*arguments: Any) -> int:
        size = put(*arguments)
        Generations(store.client, "r", "s").roll_back()
        return size

    monkeypatch.setattr(store, "put", put_and_roll_back)
    with pytest.raises(StoreError, match="was made from"):
        store.merge()
    assert store.live() == [1] and read(store, "a")[0] == 1.0
    monkeypatch.undo()
    assert store.merge() == [4, 1]
    store.sweep(0.0)
    assert fields(store, "a") == fields(store, "b") == {4, 1}, (
        "neither rolled-back vectors nor the aborted merge remain"
    )


# Roll-back


def test_two_roll_backs_succeed_and_a_third_is_refused(store: Generations) -> None:
    for value in (1.0, 2.0, 3.0, 4.0):
        refresh(store, ["a"], value, full=True)
    assert store.live() == [4, 3, 2]
    assert store.roll_back() == [3, 2] and read(store, "a")[0] == 3.0
    assert store.roll_back() == [2] and read(store, "a")[0] == 2.0
    with pytest.raises(StoreError, match="nothing to roll back to"):
        store.roll_back()
    assert refresh(store, ["a"], 5.0, full=True) == 5, "a rolled-back number is not given again"
    assert store.live() == [5, 2]
    store.sweep(0.0)
    assert fields(store, "a") == {2, 5}


def test_an_empty_store_refuses_roll_back_and_merge(store: Generations) -> None:
    with pytest.raises(StoreError, match="no generations"):
        store.roll_back()
    assert store.sweep(0.0) == 0 and store.delete_user("a") is False and store.live() == []
    with pytest.raises(StoreError):
        store.merge()


def test_concurrent_changes_of_the_pointer_are_all_applied(store: Generations, redis_port: int) -> None:
    for value in range(3):
        refresh(store, ["a"], value, full=True)
    failed: list[Exception] = []

    def work(delete_user: bool) -> None:
        try:
            with redis.Redis(port=redis_port) as client:
                mine = Generations(client, "r", "s")
                for _ in range(50):
                    mine.delete_user("absent") if delete_user else refresh_mine(mine)
        except Exception as error:
            failed.append(error)

    def refresh_mine(mine: Generations) -> None:
        refresh(mine, ["a"], full=True)
        mine.roll_back()

    threads = [threading.Thread(target=work, args=(delete_user,)) for delete_user in (True, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    live, forgotten = read_pointer(store.client.get(store.pointer.key))
    assert forgotten == 100 and len(live) == 2, "50 times one was published on top, and taken back"


def test_a_repeated_change_of_the_pointer_applies_once(store: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py repeats a script if the connection breaks before the answer."""
    for value in range(3):
        refresh(store, ["a"], value, full=True)

    def twice(*arguments: Any) -> int:
        run_script(*arguments)
        return run_script(*arguments)

    for module in (generations, pointer):
        monkeypatch.setattr(module, "run_script", twice)
    assert store.roll_back() == [2, 1] == store.live()
    assert refresh(store, ["a"], full=True) == 4
    assert store.live() == [4, 2, 1]


# Deletion of a user


def test_delete_user_removes_all_vectors_and_marks_the_pointer(
    store: Generations,
) -> None:
    refresh(store, ["a", "b"], 1.0, full=True)
    refresh(store, ["a"], 2.0)
    before = store.client.get(store.pointer.key)
    assert store.delete_user("a") is True
    assert store.client.get(store.pointer.key) != before and store.live() == [2, 1]
    assert (
        read(store, "a") is None and read(store, "b") is not None and not store.client.exists(user_key("r", "s", "a"))
    )
    assert store.delete_user("a") is False
    store.roll_back()
    assert read(store, "a") is None and store.status()["deleted_users"] == 2
    refresh(store, ["a"], 3.0)
    assert read(store, "a")[0] == 3.0, "a user who returns is a new user"


def test_a_user_deleted_during_a_write_is_not_published(store: Generations) -> None:
    with store.begin("plan", full=True) as writing:
        store.write_chunk(writing.generation, 0, ["a"], rows(["a"]), 5.0)
        store.delete_user("a")
        store.delete_user("b")
        store.write_chunk(writing.generation, 1, ["b", "c"], rows(["b", "c"]), 5.0)
        store.publish(writing, 2)
    assert [read(store, user) is None for user in "abc"] == [True, True, False]
    assert not store.client.exists(store.deleted_key), "the deleted ids are not stored"


# Sweeping


def test_a_sweep_waits_until_no_replica_reads_dead_fields(store: Generations, redis_port: int) -> None:
    for value in range(5):
        refresh(store, ["a", "b"], value, full=True)
    store.client.hset(user_key("r", "s", "a"), "1", b"left over")

    def change() -> None:
        with redis.Redis(port=redis_port) as client:
            Generations(client, "r", "s").delete_user("absent")

    timer = threading.Timer(0.2, change)
    timer.start()
    begin = time.monotonic()
    assert store.sweep(0.4) > 0
    assert time.monotonic() - begin >= 0.8, "the pointer changed, so the wait starts again"
    timer.join()
    assert fields(store, "a") == fields(store, "b") == {5, 4, 3} and store.sweep(10.0) == 0


def test_a_sweep_leaves_unfinished_and_other_spaces_alone(store: Generations, client: redis.Redis) -> None:
    for space in ("s2", "s*", "s?", "[s]"):
        refresh(Generations(client, "r", space), ["a"], 1.0)
    for value in range(5):
        refresh(store, ["x"], value, full=True)
    with store.begin("plan", full=False) as writing:
        store.write_chunk(writing.generation, 0, ["a"], rows(["a"]), 5.0)
        store.sweep(0.0)
        store.publish(writing, 1)
    assert read(store, "a") is not None
    star = Generations(client, "r", "s*")
    star.roll_back if star.live() == [1] else pytest.fail("not live")
    refresh(star, ["a"], 2.0)
    star.roll_back()
    assert star.sweep(0.0) == 1 and read(store, "a") is not None and client.hlen(user_key("r", "s2", "a")) == 1
