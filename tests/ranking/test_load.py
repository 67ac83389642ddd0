"""The work in progress: waits and durations are those of threads that serve all requests in turns."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.ranking.load import Load, Running

WORK = st.integers(1, 20)


def loaded(works: list[int], threads: int, dues: list[float | None] | None = None) -> Load:
    load = Load(threads)
    load.running = {Running(float(w), due) for w, due in zip(works, dues or [None] * len(works), strict=True)}
    return load


@given(st.lists(WORK, max_size=6), st.integers(1, 3))
def test_backlog_is_the_work_of_all_over_the_threads(works: list[int], threads: int) -> None:
    assert loaded(works, threads).backlog() == pytest.approx(sum(works) / threads)


@given(st.lists(WORK, max_size=6), WORK)
def test_duration_on_one_thread_is_that_of_equal_shares(works: list[int], own: int) -> None:
    """With infinitely small turns, a request ends when each other one has had as much as it had, or is done."""
    assert loaded(works, 1).duration(own) == pytest.approx(own + sum(min(w, own) for w in works))


@given(st.lists(WORK, max_size=6), WORK, st.integers(1, 3))
def test_duration_is_at_least_the_own_work_and_the_share(works: list[int], own: int, threads: int) -> None:
    load = loaded(works, threads)
    duration = load.duration(own)
    assert duration >= own and duration * threads >= own
    if len(works) < threads:
        assert duration == own, "a thread is free"


@given(st.lists(st.tuples(WORK, st.one_of(st.none(), st.integers(-5, 60))), max_size=6), WORK, st.integers(1, 3))
def test_delays_equals_a_look_at_each_request(others: list[tuple[int, int | None]], own: int, threads: int) -> None:
    """The slow way: for each request with a deadline, its end with and without the new one."""
    now = time.perf_counter()
    works = [w for w, _ in others]
    dues = [None if due is None else now + due + 0.1 for _, due in others]
    expected = False
    for k, (work, due) in enumerate(others):
        rest = [min(w, work) for j, w in enumerate(works) if j != k]
        without = max(work, (work + sum(rest)) / threads)
        beside = max(work, (work + sum(rest) + min(own, work)) / threads)
        expected |= due is not None and without <= due + 0.1 < beside
    assert loaded(works, threads, dues).delays(own) == expected


def test_work_that_has_run_is_no_longer_left() -> None:
    class FakeJob:
        ran = 0.3

    running = Running(1.0, None)
    running.job = FakeJob()  # type: ignore[assignment]
    assert running.left == pytest.approx(0.7)
    running.end_job()
    assert running.left == pytest.approx(0.7)
    running.expect(0.1)
    assert running.left == pytest.approx(0.1)
    running.job = FakeJob()  # type: ignore[assignment]
    assert running.left == 0.0, "it takes longer than predicted"
