"""Jobs with independent parts: results, fairness, errors, cancellation, closing. They wait for events alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from slatewise.inference.chunks import Chunks, run_all, run_parts
from slatewise.inference.workers import Part, Workers
from tests.inference.test_workers import PATIENCE, Stop, once, patiently, until


class Meeting:
    """Chunks that wait for each other: they end only if as many threads as guests run them at the same time."""

    def __init__(self, guests: int) -> None:
        self.barrier = threading.Barrier(guests)

    def __call__(self) -> str:
        self.barrier.wait(PATIENCE)
        return threading.current_thread().name


def divided(calls: Sequence[Callable[[], Any]], asked: list[int] | None = None) -> Chunks[list[list[Any]]]:
    """A job whose parts run some of the calls each, one in a chunk."""

    def part(some: Sequence[Callable[[], Any]]) -> Chunks[list[Any]]:
        found = []
        for call in some:
            yield 1
            found.append(call())
        return found

    def parts(threads: int) -> list[Chunks[list[Any]]]:
        if asked is not None:
            asked.append(threads)
        count = min(threads, len(calls))
        return [part(calls[len(calls) * k // count : len(calls) * (k + 1) // count]) for k in range(count)]

    return (yield from run_parts(parts))


def test_parts_run_at_the_same_time_in_idle_threads() -> None:
    async def main() -> None:
        meeting = Meeting(3)
        async with Workers(3) as workers:
            found = await patiently(workers.submit(divided([meeting, meeting, meeting])))
            assert len({name for names in found for name in names}) == 3
            await until(lambda: not workers.busy and not workers.queue)

    asyncio.run(main())


def test_results_have_the_order_of_the_parts() -> None:
    async def main() -> None:
        late = Stop()

        def end_first() -> str:
            late.may_end.set()
            return "second"

        async with Workers(2) as workers:
            assert await patiently(workers.submit(divided([late, end_first]))) == [["done"], ["second"]]

    asyncio.run(main())


def test_busy_threads_take_no_part() -> None:
    """A job takes as many parts as threads are idle when it asks, and goes on alone if none is."""

    async def main() -> None:
        asked: list[int] = []
        stop = Stop()
        async with Workers(2) as workers:
            held = workers.submit(once(stop))
            await until(stop.begun.is_set)
            calls = [lambda k=k: k for k in range(4)]
            assert await patiently(workers.submit(divided(calls, asked))) == [[0, 1, 2, 3]]
            assert asked == [1]
            stop.may_end.set()
            await held
            await until(lambda: not workers.busy)
            assert await patiently(workers.submit(divided(calls, asked))) == [[0, 1], [2, 3]]
            assert asked == [1, 2]

    asyncio.run(main())


def test_low_priority_leaves_idle_threads_to_others() -> None:
    async def main() -> None:
        calls = [lambda k=k: k for k in range(4)]
        async with Workers(2) as workers:
            assert await patiently(workers.submit(divided(calls), priority=1)) == [[0, 1, 2, 3]]
            await until(lambda: not workers.busy)
            assert await patiently(workers.submit(divided(calls), priority=0)) == [[0, 1], [2, 3]]

    asyncio.run(main())


def test_work_that_cannot_be_divided_stays_in_one_thread() -> None:
    async def main() -> None:
        async with Workers(4) as workers:
            assert await patiently(workers.submit(divided([lambda: "alone"]))) == [["alone"]]

    asyncio.run(main())


def test_without_threads_the_parts_run_one_after_the_other() -> None:
    assert run_all(divided([lambda k=k: k for k in range(3)])) == [[0, 1, 2]]


def test_job_goes_on_after_its_parts_and_may_divide_again() -> None:
    def job() -> Chunks[list[Any]]:
        yield 1
        first = yield from divided([lambda: 1, lambda: 2])
        yield 1
        second = yield from divided([lambda: 3, lambda: 4])
        return [*first, *second]

    async def main() -> None:
        async with Workers(2) as workers:
            assert await patiently(workers.submit(job())) == [[1], [2], [3], [4]]

    asyncio.run(main())


def test_each_part_pays_for_all() -> None:
    """The virtual time of a divided job advances by the cost of all of its parts, as if it had not been divided."""

    def part() -> Chunks[None]:
        yield 10
        yield 10

    def job() -> Chunks[None]:
        yield from run_parts(lambda threads: [part() for _ in range(threads)])
        yield 0

    async def main() -> None:
        async with Workers(2) as workers:
            submitted = workers.submit(job())
            await patiently(submitted)
            # each part: two chunks of 10 rows, times two parts
            assert submitted.virtual_start == 40

    asyncio.run(main())


def test_error_of_a_part_is_the_error_of_the_job() -> None:
    def fail() -> None:
        raise ValueError("mine")

    async def main() -> None:
        async with Workers(2) as workers:
            with pytest.raises(ValueError, match="mine"):
                await patiently(workers.submit(divided([fail, lambda: 1])))
            await until(lambda: not workers.busy and not workers.queue)
            assert await patiently(workers.submit(divided([lambda: 1, lambda: 2]))) == [[1], [2]]

    asyncio.run(main())


def test_time_of_the_parts_counts_as_time_of_the_job() -> None:
    async def main() -> None:
        pause = threading.Event()

        async with Workers(2) as workers:
            job = workers.submit(divided([lambda: pause.wait(0.05), lambda: pause.wait(0.05)]))
            await patiently(job)
            assert job.ran >= 0.1
            assert job.queued < job.ran

    asyncio.run(main())


def test_cancelled_job_ends_behind_the_chunks_of_its_parts() -> None:
    async def main() -> None:
        first, second, closed, later = Stop(), Stop(), [], []

        def job() -> Chunks[Any]:
            try:
                return (yield from divided([first, lambda: later.append(1), second, lambda: later.append(2)]))
            finally:
                closed.append(True)

        async with Workers(2) as workers:
            submitted = workers.submit(job())
            await until(lambda: first.begun.is_set() and second.begun.is_set())
            submitted.cancel()
            first.may_end.set()
            second.may_end.set()
            await until(lambda: not workers.busy and not workers.queue)
            assert (closed, later) == ([True], [])

    asyncio.run(main())


def test_cancelled_job_whose_parts_wait_is_closed_once() -> None:
    """One part runs and the other one waits behind an urgent job: both are gone after the cancellation."""

    async def main() -> None:
        closed: list[bool] = []
        stop, hold, busy = Stop(), Stop(), Stop()

        def job() -> Chunks[Any]:
            try:
                return (yield from divided([stop, lambda: 1, hold, lambda: 2]))
            finally:
                closed.append(True)

        async with Workers(2) as workers:
            submitted = workers.submit(job())
            await until(lambda: stop.begun.is_set() and hold.begun.is_set())
            urgent = workers.submit(once(busy), priority=-1_000)
            hold.may_end.set()  # its thread takes the urgent job, and this part waits in the queue
            await until(busy.begun.is_set)
            assert [type(task) for task in workers.queue] == [Part]
            submitted.cancel()
            await until(lambda: not workers.queue)
            assert not closed, "the other part still runs"
            stop.may_end.set()
            await until(lambda: closed == [True])
            busy.may_end.set()
            assert await patiently(urgent) == "done"

    asyncio.run(main())


def test_closing_the_workers_cancels_a_divided_job() -> None:
    async def main() -> None:
        first, second = Stop(), Stop()
        async with Workers(2) as workers:
            submitted = workers.submit(divided([first, lambda: 1, second, lambda: 2]))
            await until(lambda: first.begun.is_set() and second.begun.is_set())
            workers.stop()
            first.may_end.set()
            second.may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await patiently(submitted)
            await until(lambda: not workers.busy)

    asyncio.run(main())
