"""The thread that loads versions and frees them while others are served.

It does one thing at a time. While it works, Python passes the interpreter lock on ten times as often as usual, so the
event loop waits half a millisecond for it instead of five. After each step that keeps a core busy (reading and hashing
a file, opening a session), the thread sleeps for as long as the step took, so a load takes at most half a core.

It has the priority of all threads. A lower one (setpriority(2)) makes things worse: a thread that is set aside while it
holds the interpreter lock stops the event loop, for 0.4 s on a busy machine (docs/adr/0018-versions.md).

Called by: `loads.py` and `watch.py`; `main.py` opens it. Calls: nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

SWITCH_SECONDS = 0.0005
MOST_PAUSE_SECONDS = 0.5
BLOCK = 10_000  # entries of a dictionary that are freed at once


class BackgroundLoad:
    """`async with BackgroundLoad() as load`. The thread is a daemon: a load does not delay the end of the process."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()

    async def __aenter__(self) -> BackgroundLoad:
        threading.Thread(target=self.work, name="slatewise-load", daemon=True).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.tasks.put(None)

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function in the thread, after those before it."""
        future: Future[T] = Future()
        self.tasks.put((function, future))
        return await asyncio.wrap_future(future)

    async def free(self, parts: list[Any]) -> None:
        """Let go of parts of a version that nobody else holds, away from the event loop."""
        await self.run(lambda: free(parts))

    def work(self) -> None:
        while (task := self.tasks.get()) is not None:
            function, future = task
            if future.set_running_or_notify_cancel():
                before = sys.getswitchinterval()
                sys.setswitchinterval(min(before, SWITCH_SECONDS))
                try:
                    future.set_result(function())
                except BaseException as error:  # every task is settled, whatever it raises
                    future.set_exception(error)
                finally:
                    sys.setswitchinterval(before)
            del task, function, future  # an idle thread keeps nothing in memory


def with_pause(step: Callable[[], T]) -> T:
    """Run one step of a load, and leave the core to others for as long."""
    begin = time.perf_counter()
    try:
        return step()
    finally:
        time.sleep(min(time.perf_counter() - begin, MOST_PAUSE_SECONDS))


def free(parts: list[Any]) -> None:
    """Drop the parts one by one, large dictionaries in blocks, and give the memory back to the system."""
    while parts:
        part = parts.pop()
        if isinstance(part, dict) and len(part) > BLOCK:
            while part:
                part.popitem()  # the interpreter lock may pass on between two of them
        del part
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
