"""Places of connections, and the bytes of bodies that are being read: who gives way when all are taken."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from slatewise.errors import BodyTimeout, Overloaded
from slatewise.http.door import SPARE, Door, DoorLimits, address_of, places
from slatewise.http.whole_bodies import BODIES_AT_ONCE, WholeBodies


class Visitor:
    def __init__(self, door: Door, address: str) -> None:
        self.address = address
        self.due = float("inf")
        self.evicted = False
        self.place = door.enter(self)

    def on_due(self) -> None:
        self.due = float("inf")
        self.evicted = True

    def evict(self) -> None:
        self.evicted = True


def door_of(**changes: Any) -> Door:
    values: dict[str, Any] = {
        "max_connections": 4,
        "max_connections_per_address": 0,
        "max_header_bytes": 1_000,
        "header_timeout_s": 1.0,
        "keep_alive_s": 1.0,
        "write_timeout_s": 1.0,
    }
    return Door(DoorLimits(**(values | changes)))


def test_oldest_of_the_most_frequent_address_gives_way() -> None:
    async def main() -> None:
        door = door_of()
        good = Visitor(door, "good")
        bad = [Visitor(door, "bad") for _ in range(3)]
        door.wait(bad[0])  # it has had an answer, and begins to wait anew
        assert Visitor(door, "new").place == "place"
        assert [visitor.evicted for visitor in [good, *bad]] == [False, False, True, False]

    asyncio.run(main())


def test_address_with_many_at_work_takes_no_place_of_another() -> None:
    async def main() -> None:
        door = door_of()
        good = Visitor(door, "good")
        for visitor in [Visitor(door, "bad") for _ in range(3)]:
            door.work(visitor)
        assert Visitor(door, "bad").place == "spare"
        assert not good.evicted
        assert Visitor(door, "new").place == "place" and good.evicted, "it holds no more than a new one"

    asyncio.run(main())


def test_connections_at_work_keep_their_places_and_probes_get_spare_ones(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        door = door_of()
        working = [Visitor(door, "a") for _ in range(4)]
        for visitor in working:
            door.work(visitor)
        spare = [Visitor(door, "b") for _ in range(SPARE)]
        assert [visitor.place for visitor in spare] == ["spare"] * SPARE
        assert not any(visitor.evicted for visitor in spare)
        assert Visitor(door, "b").place == "spare" and spare.pop(0).evicted
        spare.extend(door.waiting_spare["b"])
        for visitor in spare:
            door.work(visitor)
        assert Visitor(door, "b").place == "full"
        door.leave(working[0])
        assert Visitor(door, "b").place == "place"
        assert not any(visitor.evicted for visitor in [*working, *spare])

    asyncio.run(main())
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_address_has_no_more_than_its_limit() -> None:
    async def main() -> None:
        door = door_of(max_connections_per_address=2)
        first = Visitor(door, "a")
        assert [Visitor(door, "a").place, Visitor(door, "a").place, Visitor(door, "b").place] == [
            "place",
            "address",
            "place",
        ]
        door.leave(first)
        assert Visitor(door, "a").place == "place"

    asyncio.run(main())


def test_deadline_that_has_passed_is_seen() -> None:
    async def main() -> None:
        door = door_of()
        late, early = Visitor(door, "a"), Visitor(door, "a")
        late.due = asyncio.get_running_loop().time()
        await asyncio.sleep(0.3)
        assert late.evicted and not early.evicted
        door.leave(late)
        door.leave(early)
        await asyncio.sleep(0.3)
        assert door.sweeping is None

    asyncio.run(main())


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("10.0.0.1", 5), "10.0.0.1"),
        (("::ffff:10.0.0.1", 5), "10.0.0.1"),
        (("2001:db8:1:2:3:4:5:6", 5), "2001:db8:1:2"),
        (("2001:db8::6", 5), "2001:db8:0:0"),
        (("fe80::1%eth0", 5), "fe80:0:0:0"),
        (("::1", 5), "0:0:0:0"),
        (None, ""),
    ],
)
def test_address_stands_for_one_client(peer: object, address: str) -> None:
    assert address_of(peer) == address


def test_connections_stay_below_the_descriptors() -> None:
    assert places(4_096, 1_024, 100) == 1_024 - 100 - SPARE
    assert places(100, 1_024, 100) == 100
    assert places(100, -1, 100) == 100
    assert places(100, 50, 100) == 1


LIMIT = 1_000


class Sender:
    """A request whose body is sent in pieces, and what the application did with it."""

    def __init__(self, middleware: WholeBodies, address: str = "a") -> None:
        self.pieces: asyncio.Queue[Message] = asyncio.Queue()
        scope: Scope = {"type": "http", "method": "POST", "headers": [], "client": (address, 1)}
        self.task = asyncio.ensure_future(middleware(scope, self.pieces.get, self.no_answer))

    async def no_answer(self, message: Message) -> None:
        raise AssertionError

    def send(self, piece: bytes, more: bool = True) -> None:
        self.pieces.put_nowait({"type": "http.request", "body": piece, "more_body": more})


def middleware_of(seconds: float) -> tuple[WholeBodies, list[Message]]:
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(await receive())

    return WholeBodies(app, LIMIT, seconds), received


def test_application_gets_the_body_as_one_message() -> None:
    async def main() -> None:
        middleware, received = middleware_of(60)
        sender = Sender(middleware)
        sender.send(b"a")
        sender.send(b"b")
        await asyncio.sleep(0.02)
        assert not received and middleware.bytes_of_all == 2
        sender.send(b"c", more=False)
        await sender.task
        assert received == [{"type": "http.request", "body": b"abc", "more_body": False}]
        assert middleware.bytes_of_all == 0

    asyncio.run(main())


def test_body_without_progress_has_half_of_the_time() -> None:
    async def main() -> None:
        middleware, _ = middleware_of(1.0)
        stalled, going_on = Sender(middleware), Sender(middleware)
        begin = asyncio.get_running_loop().time()
        stalled.send(b"a")
        going_on.send(b"a" * 900)  # as much as arrives in .9 seconds at the least rate
        with pytest.raises(BodyTimeout):
            await stalled.task
        assert not going_on.task.done()
        with pytest.raises(BodyTimeout):
            await going_on.task
        assert asyncio.get_running_loop().time() - begin >= 1.0

    asyncio.run(main())


def test_bodies_above_the_limit_of_all_bytes_drop_one_of_the_largest_holder() -> None:
    async def main() -> None:
        middleware, received = middleware_of(60)
        good = Sender(middleware, "good")
        good.send(b"g" * 500)
        small = Sender(middleware, "bad")
        small.send(b"s")
        bad = [Sender(middleware, "bad") for _ in range(BODIES_AT_ONCE)]
        for sender in bad:
            sender.send(b"b" * 999)
        with pytest.raises(Overloaded):
            await bad[0].task
        await asyncio.sleep(0)
        assert [sender.task.done() for sender in [good, small, *bad[1:]]] == [False] * (1 + BODIES_AT_ONCE)
        good.send(b"", more=False)
        await good.task
        assert received == [{"type": "http.request", "body": b"g" * 500, "more_body": False}]
        for sender in [small, *bad[1:]]:
            sender.task.cancel()
        await asyncio.gather(*(sender.task for sender in [small, *bad[1:]]), return_exceptions=True)
        assert middleware.bytes_of_all == 0 and not middleware.parts

    asyncio.run(main())
