"""Look-ups through a proxy that injects network faults: added latency, and when the circuit opens and closes.

Called by: `__main__.py`. Calls: `tests/support/fault_proxy.py`, `slatewise/store/lookup.py`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from loadtest.store.lookups import BUDGET, summary, timed_look_up, user_at
from slatewise.store.lookup import RedisStore
from slatewise.store.node import CLOSED
from tests.support.fault_proxy import FaultProxy, fault_proxy

FAULT_SECONDS = 2.5
FAULT_RATE = 200  # look-ups a second


class ProxyThread:
    """A fault proxy in a thread with an event loop of its own, so a busy client does not delay it."""

    def __init__(self, proxy: FaultProxy, loop: asyncio.AbstractEventLoop) -> None:
        self.proxy = proxy
        self.loop = loop

    def heal(self) -> None:
        """Remove all faults, from another thread than the proxy's."""
        self.loop.call_soon_threadsafe(self.proxy.heal)


@contextmanager
def proxy_thread(port: int) -> Iterator[ProxyThread]:
    ready = threading.Event()
    over = asyncio.Event()
    found = list[FaultProxy]()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        async with fault_proxy(port) as proxy:
            found.append(proxy)
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    ready.wait(10)
    running = ProxyThread(found[0], loop)
    try:
        yield running
    finally:
        running.heal()
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def set_delay(seconds: float) -> Callable[[FaultProxy], None]:
    return lambda proxy: setattr(proxy, "delay", seconds)


def refuse(proxy: FaultProxy) -> None:
    proxy.down = True
    proxy.reset_all()


FAULTS: dict[str, Callable[[FaultProxy], object]] = {
    "none": lambda proxy: None,
    "latency 5 ms": set_delay(0.005),
    "latency 20 ms": set_delay(0.02),
    "latency 100 ms": set_delay(0.1),
    "black hole": lambda proxy: proxy.may_speak.clear(),
    "reset mid-reply": lambda proxy: setattr(proxy, "cut", True),
    "garbage": lambda proxy: setattr(proxy, "answer", b"\x00\xffgarbage\r\n"),
    "loading": lambda proxy: setattr(proxy, "answer", b"-LOADING Redis is loading the dataset in memory\r\n"),
    "connection refused": refuse,
}


async def until_circuit(store: RedisStore, closed: bool) -> float:
    """Wait until the circuit is closed, or is not, and return the seconds it took."""
    begin = time.perf_counter()
    while (store.nodes[""].circuit == CLOSED) != closed:  # noqa: ASYNC110 - the state has no event
        await asyncio.sleep(0.001)
    return time.perf_counter() - begin


async def look_ups_at_rate(store: RedisStore, ranker: Any, users: list[str]) -> list[tuple[float, str]]:
    """FAULT_RATE look-ups a second for FAULT_SECONDS, whether or not the earlier ones have ended."""
    tasks: list[asyncio.Task[tuple[float, str]]] = []
    begin = time.perf_counter()
    while (now := time.perf_counter() - begin) < FAULT_SECONDS:
        tasks.append(asyncio.create_task(timed_look_up(store, ranker, user_at(users, len(tasks)))))
        await asyncio.sleep(max(0.0, len(tasks) / FAULT_RATE - now))
    return await asyncio.gather(*tasks)


async def measure_fault(fault: Callable[[FaultProxy], object], ranker: Any, users: list[str], port: int) -> Any:
    with proxy_thread(port) as running:
        async with RedisStore(f"redis://127.0.0.1:{running.proxy.port}/0", BUDGET, lambda: [ranker]) as store:
            await until_circuit(store, closed=True)  # on a loaded machine the first poll may time out
            fault(running.proxy)
            watcher = asyncio.create_task(until_circuit(store, closed=False))
            answers = await look_ups_at_rate(store, ranker, users)
            opened = watcher.result() if watcher.done() else None
            watcher.cancel()
            running.heal()
            closed = await until_circuit(store, closed=True)
            return {
                "ms": summary([seconds for seconds, _ in answers]),
                "statuses": Counter(status for _, status in answers),
                "opened_s": opened,
                "closed_s": closed if opened is not None else None,
                "connections": running.proxy.open,
            }


async def measure_faults(ranker: Any, users: list[str], port: int) -> dict[str, Any]:
    """By fault: latencies in ms, statuses, seconds until the circuit opened, and until it closed afterwards."""
    return {name: await measure_fault(fault, ranker, users, port) for name, fault in FAULTS.items()}
