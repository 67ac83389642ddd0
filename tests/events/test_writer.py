"""The writer: batches, a bounded queue, an answer that follows the write, and what becomes of faults."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import pytest

from slatewise.errors import Overloaded, StoreFault
from slatewise.events import writer as module
from slatewise.events.event import Event
from slatewise.events.histories import FAILED, EmbeddedHistories
from slatewise.events.writer import EventWriter
from tests.events.support import NOW, event, items


class SlowHistories(EmbeddedHistories):
    """Embedded histories that wait for `gate`, and record their batches."""

    def __init__(self) -> None:
        super().__init__(1_000, 0.0, 10**8)
        self.gate = asyncio.Event()
        self.batches: list[list[str]] = []
        self.fails = False

    async def write(self, events: Sequence[tuple[Event, float]]) -> str:
        self.batches.append([each.item_id for each, _ in events])
        await self.gate.wait()
        if self.fails:
            raise RuntimeError("a defect")
        return await super().write(events)


def test_an_answer_follows_the_write_and_batches_gather() -> None:
    async def main() -> None:
        histories = SlowHistories()
        async with EventWriter(histories, None, 1_000, None) as writer:
            first = asyncio.ensure_future(writer.submit([event("0")]))
            await asyncio.sleep(0.01)
            rest = [asyncio.ensure_future(writer.submit([event(str(k), NOW + k)])) for k in range(1, 6)]
            await asyncio.sleep(0.01)
            assert not first.done() and writer.waiting == 6
            histories.gate.set()
            counts = await asyncio.gather(first, *rest, writer.submit([event("0"), event("9", NOW + 9)]))
        assert [(c.accepted, c.duplicate, c.dropped) for c in counts] == [(1, 0, 0)] * 6 + [(1, 1, 0)]
        assert histories.batches == [["0"], ["1", "2", "3", "4", "5"], ["0", "9"]]
        assert writer.waiting == 0
        assert await items(histories) == ["0", "1", "2", "3", "4", "5", "9"]

    asyncio.run(main())


def test_a_full_queue_refuses_at_once() -> None:
    async def main() -> None:
        histories = SlowHistories()
        async with EventWriter(histories, None, 5, None) as writer:
            held = asyncio.ensure_future(writer.submit([event(str(k)) for k in range(5)]))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="5 events wait"):
                await writer.submit([event("x")])
            histories.gate.set()
            await held
            assert (await writer.submit([event(str(k), NOW + 1) for k in range(7)])).accepted == 7, "nothing waits"

    asyncio.run(main())


def test_a_write_that_takes_too_long_is_a_store_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)

    async def main() -> None:
        histories = SlowHistories()
        async with EventWriter(histories, None, 100, None) as writer:
            with pytest.raises(StoreFault):
                await writer.submit([event("a")])
            histories.gate.set()
            async with asyncio.timeout(5):
                while writer.waiting:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert (await writer.submit([event("a")])).duplicate == 1, "the repeat finds what was written late"

    asyncio.run(main())


def test_a_defect_fails_its_batch_and_not_the_next() -> None:
    async def main() -> None:
        histories = SlowHistories()
        histories.gate.set()
        async with EventWriter(histories, None, 100, None) as writer:
            histories.fails = True
            with pytest.raises(StoreFault):
                await writer.submit([event("a")])
            histories.fails = False
            assert (await writer.submit([event("a")])).accepted == 1

    asyncio.run(main())


def test_what_is_queued_is_written_at_the_end() -> None:
    async def main() -> None:
        histories = SlowHistories()
        async with EventWriter(histories, None, 100, None) as writer:
            waiting = [asyncio.ensure_future(writer.submit([event(str(k), NOW + k)])) for k in range(3)]
            await asyncio.sleep(0)
            histories.gate.set()
        assert [(await each).accepted for each in waiting] == [1, 1, 1]
        assert await items(histories) == ["0", "1", "2"]
        with pytest.raises(Overloaded):
            await writer.submit([event("x")])

    asyncio.run(main())


def test_partly_failed_events_are_a_fault_of_their_request_only() -> None:
    class OneUserFails(EmbeddedHistories):
        async def write(self, events: Sequence[tuple[Event, float]]) -> str:
            good = [pair for pair in events if pair[0].user != "bad"]
            letters = iter(await super().write(good))
            return "".join(FAILED if each.user == "bad" else next(letters) for each, _ in events)

    async def main() -> None:
        async with EventWriter(OneUserFails(100, 0.0, 10**6), None, 100, None) as writer:
            mixed = writer.submit([event("a", user="bad"), event("b")])
            alone = writer.submit([event("c")])
            outcomes = await asyncio.gather(mixed, alone, return_exceptions=True)
            assert isinstance(outcomes[0], StoreFault)
            assert not isinstance(outcomes[1], BaseException) and outcomes[1].accepted == 1

    asyncio.run(main())


def test_users_of_new_events_are_reported() -> None:
    seen: list[set[str]] = []

    def written(users: Iterable[str]) -> None:
        seen.append(set(users))

    async def main() -> None:
        async with EventWriter(EmbeddedHistories(100, 0.0, 10**6), None, 100, written) as writer:
            await writer.submit([event("a"), event("b", user="v")])
            await writer.submit([event("a")])

    asyncio.run(main())
    assert seen == [{"u", "v"}, set()]


def test_requests_in_flight_are_bounded() -> None:
    async def main() -> None:
        async with EventWriter(EmbeddedHistories(100, 0.0, 10**6), None, 100, None) as writer:
            with writer.request(1), pytest.raises(Overloaded), writer.request(1):
                pass
            with writer.request(1):
                pass

    asyncio.run(main())
