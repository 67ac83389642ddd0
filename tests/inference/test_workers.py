"""The workers: results, order of the queue, cancellation, closing. Jobs wait for events, never for the clock."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise import metrics
from slatewise.inference import workers as scheduling
from slatewise.inference.chunks import Chunks
from slatewise.inference.workers import PRIORITY_ROWS, Job, Workers

PATIENCE = 30  # seconds; not reached if the code is right
Turn = tuple[int, int]  # job, chunk


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the condition depends on other threads
            await asyncio.sleep(0.001)


async def patiently(job: Job[Any]) -> Any:
    return await asyncio.wait_for(job, PATIENCE)


def once(call: Callable[[], Any], cost: int = 1) -> Chunks[Any]:
    """A job of one chunk."""
    yield cost
    return call()


def counted(number: int, costs: list[int], ran: list[Turn], closed: list[int] | None = None) -> Chunks[int]:
    """A job that records which of its chunks ran, and whether it was closed before its end."""
    try:
        for k, cost in enumerate(costs):
            yield cost
            ran.append((number, k))
    except GeneratorExit:
        if closed is not None:
            closed.append(number)
        raise
    return number


class Stop:
    """A chunk that signals its start and ends on a signal."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.may_end.wait(PATIENCE)
        return "done"


@asynccontextmanager
async def one_busy_thread() -> AsyncIterator[tuple[Workers, threading.Event]]:
    """Open workers whose only thread runs one job until the event is set."""
    stop = Stop()
    async with Workers(1) as workers:
        held = workers.submit(once(stop))
        await until(stop.begun.is_set)
        try:
            yield workers, stop.may_end
        finally:
            stop.may_end.set()
            await held


class Clock:
    """Replaces the module `time`: the test sets the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


# Results and waits


def test_job_runs_in_a_worker_thread_and_gives_its_result() -> None:
    def job() -> Chunks[str]:
        yield 1
        yield 2
        return threading.current_thread().name

    async def main() -> None:
        async with Workers(2) as workers:
            submitted = workers.submit(job())
            assert (await patiently(submitted)).startswith("slatewise-")
            assert 0 <= submitted.queued < PATIENCE

    asyncio.run(main())


def test_queued_counts_only_the_time_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(scheduling, "time", clock)

    def work(seconds: float, chunks: int) -> Chunks[None]:
        for _ in range(chunks):
            yield 1
            clock.now += seconds

    async def main() -> None:
        async with one_busy_thread() as (workers, release):
            first = workers.submit(work(7, 2))
            second = workers.submit(work(100, 2))
            clock.now = 3.0
            assert (first.queued, second.queued) == (3, 3), "so far"
            clock.now = 5.0
            release.set()
            await patiently(first)
            await patiently(second)
            # first waits 5, runs 7, waits 100, runs 7; second waits 5 + 7, runs 100, waits 7, runs 100
            assert (first.queued, second.queued) == (105, 19)
            clock.now += 1_000
            assert (first.queued, second.queued) == (105, 19), "a finished job does not wait"

    asyncio.run(main())


def test_queued_is_at_least_the_time_a_busy_thread_took() -> None:
    async def main() -> None:
        async with one_busy_thread() as (workers, release):
            job = workers.submit(once(lambda: None))
            await asyncio.sleep(0.05)
            release.set()
            await job
            assert job.queued >= 0.05

    asyncio.run(main())


def test_jobs_run_concurrently_on_as_many_threads() -> None:
    async def main() -> None:
        meet = threading.Barrier(3, timeout=PATIENCE)
        async with Workers(3) as workers:
            await asyncio.gather(*(workers.submit(once(meet.wait)) for _ in range(3)))

    asyncio.run(main())


# Exceptions of a job


def failing(error: BaseException, chunk: int) -> Chunks[None]:
    """Raises at the end of a chunk; chunk -1 is before the first `yield`."""
    for k in range(-1, 3):
        if k >= 0:
            yield 1
        if k == chunk:
            raise error


ERRORS = [
    ValueError("mine"),
    StopIteration(),
    asyncio.CancelledError(),
    BaseException("bare"),
    KeyboardInterrupt(),
    GeneratorExit(),
]


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_exception_of_a_job_reaches_only_its_caller(error: BaseException, chunk: int) -> None:
    async def main() -> None:
        async with Workers(1) as workers:
            jobs: list[Job[Any]] = [
                workers.submit(chunks) for chunks in (once(lambda: 1), failing(error, chunk), once(lambda: 2))
            ]
            _, pending = await asyncio.wait(jobs, timeout=5)
            assert not pending, "a job was never settled"
            assert [job.result() for job in (jobs[0], jobs[2])] == [1, 2]
            found = jobs[1].exception()
            assert found is error or (isinstance(error, StopIteration) and isinstance(found, RuntimeError))
            assert await patiently(workers.submit(once(lambda: 3))) == 3

    asyncio.run(main())


@pytest.mark.parametrize(
    "error", [ValueError("mine"), StopIteration(), BaseException("bare")], ids=lambda error: type(error).__name__
)
def test_exception_before_the_first_chunk_is_raised_by_submit(error: BaseException) -> None:
    async def main() -> None:
        async with Workers(1) as workers:
            with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)):
                workers.submit(failing(error, -1))
            assert workers.queue == []
            assert await patiently(workers.submit(once(lambda: 3))) == 3

    asyncio.run(main())


def test_job_without_chunks_is_done_at_once() -> None:
    def empty() -> Chunks[str]:
        yield from ()
        return "nothing to do"

    async def main() -> None:
        async with one_busy_thread() as (workers, release):
            job = workers.submit(empty())
            assert await patiently(job) == "nothing to do"
            assert workers.queue == []
            following = workers.submit(once(lambda: 3))  # the empty job left no ticket behind
            release.set()
            assert await patiently(following) == 3
            assert await patiently(workers.submit(once(lambda: 4))) == 4

    asyncio.run(main())


# Order


costs = st.lists(st.integers(1, 512), min_size=1, max_size=6)
drawn_jobs = st.lists(st.tuples(st.integers(-2, 2), costs), max_size=8)


def slow_order(jobs: dict[int, tuple[int, list[int]]]) -> list[Turn]:
    """Reference simulation: next is the job with the fewest rows; a priority counts as rows. Then the oldest."""
    ran: list[Turn] = []
    done = dict.fromkeys(jobs, 0)
    while left := [n for n in jobs if done[n] < len(jobs[n][1])]:
        n = min(left, key=lambda n: (PRIORITY_ROWS * jobs[n][0] + sum(jobs[n][1][: done[n]]), n))
        ran.append((n, done[n]))
        done[n] += 1
    return ran


async def order_of(jobs: list[tuple[int, list[int]]]) -> list[Turn]:
    """Return the order in which one thread runs the chunks, if all jobs are queued before the thread is free."""
    ran: list[Turn] = []
    async with one_busy_thread() as (workers, release):
        submitted = [workers.submit(counted(n, each, ran), priority) for n, (priority, each) in enumerate(jobs)]
        assert len(workers.queue) == len(jobs)
        release.set()
        assert await asyncio.wait_for(asyncio.gather(*submitted), PATIENCE) == list(range(len(jobs)))
    return ran


@settings(max_examples=60, deadline=None)
@given(drawn_jobs)
def test_chunk_order_equals_the_reference_simulation(jobs: list[tuple[int, list[int]]]) -> None:
    assert asyncio.run(order_of(jobs)) == slow_order(dict(enumerate(jobs)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-100, 100), max_size=12))
def test_jobs_run_by_priority_then_by_arrival(priorities: list[int]) -> None:
    ran = asyncio.run(order_of([(priority, [1]) for priority in priorities]))
    assert [n for n, _ in ran] == sorted(range(len(priorities)), key=lambda number: (priorities[number], number))


@settings(max_examples=40, deadline=None)
@given(st.lists(costs, min_size=2, max_size=6))
def test_no_job_is_ahead_of_another_by_more_than_two_chunks(jobs: list[list[int]]) -> None:
    """The theorem of start-time fair queueing, in rows, for any division into chunks."""
    rows = [0] * len(jobs)
    longest = list(map(max, jobs))
    left = list(map(len, jobs))
    for n, k in asyncio.run(order_of([(0, each) for each in jobs])):
        rows[n] += jobs[n][k]
        left[n] -= 1
        busy = [m for m in range(len(jobs)) if left[m]]
        assert all(abs(rows[a] - rows[b]) <= longest[a] + longest[b] for a in busy for b in busy)


def test_large_and_small_job_get_equal_numbers_of_rows() -> None:
    """Four chunks of 512 rows and sixteen of 128: after each large chunk, small chunks get as many rows."""
    ran = asyncio.run(order_of([(0, [512] * 4), (0, [128] * 16)]))
    assert ran == [turn for k in range(4) for turn in [(0, k), *((1, 4 * k + j) for j in range(4))]]


@pytest.mark.parametrize("at_work", [0, 1, 5, 8])
def test_new_job_starts_at_the_virtual_time_of_running_job(at_work: int) -> None:
    """The new job neither waits for the end of the running job, nor runs until both have had equally many rows."""

    async def main() -> list[Turn]:
        ran: list[Turn] = []
        stop = Stop()

        def large() -> Chunks[None]:
            for k in range(10):
                yield 100
                if k == at_work:
                    stop()
                ran.append((0, k))

        async with Workers(1) as workers:
            job = workers.submit(large())
            await until(stop.begun.is_set)
            new = workers.submit(counted(1, [100] * 10, ran))
            stop.may_end.set()
            await asyncio.wait_for(asyncio.gather(job, new), PATIENCE)
        return ran

    ran = asyncio.run(main())
    both = ran[at_work + 1 : at_work + 1 + 2 * (9 - at_work)]
    assert ran[: at_work + 1] == [(0, k) for k in range(at_work + 1)]
    assert [n for n, _ in both] == [1, 0] * (9 - at_work), "alternately, the new one first"
    assert sorted(ran) == [(n, k) for n in range(2) for k in range(10)]


def test_large_job_is_not_starved_by_a_stream_of_small_ones() -> None:
    """At any time one small job runs and another waits. The large job gets at least a fifth of the rows."""
    chunks = 8
    rows = 512
    small_rows = 64
    most = 256

    async def main() -> tuple[bool, int]:
        loop = asyncio.get_running_loop()
        small = 0

        def begin(arrived: threading.Event) -> None:
            nonlocal small
            if not large.done() and small < most:
                small += 1
                row.append(workers.submit(one_of_many(), 0))
            arrived.set()

        def one_of_many() -> Chunks[None]:
            yield small_rows
            arrived = threading.Event()
            loop.call_soon_threadsafe(begin, arrived)
            assert arrived.wait(PATIENCE)

        row: list[Job[None]] = []
        async with one_busy_thread() as (workers, release):
            large = workers.submit(counted(0, [rows] * chunks, []))
            for _ in range(2):
                begin(threading.Event())
            release.set()
            await patiently(large)
            passed = small
            while any(not job.done() for job in row):
                await asyncio.wait_for(asyncio.gather(*row), PATIENCE)
        return passed < most, passed

    done, passed = asyncio.run(main())
    assert done, f"all of {passed} small jobs came first"


def test_higher_priority_job_preempts_between_two_chunks() -> None:
    async def main() -> list[Turn]:
        ran: list[Turn] = []
        stop = Stop()

        def large() -> Chunks[None]:
            for k in range(5):
                yield 1
                if k == 2:
                    stop()
                ran.append((0, k))

        async with Workers(1) as workers:
            jobs: list[Job[Any]] = [workers.submit(large(), priority=1)]
            await until(stop.begun.is_set)
            jobs += [
                workers.submit(counted(1, [9, 9, 9], ran), priority=2),
                workers.submit(counted(2, [500] * 3, ran), priority=-50),
            ]
            stop.may_end.set()
            await asyncio.wait_for(asyncio.gather(*jobs), PATIENCE)
        return ran

    assert asyncio.run(main()) == [
        (0, 0),
        (0, 1),
        (0, 2),
        (2, 0),
        (2, 1),
        (2, 2),
        (0, 3),
        (0, 4),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


def test_thread_keeps_its_job_if_no_other_job_waits() -> None:
    meet = threading.Barrier(2, timeout=PATIENCE)

    def job(threads: list[str]) -> Chunks[None]:
        yield 1
        meet.wait()  # both jobs are running
        threads.append(threading.current_thread().name)
        for _ in range(200):
            yield 1
            threads.append(threading.current_thread().name)

    async def main() -> None:
        async with Workers(3) as workers:
            first = []
            second = []
            await asyncio.wait_for(asyncio.gather(workers.submit(job(first)), workers.submit(job(second))), PATIENCE)
            assert len(first) == len(second) == 201
            assert len(set(first)) == len(set(second)) == 1
            assert first[0] != second[0]

    asyncio.run(main())


@pytest.mark.parametrize("error", [ValueError("mine"), BaseException("bare")], ids=lambda error: type(error).__name__)
def test_thread_is_free_after_its_job_ended_in_any_way(error: BaseException) -> None:
    async def main() -> None:
        async with one_busy_thread() as (workers, release):
            jobs = [workers.submit(chunks) for chunks in (once(lambda: 1), failing(error, 1), once(lambda: 2))]
            jobs[2].cancel()
            release.set()
            await asyncio.wait(jobs, timeout=PATIENCE)
            assert jobs[1].exception() is error
            await until(lambda: workers.busy == 0 and not workers.queue)

    asyncio.run(main())


# Cancellation


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), costs, st.booleans()), max_size=10))
def test_cancelled_jobs_do_not_run_or_change_the_order(jobs: list[tuple[int, list[int], bool]]) -> None:
    """The order of the other jobs is the same as without the cancelled jobs."""

    async def main() -> None:
        ran: list[Turn] = []
        closed: list[int] = []
        async with one_busy_thread() as (workers, release):
            submitted = [
                workers.submit(counted(n, each, ran, closed), priority) for n, (priority, each, _) in enumerate(jobs)
            ]
            kept = {n: (priority, each) for n, (priority, each, cancelled) in enumerate(jobs) if not cancelled}
            for n, job in enumerate(submitted):
                if n not in kept:
                    job.cancel()
            release.set()
            assert await asyncio.wait_for(asyncio.gather(*(submitted[n] for n in kept)), PATIENCE) == list(kept)
            await until(lambda: not workers.queue and not workers.busy)
            assert ran == slow_order(kept)
            assert sorted(closed) == [n for n in range(len(jobs)) if n not in kept]
            assert all(job.cancelled() == (n not in kept) for n, job in enumerate(submitted))

    asyncio.run(main())


def test_job_cancelled_between_chunks_is_closed() -> None:
    async def main() -> None:
        stop = Stop()
        ran = []
        closed = threading.Event()

        def job() -> Chunks[None]:
            try:
                for k in range(5):
                    yield 1
                    ran.append(k)
                    if k == 1:
                        stop()
            finally:
                closed.set()

        async with Workers(1) as workers:
            cancelled = workers.submit(job())
            await until(stop.begun.is_set)
            cancelled.cancel()
            assert not closed.is_set(), "a running chunk is not interrupted"
            following = workers.submit(once(lambda: "mine"))
            stop.may_end.set()
            assert await patiently(following) == "mine"
            await until(closed.is_set)
            assert ran == [0, 1]
            assert cancelled.cancelled()
            assert workers.queue == []

    asyncio.run(main())


def test_cancelling_a_running_job_does_not_disturb_the_next() -> None:
    async def main() -> None:
        loop_errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
        stop = Stop()
        ended = threading.Event()

        def hold() -> None:
            stop()
            ended.set()

        async def call(workers: Workers) -> None:
            await workers.submit(once(hold))

        async with Workers(1) as workers:
            first = asyncio.create_task(call(workers))
            await until(stop.begun.is_set)
            following = workers.submit(once(lambda: "mine"))
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert len(workers.queue) == 1
            stop.may_end.set()
            assert await following == "mine"
            assert ended.is_set()
            assert workers.queue == []
        assert not loop_errors

    asyncio.run(main())


def test_generator_that_raises_on_close_keeps_the_thread() -> None:
    """The exception is ignored, because the job is cancelled already."""

    def stubborn() -> Chunks[None]:
        try:
            yield 1
        finally:
            raise ValueError("while closing")

    async def main() -> None:
        async with one_busy_thread() as (workers, release):
            workers.submit(stubborn()).cancel()
            release.set()
            assert await asyncio.wait_for(workers.submit(once(lambda: "served")), 5) == "served"
            assert all(thread.is_alive() for thread in workers.threads)
            await until(lambda: workers.busy == 0)

    asyncio.run(main())


# Closing


async def closing(workers: Workers) -> asyncio.Task[None]:
    """Start `__aexit__`. Return its task when new jobs are refused and queued jobs are cancelled."""
    task = asyncio.create_task(workers.__aexit__())
    await until(lambda: workers.stopping)
    return task


def test_closing_cancels_queued_jobs_and_finishes_running_ones() -> None:
    async def main() -> None:
        loop_errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
        stop = Stop()
        ran = threading.Event()
        workers = await Workers(1).__aenter__()
        held = workers.submit(once(stop))
        await until(stop.begun.is_set)
        waiting = [workers.submit(once(ran.set)) for _ in range(5)]
        end = await closing(workers)
        assert not end.done(), "a running chunk is awaited"
        stop.may_end.set()
        await asyncio.wait_for(end, PATIENCE)
        assert not any(thread.is_alive() for thread in workers.threads)
        assert await patiently(held) == "done"
        assert all(job.cancelled() for job in waiting)
        assert not ran.is_set()
        assert workers.queue == []
        assert not loop_errors

    asyncio.run(main())


def test_closing_cancels_a_job_between_two_chunks() -> None:
    """The caller gets CancelledError, as for a queued job, and the remaining chunks do not run."""

    async def main() -> None:
        loop_errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
        stop = Stop()
        ran = []

        def job() -> Chunks[str]:
            for k in range(3):
                yield 1
                ran.append(k)
                if k == 1:
                    stop()
            return "all of it"

        workers = await Workers(1).__aenter__()
        submitted = workers.submit(job())
        await until(stop.begun.is_set)
        end = await closing(workers)
        stop.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await patiently(submitted)
        await asyncio.wait_for(end, PATIENCE)
        assert ran == [0, 1]
        assert not any(thread.is_alive() for thread in workers.threads)
        assert workers.queue == []
        assert not loop_errors

    asyncio.run(main())


def test_job_submitted_after_closing_is_cancelled() -> None:
    async def main() -> None:
        begun = []

        def job() -> Chunks[None]:
            begun.append(1)
            yield 1

        async with Workers(1) as workers:
            pass
        with pytest.raises(asyncio.CancelledError):
            await workers.submit(job())
        assert workers.queue == []
        assert not begun

    asyncio.run(main())


def test_queue_is_empty_after_many_cancellations() -> None:
    async def main() -> None:
        async with Workers(2) as workers:
            ran: list[Turn] = []
            jobs = [workers.submit(counted(n, [1 + n % 5] * (1 + n % 4), ran), n % 3) for n in range(400)]
            for k, job in enumerate(jobs):
                if k % 3 == 0:
                    job.cancel()
                if k % 11 == 0:
                    await asyncio.sleep(0)
            results = await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), PATIENCE)
            assert all(isinstance(r, asyncio.CancelledError) or r == n for n, r in enumerate(results))
            assert all(not isinstance(r, asyncio.CancelledError) for n, r in enumerate(results) if n % 3)
            await until(lambda: not workers.queue and workers.busy == 0)
            assert workers.tickets.empty()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            for n in range(1, 400):
                own = [k for m, k in ran if m == n]
                assert all(before + 1 == after for before, after in pairwise(own)), "in order, each once"
                assert n % 3 == 0 or len(own) == 1 + n % 4

    asyncio.run(main())


def test_idle_thread_keeps_no_job_alive() -> None:
    class Payload:
        pass

    async def main() -> None:
        async with Workers(1) as workers:
            payload = Payload()
            watched = weakref.ref(payload)
            assert await workers.submit(once(lambda p=payload: p)) is payload
            del payload

            def gone() -> bool:
                gc.collect()
                return watched() is None

            await until(gone)

    asyncio.run(main())


def test_cancelled_job_leaves_the_queue_at_once() -> None:
    ran: list[int] = []

    def job(number: int) -> Chunks[None]:
        yield 1
        ran.append(number)

    async def main() -> None:
        async with one_busy_thread() as (workers, release):
            jobs = [workers.submit(job(number)) for number in range(3)]
            jobs[1].cancel()
            await asyncio.sleep(0)  # in which the callbacks of futures run
            assert workers.queue == [jobs[0], jobs[2]]
            release.set()
            await patiently(jobs[2])
            assert ran == [0, 2]
            await patiently(workers.submit(job(3)))  # the thread went on after the ticket without a job

    asyncio.run(main())
    assert ran == [0, 2, 3]


def test_time_of_a_chunk_for_a_dead_request_is_counted() -> None:
    before = metrics.DEAD_SECONDS._value.get()

    async def main() -> None:
        begun, may_end = threading.Event(), threading.Event()

        def job() -> Chunks[None]:
            yield 1
            begun.set()
            may_end.wait(PATIENCE)

        async with Workers(1) as workers:
            dead = workers.submit(job())
            await asyncio.to_thread(begun.wait, PATIENCE)
            dead.cancel()
            await asyncio.sleep(0.05)
            may_end.set()

    asyncio.run(main())
    assert metrics.DEAD_SECONDS._value.get() - before >= 0.04


def test_important_jobs_do_not_starve_one_that_waits() -> None:
    """Jobs of priority -100 keep arriving; one of priority 0 is done after a bounded number of their rows."""
    ran: list[int] = []

    def job(number: int) -> Chunks[None]:
        yield 100
        ran.append(number)

    async def main() -> None:
        async with one_busy_thread() as (workers, release):
            waiting = workers.submit(job(-1))
            arrivals = [workers.submit(job(0), priority=-100)]
            release.set()
            for number in range(1, 1_000):
                await patiently(arrivals[-1])
                arrivals = [workers.submit(job(number), priority=-100)]
                if waiting.done():
                    break
            assert waiting.done()

    asyncio.run(main())
    assert 0 < ran.index(-1) <= 2 * 100 * PRIORITY_ROWS // 100 + 2
