"""The queue in front of the threads: order, cancellation, what is left behind. Jobs wait for events, never for the clock."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.workers import Workers

PATIENCE = 30  # seconds; never waited for where the code is right


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in threads
            await asyncio.sleep(0.001)


@asynccontextmanager
async def one_busy_thread() -> AsyncIterator[tuple[Workers, threading.Event]]:
    """Workers whose only thread is held by a running job until the event is set."""
    running, release = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert release.wait(PATIENCE)

    async with Workers(1) as workers:
        held = asyncio.create_task(workers.run(hold))
        await until(running.is_set)
        try:
            yield workers, release
        finally:
            release.set()
            await held


def test_the_result_and_the_wait_are_returned() -> None:
    async def main() -> None:
        async with Workers(2) as workers:
            result, waited = await workers.run(lambda: threading.current_thread().name)
            assert result.startswith("slatewise-")
            assert 0 <= waited < PATIENCE

    asyncio.run(main())


def test_the_wait_counts_the_time_in_the_queue() -> None:
    async def main() -> None:
        async with one_busy_thread() as (workers, release):
            task = asyncio.create_task(workers.run(lambda: None))
            await until(lambda: workers.queue)
            await asyncio.sleep(0.05)
            release.set()
            assert (await task)[1] >= 0.05

    asyncio.run(main())


def test_jobs_run_side_by_side_on_as_many_threads() -> None:
    async def main() -> None:
        meet = threading.Barrier(3, timeout=PATIENCE)
        async with Workers(3) as workers:
            await asyncio.gather(*(workers.run(meet.wait) for _ in range(3)))

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError("mine"), StopIteration(), asyncio.CancelledError(), BaseException("bare")])
def test_what_a_job_raises_reaches_its_caller_and_nobody_else(error: BaseException) -> None:
    def fail() -> None:
        raise error

    async def main() -> None:
        async with Workers(1) as workers:
            tasks = [asyncio.create_task(workers.run(call)) for call in (lambda: 1, fail, lambda: 2)]
            _, pending = await asyncio.wait(tasks, timeout=5)
            assert not pending, "a caller was never answered"
            assert [task.result()[0] for task in (tasks[0], tasks[2])] == [1, 2]
            assert tasks[1].cancelled() or tasks[1].exception() is not None
            if isinstance(error, ValueError):
                assert tasks[1].exception() is error
            assert (await workers.run(lambda: 3))[0] == 3

    asyncio.run(main())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-100, 100), max_size=12))
def test_jobs_run_by_priority_then_by_arrival(priorities: list[int]) -> None:
    async def main() -> list[int]:
        ran: list[int] = []
        async with one_busy_thread() as (workers, release):
            tasks = []
            for number, priority in enumerate(priorities):
                tasks.append(asyncio.create_task(workers.run(lambda n=number: ran.append(n), priority)))
                await until(lambda: len(workers.queue) == len(tasks))
            release.set()
            await asyncio.gather(*tasks)
        return ran

    assert asyncio.run(main()) == sorted(range(len(priorities)), key=lambda number: (priorities[number], number))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=12))
def test_a_cancelled_job_leaves_the_queue_and_its_neighbours_alone(jobs: list[tuple[int, bool]]) -> None:
    async def main() -> None:
        ran: list[int] = []
        async with one_busy_thread() as (workers, release):
            tasks = [asyncio.create_task(workers.run(lambda n=n: ran.append(n), priority)) for n, (priority, _) in enumerate(jobs)]
            await until(lambda: len(workers.queue) == len(jobs))
            for task, (_, cancelled) in zip(tasks, jobs, strict=True):
                if cancelled:
                    task.cancel()
            await asyncio.gather(*(t for t, (_, cancelled) in zip(tasks, jobs, strict=True) if cancelled), return_exceptions=True)
            kept = [n for n, (_, cancelled) in enumerate(jobs) if not cancelled]
            assert len(workers.queue) == len(kept)
            assert sorted(job.priority for job in workers.queue) == sorted(jobs[n][0] for n in kept)
            release.set()
            await asyncio.gather(*(tasks[n] for n in kept))
            assert ran == sorted(kept, key=lambda n: (jobs[n][0], n))
            assert all(task.cancelled() == cancelled for task, (_, cancelled) in zip(tasks, jobs, strict=True))
            assert workers.queue == []

    asyncio.run(main())


def test_cancelling_the_caller_of_a_running_job_does_not_disturb_the_next() -> None:
    async def main() -> None:
        loop_errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
        running, release, ended = threading.Event(), threading.Event(), threading.Event()

        def hold() -> str:
            running.set()
            assert release.wait(PATIENCE)
            ended.set()
            return "nobody waits for this"

        async with Workers(1) as workers:
            first = asyncio.create_task(workers.run(hold))
            await until(running.is_set)
            following = asyncio.create_task(workers.run(lambda: "mine"))
            await until(lambda: workers.queue)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert len(workers.queue) == 1
            release.set()
            assert (await following)[0] == "mine"
            assert ended.is_set()
            assert workers.queue == []
        assert not loop_errors

    asyncio.run(main())


def test_closing_cancels_what_waits_finishes_what_runs_and_joins_the_threads() -> None:
    async def main() -> None:
        loop_errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
        running, release, ran = threading.Event(), threading.Event(), threading.Event()

        def hold() -> str:
            running.set()
            assert release.wait(PATIENCE)
            return "done"

        workers = Workers(1)
        async with workers:
            held = asyncio.create_task(workers.run(hold))
            await until(running.is_set)
            waiting = [asyncio.create_task(workers.run(ran.set)) for _ in range(5)]
            await until(lambda: len(workers.queue) == 5)
            asyncio.get_running_loop().call_later(0.02, release.set)
        assert not any(thread.is_alive() for thread in workers.threads)
        assert await asyncio.wait_for(held, PATIENCE) == ("done", pytest.approx(0, abs=PATIENCE))
        _, pending = await asyncio.wait(waiting, timeout=PATIENCE)
        assert not pending
        assert all(task.cancelled() for task in waiting)
        assert not ran.is_set()
        assert workers.queue == []
        assert not loop_errors

    asyncio.run(main())


def test_no_job_is_taken_after_closing() -> None:
    async def main() -> None:
        async with Workers(1) as workers:
            pass
        with pytest.raises(asyncio.CancelledError):
            await workers.run(lambda: None)
        assert workers.queue == []

    asyncio.run(main())


def test_nothing_is_queued_at_rest_after_a_storm_of_cancellations() -> None:
    async def main() -> None:
        async with Workers(2) as workers:
            tasks = [asyncio.create_task(workers.run(lambda n=n: n, n % 3)) for n in range(400)]
            for k, task in enumerate(tasks):
                if k % 3 == 0:
                    task.cancel()
                if k % 11 == 0:
                    await asyncio.sleep(0)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(r, asyncio.CancelledError) or r[0] == n for n, r in enumerate(results))
            assert all(not isinstance(r, asyncio.CancelledError) for n, r in enumerate(results) if n % 3)
            assert workers.queue == []
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_an_idle_thread_keeps_no_job_alive() -> None:
    class Payload:
        pass

    async def main() -> None:
        async with Workers(1) as workers:
            payload = Payload()
            watched = weakref.ref(payload)
            assert (await workers.run(lambda p=payload: p))[0] is payload
            del payload

            def gone() -> bool:
                gc.collect()
                return watched() is None

            await until(gone)

    asyncio.run(main())
