"""The store of meta-embeddings, measured against a real Redis: python -m loadtest.store [--users 200000]

    serve     generations are pushed, switched and rolled back while the demo answers requests, open loop through HTTP
    memory    bytes a user takes in Redis, by dtype and by how many generations are live
    look-ups  p50 and p99 of one at a time and of 64 at once, without the cache
    faults    look-ups through the tests' proxy: what each fault adds, and when the circuit opens and closes

Prints tables in Markdown, then a line of JSON. Client, server and Redis share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import redis
import uvloop

from loadtest.client import ask, post
from loadtest.client import connect as connect_http
from loadtest.server import Server
from slatewise.bundle.manifest import read_manifest
from slatewise.process import cpu_name
from slatewise.store.client import connect
from slatewise.store.codec import DTYPES
from slatewise.store.generations import Generations
from slatewise.store.lookup import RedisStore
from slatewise.store.node import CLOSED
from slatewise.store.push import push
from tests.conftest import run_redis
from tests.support.fault_proxy import FaultProxy, fault_proxy

RATE = 50
CONNECTIONS = 16  # requests a second
ASKED_USERS = 500
BUDGET = 0.01  # seconds: the default of REDIS_TIMEOUT_MS
LOOK_UPS = 4_000
FAULT_SECONDS = 2.5
FAULT_RATE = 200


class Asking:
    """Requests that fall due at a fixed rate, whatever the server does, until it is left."""

    def __init__(self, port: int, example: dict[str, Any]) -> None:
        self.port = port
        self.example = example
        self.stop = threading.Event()
        self.answers: list[tuple[float, float, int, dict[str, Any]]] = []  # due, ended (monotonic), status, answer
        self.failures: list[str] = []
        self.next = 0
        self.lock = threading.Lock()
        self.begin = time.monotonic()

    def work(self) -> None:
        connection = connect_http(self.port)
        while not self.stop.is_set():
            with self.lock:
                turn = self.next
                self.next = self.next + 1
            due = self.begin + turn / RATE
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                status, body = ask(
                    connection,
                    post(
                        "/rerank",
                        json.dumps(self.example | {"user": f"u{turn * 37 % ASKED_USERS}", "id": f"{turn}"}).encode(),
                    ),
                )
                self.answers.append((due, time.monotonic(), status, json.loads(body)))
            except Exception as error:
                self.failures.append(repr(error))
                connection = connect_http(self.port)
        connection.close()

    def __enter__(self) -> Asking:
        self.threads = [threading.Thread(target=self.work) for _ in range(CONNECTIONS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def last_served(self, version: str, since: float, until: float) -> float:
        """Seconds after `since` until the end of the last answer with that version, before `until`."""
        return max(
            (
                ended - since
                for _, ended, _, answer in self.answers
                if since < ended < until and answer["meta_embedding"]["version"] == version
            ),
            default=0.0,
        )


def summary(seconds: list[float]) -> tuple[float, float, float]:
    """(p50, p99, longest) in milliseconds."""
    return tuple(float(x) * 1e3 for x in (*np.quantile(seconds, (0.5, 0.99)), max(seconds)))  # type: ignore[return-value]


def drawn(users: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.3, size=(users, dim)).astype(np.float32)


def serve(bundles: Path, ranker: str, space: str, dim: int, users: list[str], port: int) -> dict[str, Any]:
    """Push, switch and roll back under requests. Each generation's vectors differ, so a user's scores name the vector that was used."""
    client = connect(f"redis://127.0.0.1:{port}/0")
    store = Generations(client, ranker, space)
    result: dict[str, Any] = {"rate": RATE}
    first = push(store, users, drawn(len(users), dim, 1))
    with Server({"BUNDLES": str(bundles), "REDIS_URL": f"redis://127.0.0.1:{port}/0", "DRAIN_SECONDS": "0"}) as server:
        example = server.get(f"/models/{ranker}")[1]["example"]
        with Asking(server.port, example) as asking:
            time.sleep(3)
            second = push(store, users, drawn(len(users), dim, 2))
            switched = time.monotonic()
            time.sleep(4)
            store.roll_back()
            rolled_back = time.monotonic()
            time.sleep(4)
            third = push(store, users, drawn(len(users), dim, 3))
            switched_again = time.monotonic()
            time.sleep(4)
    old, new, newest = (str(each["generation"]) for each in (first, second, third))
    result["pushed_alone"] = first
    result["pushed_while_served"] = [second, third]
    result["requests"] = len(asking.answers)
    result["failed"] = len(asking.failures) + sum(status != 200 for _, _, status, _ in asking.answers)
    result["old_served_s"] = [
        asking.last_served(old, switched, rolled_back),
        asking.last_served(old, switched_again, float("inf")),
    ]
    result["rolled_back_served_s"] = asking.last_served(new, rolled_back, switched_again)
    result["versions"] = Counter(answer["meta_embedding"]["version"] for *_, answer in asking.answers)
    result["statuses"] = Counter(answer["meta_embedding"]["status"] for *_, answer in asking.answers)
    scores: dict[Any, set[Any]] = defaultdict(set)
    for *_, answer in asking.answers:
        user = int(answer["id"]) * 37 % ASKED_USERS
        scores[user, answer["meta_embedding"]["version"], answer["exit"]].add(
            tuple(np.round(answer["results"]["scores"], 5))
        )
    by_user: dict[Any, set[Any]] = defaultdict(set)
    for (user, _, how), each in scores.items():
        by_user[user, how] |= each
    versions = Counter((user, how) for user, _, how in scores)
    result["mixed"] = sum(len(each) > 1 for each in scores.values()) + sum(
        len(by_user[key]) != versions[key] for key in versions
    )
    result["latency_ms"] = summary([ended - due for due, ended, *_ in asking.answers])
    assert newest in result["versions"]
    client.close()
    return result


def memory(ranker: str, space: str, dim: int, users: list[str], port: int) -> dict[str, Any]:
    client = redis.Redis(port=port)
    store = Generations(client, ranker, space)
    result = {}
    for name in (*DTYPES, "float32, compact"):
        dtype = name.partition(",")[0]
        client.flushall()
        client.config_set("hash-max-ziplist-value", 256 if "compact" in name else 64)  # 64 is Redis' default
        before = client.info("memory")["used_memory"]
        row = {}
        for live in (1, 2, 3):
            pushed = push(store, users, drawn(len(users), dim, live), dtype)
            row[f"live_{live}"] = (client.info("memory")["used_memory"] - before) / len(users)
            row[f"users_per_second_{live}"] = pushed["users_per_second"]
        result[name] = {
            "vector": dim * {"float32": 4, "float16": 2, "int8": 1}[dtype],
            "value": pushed["bytes"] / len(users),
        } | row
    client.close()
    return result


def stand_in(ranker: str, space: str, dim: int) -> Any:
    """What a store asks of a ranker."""
    return SimpleNamespace(
        name=ranker, manifest=SimpleNamespace(space=space, meta_size=dim), default_meta=np.zeros(dim, np.float32)
    )


async def timed(store: RedisStore, ranker: Any, user: str) -> tuple[float, str]:
    begin = time.perf_counter()
    found = await store.look_up(ranker, user)
    return time.perf_counter() - begin, found.status


async def look_ups(ranker: Any, users: list[str], port: int) -> dict[str, Any]:
    result = {}
    async with RedisStore(f"redis://127.0.0.1:{port}/0", BUDGET, lambda: [ranker]) as store:
        for at_once in (1, 64):
            answers = []
            for first in range(0, LOOK_UPS, at_once):
                answers += await asyncio.gather(
                    *(timed(store, ranker, users[(first + k) * 7919 % len(users)]) for k in range(at_once))
                )
            result[at_once] = {
                "ms": summary([seconds for seconds, _ in answers]),
                "statuses": Counter(status for _, status in answers),
            }
    return result


@contextmanager
def proxy_of_its_own(port: int) -> Iterator[FaultProxy]:
    """In a thread with a loop of its own, so that it does not wait for whom it serves."""
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
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(found[0].heal)
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def set_delay(seconds: float) -> Callable[[FaultProxy], None]:
    return lambda proxy: setattr(proxy, "delay", seconds)


def gone(proxy: FaultProxy) -> None:
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
    "connection refused": gone,
}


async def faults(ranker: Any, users: list[str], port: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, fault in FAULTS.items():
        with proxy_of_its_own(port) as proxy:
            async with RedisStore(f"redis://127.0.0.1:{proxy.port}/0", BUDGET, lambda: [ranker]) as store:
                tasks: list[asyncio.Task[tuple[float, str]]] = []
                opened = None

                async def watch(store: RedisStore, begin: float) -> float:
                    while store.nodes[""].circuit == CLOSED:  # noqa: ASYNC110 - a watch
                        await asyncio.sleep(0.001)
                    return time.perf_counter() - begin

                while store.nodes[""].circuit != CLOSED:  # noqa: ASYNC110 - a loaded machine may miss the first poll
                    await asyncio.sleep(0.05)
                begin = time.perf_counter()
                fault(proxy)
                watcher = asyncio.create_task(watch(store, begin))
                while (now := time.perf_counter() - begin) < FAULT_SECONDS:
                    tasks.append(asyncio.create_task(timed(store, ranker, users[len(tasks) * 7919 % len(users)])))
                    await asyncio.sleep(max(0.0, len(tasks) / FAULT_RATE - now))
                answers = await asyncio.gather(*tasks)
                opened = watcher.result() if watcher.done() else None
                watcher.cancel()
                healed = time.perf_counter()
                proxy_loop_heal(proxy)
                while store.nodes[""].circuit != CLOSED:  # noqa: ASYNC110 - a watch
                    await asyncio.sleep(0.005)
                closed = time.perf_counter() - healed
                result[name] = {
                    "ms": summary([seconds for seconds, _ in answers]),
                    "statuses": Counter(status for _, status in answers),
                    "opened_s": opened,
                    "closed_s": closed if opened is not None else None,
                    "connections": proxy.open,
                }
    return result


def proxy_loop_heal(proxy: FaultProxy) -> None:
    """From another thread than the proxy's."""
    for task in list(proxy.tasks) or ():
        task.get_loop().call_soon_threadsafe(proxy.heal)
        return
    proxy.heal()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundles", type=Path, default=Path("models/bundles"))
    parser.add_argument("--ranker", default="movielens")
    parser.add_argument("--users", type=int, default=200_000)
    args = parser.parse_args()
    folder = max((args.bundles / args.ranker).glob("[0-9]*"), key=lambda path: int(path.name))
    manifest = read_manifest(folder)
    users = [f"u{k}" for k in range(args.users)]
    ranker = stand_in(manifest.ranker, manifest.space, manifest.meta_size)
    result: dict[str, Any] = {"machine": cpu_name(), "users": args.users, "dim": manifest.meta_size}
    with tempfile.TemporaryDirectory() as home, run_redis(Path(home)) as port:
        result["serve"] = serve(args.bundles, manifest.ranker, manifest.space, manifest.meta_size, users, port)
        result["look_ups"] = uvloop.run(look_ups(ranker, users, port))
        result["faults"] = uvloop.run(faults(ranker, users, port))
        result["memory"] = memory(manifest.ranker, manifest.space, manifest.meta_size, users, port)
    print_tables(result)
    print(json.dumps(result))


def print_tables(result: dict[str, Any]) -> None:
    served = result["serve"]
    users = result["users"]
    print(f"{result['machine']}; {users:,} users, {result['dim']} dimensions\n")
    print(f"| {served['rate']} requests a second, pushed, switched, rolled back, pushed | |\n| --- | --- |")
    print(f"| requests, failed | {served['requests']:,}, {served['failed']} |")
    print(f"| answers whose version was not their vector's | {served['mixed']} |")
    print(
        f"| old generation still served after a switch, s | {', '.join(f'{s:.2f}' for s in served['old_served_s'])} |"
    )
    print(f"| rolled-back generation still served, s | {served['rolled_back_served_s']:.2f} |")
    pushes = [served["pushed_alone"], *served["pushed_while_served"]]
    print(
        f"| a push alone, and two while serving, s | {', '.join(str(round(each['seconds'], 1)) for each in pushes)} |"
    )
    print(f"| request p50, p99, longest, ms | {', '.join(f'{ms:.1f}' for ms in served['latency_ms'])} |")
    print(f"| statuses | {dict(served['statuses'])} |")
    print("\nCompact: hash-max-ziplist-value (or -listpack-value) 256 instead of Redis' 64.\n")
    print("| bytes a user | vector | value | in Redis, 1 generation | 2 | 3 |\n| --- | --- | --- | --- | --- | --- |")
    for dtype, row in result["memory"].items():
        print(
            f"| {dtype} | {row['vector']} | {row['value']:.0f} | {row['live_1']:.0f} | {row['live_2']:.0f} | {row['live_3']:.0f} |"
        )
    print("\n| look-ups at once | p50 ms | p99 ms | longest ms | |\n| --- | --- | --- | --- | --- |")
    for at_once, row in result["look_ups"].items():
        print(f"| {at_once} | {' | '.join(f'{ms:.2f}' for ms in row['ms'])} | {dict(row['statuses'])} |")
    print(f"\n{FAULT_RATE} look-ups a second for {FAULT_SECONDS} s, budget {BUDGET * 1e3:g} ms\n")
    print("| fault | p50 ms | p99 ms | added p99 ms | circuit opened s | closed s | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    plain = result["faults"]["none"]["ms"][1]
    for name, row in result["faults"].items():
        times = " | ".join("" if row[key] is None else f"{row[key]:.2f}" for key in ("opened_s", "closed_s"))
        print(
            f"| {name} | {row['ms'][0]:.2f} | {row['ms'][1]:.2f} | {row['ms'][1] - plain:.2f} | {times} | {dict(row['statuses'])} |"
        )


if __name__ == "__main__":
    main()
