"""Open-loop load that is cheap to make: requests arrive at given rates, whatever the server does.

It runs in a process of its own, on one event loop, with as many connections as the requests in flight need. Answers are
not parsed as JSON. The latency of a request counts from its arrival, also if it waits for a connection.

Called by: `overload.py`. Calls: nothing.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST_CONNECTIONS = 1_000
END_SECONDS = 30.0  # for the last answers
UNSCORED = "input_order"


class Answer(NamedTuple):
    kind: int  # of the request: its place in `Flood.kinds`
    due: float  # seconds from the start to the arrival
    latency: float  # seconds
    status: int  # 0: none
    exit: str  # empty without a ranking
    degraded: str  # the reasons, as in the answer

    @property
    def is_good(self) -> bool:
        """Whether the model ranked the candidates."""
        return self.status == 200 and self.exit != UNSCORED


@dataclass(frozen=True)
class Flood:
    """What is sent. kinds: requests of each kind, in turns. shares: of the arrivals, by kind."""

    kinds: Sequence[Sequence[bytes]]
    rates: Sequence[tuple[float, float]]  # (requests a second, seconds), one after the other
    shares: Sequence[float] = (1.0,)
    retry: bool = False  # a refused request is sent again at once, until it is ranked or the load ends
    seed: int = 0

    def arrivals(self) -> list[tuple[float, int]]:
        """Draw (seconds from the start, kind) of each arrival: Poisson arrivals."""
        rng = random.Random(self.seed)
        found = []
        begin = 0.0
        for rate, seconds in self.rates:
            due = begin
            while (due := due + rng.expovariate(rate)) < begin + seconds:
                found.append((due, rng.choices(range(len(self.kinds)), self.shares)[0]))
            begin += seconds
        return found


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least the share q of the values does not exceed; NaN for none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else math.nan


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.buffer = b""
        self.answer: Answer | None = None  # of the present request, not complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, kind: int, due: float, request: bytes) -> None:
        self.answer = Answer(kind, due, 0.0, 0, "", "")
        self.request = request
        self.buffer = b""
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not end or self.answer is None or len(body) < int(lengths[0]):
            return
        status = int(head.split(b" ", 2)[1])
        latency = time.perf_counter() - self.sender.begin - self.answer.due
        answer = self.answer._replace(
            status=status,
            latency=latency,
            exit=member(body, b'"exit":"', b'"'),
            degraded=member(body, b'"degraded":[', b"]"),
        )
        self.answer = None
        self.sender.on_answer(self, answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.sender.on_lost(self)


def member(body: bytes, before: bytes, after: bytes) -> str:
    """The text of a member of a JSON object, or an empty one."""
    start = body.find(before)
    return "" if start < 0 else body[start + len(before) : body.find(after, start + len(before))].decode()


class Sender:
    def __init__(self, port: int, flood: Flood) -> None:
        self.port = port
        self.flood = flood
        self.end = sum(seconds for _, seconds in flood.rates)
        self.idle: deque[Connection] = deque()
        self.waiting: deque[tuple[int, float]] = deque()
        self.open = 0
        self.connections: list[Connection] = []
        self.in_flight = 0
        self.turn = 0
        self.answers: list[Answer] = []

    async def run(self) -> list[Answer]:
        arrivals = self.flood.arrivals()
        self.begin = time.perf_counter()
        for due, kind in arrivals:
            if (wait := self.begin + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            self.in_flight += 1
            if self.idle:
                self.send(self.idle.pop(), kind, due)
                continue
            self.waiting.append((kind, due))
            if self.open < MOST_CONNECTIONS:
                self.open += 1
                asyncio.create_task(self.connect())  # noqa: RUF006 - it ends before this function does
        give_up = time.perf_counter() + END_SECONDS
        while self.in_flight and time.perf_counter() < give_up:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for connection in self.connections:
            connection.transport.close()
        await asyncio.sleep(0)
        lost = [Answer(0, self.end, END_SECONDS, 0, "", "")] * self.in_flight
        return self.answers + lost

    async def connect(self) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self), "127.0.0.1", self.port
            )
        except OSError:
            self.open -= 1
            return
        self.connections.append(connection)
        self.free(connection)

    def free(self, connection: Connection) -> None:
        if self.waiting:
            self.send(connection, *self.waiting.popleft())
        else:
            self.idle.append(connection)

    def send(self, connection: Connection, kind: int, due: float) -> None:
        requests = self.flood.kinds[kind]
        self.turn += 1
        connection.send(kind, due, requests[self.turn % len(requests)])

    def on_answer(self, connection: Connection, answer: Answer) -> None:
        self.answers.append(answer)
        now = time.perf_counter() - self.begin
        if self.flood.retry and not answer.is_good and now < self.end:
            connection.send(answer.kind, now, connection.request)
            return
        self.in_flight -= 1
        self.free(connection)

    def on_lost(self, connection: Connection) -> None:
        self.open -= 1
        if connection in self.idle:
            self.idle.remove(connection)
        if connection.answer is not None:
            self.answers.append(connection.answer)
            self.in_flight -= 1


def send_here(port: int, flood: Flood) -> tuple[list[Answer], float]:
    begin = time.process_time()
    answers = asyncio.run(Sender(port, flood).run())
    return answers, time.process_time() - begin


def send(port: int, flood: Flood) -> tuple[list[Answer], float]:
    """Send in a new process. Return the answers, and the CPU seconds that sending took."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(send_here, (port, flood))
