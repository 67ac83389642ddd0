"""The history cache: longest common prefix, limit in bytes, and one encoding for concurrent equal requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.inference.arrays import History, HistoryState
from slatewise.inference.workers import Job
from slatewise.ranking.history_cache import Entry, HistoryCache

LARGE = 10**9
Event = tuple[int, int, int]

events = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1)), max_size=8)


def history_of(sent: list[Event]) -> History:
    columns = np.array(sent, np.int64).reshape(-1, 3).T
    return History(*(np.ascontiguousarray(column) for column in columns))


def items(*rows: int) -> History:
    return history_of([(row, 0, 0) for row in rows])


def state_of(number_of_events: int, mark: float = 0.0) -> HistoryState:
    block = np.full((1, number_of_events + 1, 8), mark, np.float32)
    return HistoryState((block,), (block.copy(),), np.full((1, 8), mark, np.float32))


def entry_of(*rows: int, mark: float = 0.0) -> Entry:
    return Entry(items(*rows), state_of(len(rows), mark))


def mark_of(entry: Entry | None) -> float | None:
    return None if entry is None else float(entry.state.user[0, 0])


def slow_common_prefix(first: list[Event], second: list[Event]) -> int:
    n = 0
    while n < len(first) and n < len(second) and first[n] == second[n]:
        n += 1
    return n


@given(events, events, st.integers(0, 8))
def test_common_prefix_equals_the_reference(first: list[Event], second: list[Event], shared: int) -> None:
    second = first[:shared] + second
    expected = slow_common_prefix(first, second)
    assert history_of(first).common_prefix(history_of(second)) == expected
    assert history_of(second).common_prefix(history_of(first)) == expected
    assert history_of(first).equals(history_of(second)) == (first == second)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_change_in_any_column_ends_the_common_prefix(column: int) -> None:
    sent: list[Event] = [(k, 1, 2) for k in range(5)]
    edited = [list(event) for event in sent]
    edited[3][column] += 100
    assert history_of(sent).common_prefix(history_of([(a, b, c) for a, b, c in edited])) == 3


def test_entry_counts_the_bytes_of_all_its_arrays() -> None:
    entry = entry_of(1, 2, 3)
    arrays = (
        entry.history.items,
        entry.history.actions,
        entry.history.gaps,
        *entry.state.keys,
        *entry.state.values,
        entry.state.user,
    )
    assert entry.nbytes >= sum(array.nbytes for array in arrays)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.booleans()), max_size=40), st.integers(0, 12_000))
def test_cache_equals_a_reference_lru_and_stays_below_limit(steps: list[tuple[int, int, bool]], limit: int) -> None:
    """Eviction by bytes, least recently used first. No entry is a prefix of another: their first items differ."""
    cache = HistoryCache(limit)
    kept = {}  # in order of use
    for number, (key, length, read) in enumerate(steps):
        if read:
            found = cache.get(key)
            assert mark_of(found) == mark_of(kept.get(key))
            if key in kept:
                kept[key] = kept.pop(key)
        else:
            entry = entry_of(*([number] + [0] * length), mark=number)
            cache.put(key, entry)
            kept.pop(key, None)
            if entry.nbytes <= limit:
                kept[key] = entry
            while sum(e.nbytes for e in kept.values()) > limit:
                del kept[next(iter(kept))]
        assert list(cache.entries) == list(kept)
        assert cache.nbytes == sum(e.nbytes for e in kept.values()) <= limit


def test_reading_an_entry_makes_it_the_most_recent() -> None:
    size = entry_of(1).nbytes
    cache = HistoryCache(2 * size)
    cache.put("a", entry_of(1))
    cache.put("b", entry_of(2))
    assert cache.get("a") is not None
    cache.put("c", entry_of(3))
    assert list(cache.entries) == ["a", "c"]


def test_entry_above_the_limit_is_not_cached_and_evicts_no_other() -> None:
    cache = HistoryCache(entry_of(1).nbytes)
    cache.put("a", entry_of(1))
    cache.put("b", entry_of(*range(100)))
    assert list(cache.entries) == ["a"]


def test_cache_with_limit_0_stays_empty() -> None:
    cache = HistoryCache(0)
    cache.put("a", entry_of())
    assert (cache.get("a"), cache.nbytes) == (None, 0)


def test_shorter_prefix_does_not_replace_the_longer_entry() -> None:
    cache = HistoryCache(LARGE)
    cache.put("a", entry_of(1, 2, 3, mark=1))
    cache.put("a", entry_of(1, 2, mark=2))
    cache.put("a", entry_of(mark=3))
    assert mark_of(cache.get("a")) == 1


@pytest.mark.parametrize("rows", [(1, 2, 3, 4), (1, 9), (9,), (1, 2, 9), (1, 9, 3), (9, 2, 3, 4)])
def test_extended_or_edited_history_replaces_the_cached_one(rows: tuple[int, ...]) -> None:
    cache = HistoryCache(LARGE)
    cache.put("a", entry_of(1, 2, 3, mark=1))
    cache.put("a", entry_of(*rows, mark=2))
    assert mark_of(cache.get("a")) == 2
    assert cache.nbytes == entry_of(*rows).nbytes


class Encoder:
    """Starts encodings that end when `go` is set. Counts the started and the cancelled ones."""

    def __init__(self) -> None:
        self.began = self.stopped = 0
        self.go = asyncio.Event()
        self.fault: Exception | None = None

    def __call__(self) -> Job[HistoryState]:
        self.began += 1
        job: Job[HistoryState] = Job((cost for cost in ()), 0, 0.0, self.began)  # type: ignore[arg-type]
        task = asyncio.create_task(self.work(job, state_of(0, self.began)))
        job.add_done_callback(lambda _: task.cancel())
        return job

    async def work(self, job: Job[HistoryState], state: HistoryState) -> None:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.stopped += job.cancelled()
            raise
        if job.done():
            return
        if self.fault is None:
            job.set_result(state)
        else:
            job.set_exception(self.fault)


def run(scenario: Callable[[HistoryCache, Encoder], Awaitable[None]]) -> None:
    """Run in a new event loop. Afterwards no task may be running, no encoding shared, no error reported to the loop."""

    async def main() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        cache = HistoryCache(LARGE)
        async with asyncio.timeout(30):
            await scenario(cache, Encoder())
        await turns()
        assert not cache.encoding
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not complaints

    asyncio.run(main())


async def turns(number: int = 10) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def ask(
    cache: HistoryCache, encode: Callable[[], Job[HistoryState]], *rows: int, key: str = "user"
) -> asyncio.Task[HistoryState]:
    return asyncio.create_task(cache.once(key, items(*rows), encode))


def test_equal_histories_share_one_encoding() -> None:
    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        tasks = [ask(cache, encode, 1, 2) for _ in range(20)]
        await turns()
        encode.go.set()
        states = await asyncio.gather(*tasks)
        assert encode.began == 1
        assert all(state is states[0] for state in states)

    run(scenario)


@pytest.mark.parametrize("other", [(1,), (1, 2, 3), (1, 3), (), (2, 1)])
def test_different_histories_do_not_share_an_encoding(other: tuple[int, ...]) -> None:
    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        tasks = [
            ask(cache, encode, 1, 2),
            ask(cache, encode, *other),
            ask(cache, encode, 1, 2),
            ask(cache, encode, *other),
        ]
        await turns()
        encode.go.set()
        states = await asyncio.gather(*tasks)
        assert encode.began == 2
        assert states[0] is states[2]
        assert states[1] is states[3]
        assert states[0] is not states[1]

    run(scenario)


def test_equal_histories_of_two_users_do_not_share() -> None:
    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        tasks = [ask(cache, encode, 1, 2, key=key) for key in ("a", "b")]
        await turns()
        encode.go.set()
        await asyncio.gather(*tasks)
        assert encode.began == 2

    run(scenario)


def test_request_after_the_end_of_an_encoding_encodes_again() -> None:
    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        encode.go.set()
        await ask(cache, encode, 1)
        await turns()
        await ask(cache, encode, 1)
        assert encode.began == 2

    run(scenario)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_cancelled_waiter_does_not_stop_the_other_waiters(gone: int) -> None:
    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        tasks = [ask(cache, encode, 1) for _ in range(3)]
        await turns()
        tasks[gone].cancel()
        await turns()
        assert tasks[gone].cancelled()
        encode.go.set()
        first, second = await asyncio.gather(*(task for k, task in enumerate(tasks) if k != gone))
        assert first is second
        assert (encode.began, encode.stopped) == (1, 0)

    run(scenario)


def test_cancelling_the_last_waiter_stops_the_encoding() -> None:
    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        tasks = [ask(cache, encode, 1) for _ in range(3)]
        await turns()
        for task in tasks[:2]:
            task.cancel()
        await turns()
        assert encode.stopped == 0
        tasks[2].cancel()
        await turns()
        assert (encode.began, encode.stopped) == (1, 1)
        assert all(task.cancelled() for task in tasks)

    run(scenario)


@pytest.mark.parametrize("later", range(6))
def test_request_while_an_encoding_is_cancelled_is_served(later: int) -> None:
    """A client cancels and retries at once. The second request is not cancelled, at any turn of the event loop."""

    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        first = ask(cache, encode, 1)
        await turns()
        first.cancel()
        await turns(later)
        encode.go.set()
        second = ask(cache, encode, 1)
        done, _ = await asyncio.wait([second], timeout=30)
        assert done
        assert not second.cancelled()
        assert second.result() is not None

    run(scenario)


def test_failure_reaches_every_waiter_and_frees_the_key() -> None:
    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        encode.fault = ValueError("no state")
        tasks = [ask(cache, encode, 1) for _ in range(3)]
        await turns()
        encode.go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(result) for result in results] == ["no state"] * 3
        await turns()
        encode.fault = None
        assert float((await ask(cache, encode, 1)).user[0, 0]) == 2

    run(scenario)


def test_failure_without_waiters_is_not_reported_by_asyncio() -> None:
    """The encoding fails and its only waiter is cancelled in the same turn of the loop."""

    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        jobs: list[Job[HistoryState]] = []

        def kept() -> Job[HistoryState]:
            jobs.append(encode())
            return jobs[-1]

        task = ask(cache, kept, 1)
        await turns()
        jobs[0].set_exception(ValueError("while stopping"))
        task.cancel()
        await turns()
        assert task.cancelled()
        jobs.clear()  # the last reference: asyncio would report an exception that was not retrieved here

    run(scenario)


def test_cancelled_job_cancels_its_waiters_and_frees_the_key() -> None:
    """This happens when the workers close. A later request does not join the ended job."""

    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        jobs: list[Job[HistoryState]] = []

        def kept() -> Job[HistoryState]:
            jobs.append(encode())
            return jobs[-1]

        tasks = [ask(cache, kept, 1) for _ in range(3)]
        await turns()
        jobs[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        encode.go.set()
        assert float((await ask(cache, kept, 1)).user[0, 0]) == 2

    run(scenario)


def test_encode_that_raises_leaves_no_entry_behind() -> None:
    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        def fail() -> Job[HistoryState]:
            raise ValueError("no job")

        with pytest.raises(ValueError, match="no job"):
            await ask(cache, fail, 1)
        assert not cache.encoding

    run(scenario)


def test_once_does_not_add_a_cache_entry() -> None:
    async def scenario(cache: HistoryCache, encode: Encoder) -> None:
        encode.go.set()
        await ask(cache, encode, 1)
        assert (len(cache.entries), cache.nbytes) == (0, 0)

    run(scenario)
