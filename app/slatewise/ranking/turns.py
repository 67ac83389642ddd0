"""Turns of the event loop: how many requests are parsed before the loop looks at everything else again.

Parsing takes a millisecond for a thousand candidates. If hundreds of requests arrive at once, they wait here, and
probes, answers and results of the threads do not wait for all of them. A request that has waited too long is refused
unparsed, which costs little.

Called by: `admission.py`. Calls: nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

AT_ONCE = 2
LARGE = 100_000  # bytes of a body that is parsed in a thread

T = TypeVar("T")


class Turns:
    """Lives on the event loop. most_seconds: the longest wait."""

    def __init__(self, most_seconds: float) -> None:
        self.most_seconds = most_seconds
        self.waiting: deque[tuple[float, asyncio.Future[bool]]] = deque()  # (time.perf_counter() of arrival, its turn)
        self.left = AT_ONCE  # that may still be parsed in this turn
        self.is_scheduled = False
        self.large = asyncio.Lock()

    async def parse(self, size: int, function: Callable[[], T]) -> T:
        """Call a function that parses so many bytes.

        That of a large body runs in a thread, one at a time: the interpreter goes on with the event loop meanwhile,
        unless a single call into C takes long.
        """
        if size <= LARGE:
            return function()
        async with self.large:
            return await asyncio.to_thread(function)

    async def wait(self) -> bool:
        """Wait for a turn. Return whether it came in time. While few requests arrive, this does not wait at all."""
        if self.left and not self.waiting:
            self.left -= 1
            self.schedule()
            return True
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.waiting.append((time.perf_counter(), turn))
        self.schedule()
        return await turn

    def schedule(self) -> None:
        if not self.is_scheduled:
            self.is_scheduled = True
            asyncio.get_running_loop().call_soon(self.next)

    def next(self) -> None:
        """Begin a turn: the first of the waiting requests are parsed, and those that have waited too long are not."""
        self.is_scheduled = False
        self.left = AT_ONCE
        now = time.perf_counter()
        while self.waiting and self.left:
            since, turn = self.waiting.popleft()
            if turn.done():  # its client is gone
                continue
            in_time = now - since <= self.most_seconds
            self.left -= in_time
            turn.set_result(in_time)
        if self.left < AT_ONCE:
            self.schedule()
