"""Turns of the event loop: few requests pass at once, in the order of their arrival, and late ones are told so."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.ranking import turns as module
from slatewise.ranking.turns import AT_ONCE, LARGE, Turns


@given(st.integers(1, 30))
def test_requests_pass_in_order_and_few_at_once(count: int) -> None:
    """Between two turns of the loop at most AT_ONCE requests pass."""
    passed: list[tuple[int, int]] = []  # (turn of the loop, request)

    async def main() -> None:
        turns = Turns(60.0)
        turn = 0

        async def one(k: int) -> None:
            assert await turns.wait()
            passed.append((turn, k))

        tasks = [asyncio.create_task(one(k)) for k in range(count)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            turn += 1
        assert not turns.waiting
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert turns.left == AT_ONCE and not turns.is_scheduled, "an idle loop has nothing to do"

    asyncio.run(main())
    assert [k for _, k in passed] == list(range(count))
    for turn, _ in passed:
        assert sum(other == turn for other, _ in passed) <= AT_ONCE + 1


def test_request_alone_does_not_wait() -> None:
    async def main() -> None:
        waiting = Turns(60.0).wait()
        with pytest.raises(StopIteration) as result:
            waiting.send(None)
        assert result.value.value is True

    asyncio.run(main())


def test_late_requests_take_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> list[bool]:
        now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: now)
        turns = Turns(0.5)
        turns.left = 0
        tasks = [asyncio.create_task(turns.wait()) for _ in range(20)]
        await asyncio.sleep(0)
        turns.is_scheduled = True  # the loop stands
        now += 1.0
        late = len(turns.waiting)
        turns.next()
        return [await task for task in tasks[:late]]

    results = asyncio.run(main())
    assert len(results) == 20 and not any(results)


@pytest.mark.parametrize(("size", "elsewhere"), [(LARGE, False), (LARGE + 1, True)])
def test_large_bodies_are_parsed_in_a_thread(size: int, elsewhere: bool) -> None:
    async def main() -> bool:
        return await Turns(60.0).parse(size, threading.get_ident) != threading.get_ident()

    assert asyncio.run(main()) == elsewhere


def test_clients_that_are_gone_take_no_turn() -> None:
    async def main() -> None:
        turns = Turns(60.0)
        turns.left = 0
        gone = [asyncio.create_task(turns.wait()) for _ in range(10)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        stays = asyncio.create_task(turns.wait())
        async with asyncio.timeout(10):
            assert await stays

    asyncio.run(main())
