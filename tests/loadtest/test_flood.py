"""Open-loop load: arrivals, percentiles, what counts as ranked, and a short run against a server that is a stub."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.chaos.bench import Step
from loadtest.chaos.flood import Answer, Flood, Sender, member, percentile

RANKED = b'{"exit":"dot","degraded":["exit","overload"]}'
UNRANKED = b'{"exit":"input_order","degraded":["overload"]}'


def reply(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


@given(st.lists(st.integers(0, 100), min_size=1), st.sampled_from([0.01, 0.5, 0.95, 0.99, 1.0]))
def test_percentile_covers_its_share(values: list[int], q: float) -> None:
    found = percentile(values, q)
    assert sum(value <= found for value in values) >= q * len(values) > sum(value < found for value in values)


def test_percentile_of_nothing_is_no_number() -> None:
    assert math.isnan(percentile([], 0.99))


def test_arrivals_follow_the_rates_and_shares() -> None:
    flood = Flood([[b"a"], [b"b"]], [(1_000, 2.0), (100, 5.0)], shares=(0.9, 0.1))
    arrivals = flood.arrivals()
    dues = [due for due, _ in arrivals]
    assert dues == sorted(dues) and dues[-1] < 7
    assert sum(due < 2 for due in dues) == pytest.approx(2_000, rel=0.1)
    assert sum(due >= 2 for due in dues) == pytest.approx(500, rel=0.2)
    assert sum(kind for _, kind in arrivals) == pytest.approx(0.1 * len(arrivals), rel=0.25)


def test_members_are_found_in_the_text() -> None:
    assert member(RANKED, b'"exit":"', b'"') == "dot" and member(b"{}", b'"exit":"', b'"') == ""


def flood_stub(flood: Flood, replies: list[bytes]) -> tuple[list[Answer], int]:
    """The answers of a server that sends these replies in turn, in two pieces, and the number of its requests."""
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await reader.read(100):
            data = replies[asked % len(replies)]
            asked += 1
            writer.write(data[:20])
            await writer.drain()
            writer.write(data[20:])
        writer.close()

    async def main() -> list[Answer]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            answers = await Sender(server.sockets[0].getsockname()[1], flood).run()
            await asyncio.sleep(0.1)  # the ends of the connections
        return answers

    return asyncio.run(main()), asked


def test_each_arrival_has_one_answer() -> None:
    flood = Flood([[b"x" * 10]], [(200, 0.5)])
    replies = [reply("200 OK", RANKED), reply("200 OK", UNRANKED), reply("429 Too Many", b"{}")]
    answers, asked = flood_stub(flood, replies)
    assert len(answers) == asked == len(flood.arrivals())
    assert {(a.status, a.exit, a.is_good) for a in answers} == {
        (200, "dot", True),
        (200, "input_order", False),
        (429, "", False),
    }
    step = Step("x", 0.5, answers, 1.0, 0.1, 100.0, [])
    assert len(step.ranked) + len(step.refused) == len(answers)
    assert step.goodput == len(step.ranked) / 0.5


def test_refused_request_is_tried_again_until_it_is_ranked() -> None:
    flood = Flood([[b"x" * 10]], [(20, 0.5)], retry=True)
    answers, asked = flood_stub(flood, [reply("429 Too Many", b"{}"), reply("200 OK", RANKED)])
    assert len(answers) == asked >= 1.5 * len(flood.arrivals())
