"""The threads that load versions and free them while others are served.

One thread has the lowest priority of the operating system and does one thing at a time. While it works, Python passes
the interpreter lock on ten times as often as usual, so the event loop waits half a millisecond for it instead of five.
A second thread, of normal priority, opens the sessions with several threads: ONNX Runtime's threads inherit the
priority of the one that starts them, and a process without privileges cannot raise it again.

Called by: `versions.py`; `main.py` opens it. Calls: nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

LOWEST = 19  # nice value of setpriority(2)
SWITCH_SECONDS = 0.0005
BLOCK = 10_000  # entries of a dictionary that are freed at once


class Thread:
    """A thread that runs functions in order. It is a daemon: a load does not delay the end of the process."""

    def __init__(self, name: str, prepare: Callable[[], None]) -> None:
        self.tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self.prepare = prepare
        self.thread = threading.Thread(target=self.work, name=name, daemon=True)
        self.thread.start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self.tasks.put((function, future))
        return future

    def work(self) -> None:
        self.prepare()
        while (task := self.tasks.get()) is not None:
            function, future = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # every task is settled, whatever it raises
                    future.set_exception(error)
            del task, function, future  # an idle thread keeps nothing in memory


class BackgroundLoad:
    """`async with BackgroundLoad() as load`."""

    async def __aenter__(self) -> BackgroundLoad:
        self.low = Thread("slatewise-load", lower_priority)
        self.normal = Thread("slatewise-sessions", lambda: None)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.low.tasks.put(None)
        self.normal.tasks.put(None)

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function in the thread of the lowest priority, after those before it."""
        return await asyncio.wrap_future(self.low.submit(lambda: while_polite(function)))

    def aside(self, function: Callable[[], T]) -> T:
        """Run a function in the thread of normal priority, and wait. Called in the other thread."""
        return self.normal.submit(function).result()

    async def free(self, parts: list[Any]) -> None:
        """Let go of parts of a version that nobody else holds, away from the event loop."""
        await self.run(lambda: free(parts))


def lower_priority() -> None:
    if sys.platform == "linux":  # elsewhere the priority belongs to the process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)


def while_polite(function: Callable[[], T]) -> T:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        return function()
    finally:
        sys.setswitchinterval(before)


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
