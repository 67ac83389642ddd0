"""The server's threads against a semaphore and an executor: python -m loadtest.engine.scheduling

The same chunks of work run on `inference/workers.py`, and on a ThreadPoolExecutor behind a semaphore, which runs all
chunks of a job in one call, first in, first out. Both have one thread for each core, in one process and one event loop
without HTTP, in turn in each round.

    alike       4 callers with requests of shape W, histories not encoded
    mixed       2 callers with cheap requests (50 events, 20 candidates), beside 2 with 256 events and 4,096 candidates
    abandoned   cheap requests, each right after as many large ones as there are threads were cancelled

Called by: the command line, after `make reference-bundle`. Its numbers appear in docs/performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from loadtest.markdown import table
from loadtest.workload import Shape, W, Workload
from slatewise.bundle.loader import load_rankers
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import Candidates, History, KeptState
from slatewise.inference.chunks import Chunks, run_all
from slatewise.inference.workers import Workers
from slatewise.process import cpu_name, cpu_quota
from slatewise.ranking.cascade import extend, run_cascade
from slatewise.schemas import RankRequest

CHEAP = Shape(50, 20)
LARGE = Shape(256, 4_096)
HEAD_START = 0.005  # seconds that a large request has before it is cancelled
DRAWN = 20  # requests of each shape
Inputs = tuple[History, Candidates]
Run = Callable[[Chunks[Any]], Awaitable[Any]]
Row = dict[str, float]


class Server:
    """Ranks inputs by one way of running chunks of work."""

    def __init__(self, ranker: Ranker, run: Run) -> None:
        self.ranker = ranker
        self.engine = ranker.engines[ranker.default_variant]
        self.run = run

    async def rank(self, inputs: Inputs) -> None:
        history, candidates = inputs
        engine = self.engine
        state: KeptState = await self.run(extend(engine, engine.start, 0, history, False))
        exit = self.ranker.manifest.default_exit
        await self.run(run_cascade(engine, candidates, state, self.ranker.default_meta, exit, False, []))

    async def call(self, drawn: list[Inputs], end: float) -> list[float]:
        """Rank one after the other until `end`, and return the seconds that each took."""
        seconds = []
        while (begin := time.perf_counter()) < end:
            await self.rank(random.choice(drawn))
            seconds.append(time.perf_counter() - begin)
        return seconds

    async def alike(self, draws: dict[Shape, list[Inputs]], seconds: float) -> Row:
        cpu = time.process_time()
        begin = time.perf_counter()
        calls = [self.call(draws[W], begin + seconds) for _ in range(4)]
        waits = [wait for found in await asyncio.gather(*calls) for wait in found]
        rate = len(waits) / (time.perf_counter() - begin)
        cpu = (time.process_time() - cpu) / len(waits)
        return {"requests/s": rate, "CPU ms": cpu * 1e3} | quantiles(waits)

    async def mixed(self, draws: dict[Shape, list[Inputs]], seconds: float) -> Row:
        end = time.perf_counter() + seconds
        calls = [self.call(draws[shape], end) for shape in (CHEAP, CHEAP, LARGE, LARGE)]
        *cheap, one, other = await asyncio.gather(*calls)
        waits = [wait for found in cheap for wait in found]
        return {"cheap/s": len(waits) / seconds, "large/s": (len(one) + len(other)) / seconds} | quantiles(waits)

    async def abandoned(self, draws: dict[Shape, list[Inputs]], seconds: float) -> Row:
        end = time.perf_counter() + seconds
        waits = []
        while time.perf_counter() < end:
            tasks = [asyncio.ensure_future(self.rank(random.choice(draws[LARGE]))) for _ in range(cpu_quota())]
            await asyncio.sleep(HEAD_START)
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
            begin = time.perf_counter()
            await self.rank(random.choice(draws[CHEAP]))
            waits.append(time.perf_counter() - begin)
        return quantiles(waits)


def quantiles(waits: list[float]) -> Row:
    return {f"p{q} ms": float(np.quantile(waits, q / 100)) * 1e3 for q in (50, 99)}


async def measure(ranker: Ranker, draws: dict[Shape, list[Inputs]], rounds: int, seconds: float) -> list[list[Any]]:
    semaphore = asyncio.Semaphore(cpu_quota())

    async def on_workers(chunks: Chunks[Any]) -> Any:
        job = workers.submit(chunks)
        try:
            return await job
        finally:
            job.cancel()

    async def on_executor(chunks: Chunks[Any]) -> Any:
        async with semaphore:
            return await asyncio.get_running_loop().run_in_executor(executor, run_all, chunks)

    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    async with Workers(cpu_quota()) as workers:
        with ThreadPoolExecutor(cpu_quota()) as executor:
            servers = {"workers": Server(ranker, on_workers), "executor": Server(ranker, on_executor)}
            for turn in range(rounds + 1):  # the first one warms up
                for name, server in sorted(servers.items(), reverse=bool(turn % 2)):
                    for cell in (server.alike, server.mixed, server.abandoned):
                        for column, value in (await cell(draws, seconds)).items():
                            if turn:
                                found.setdefault((cell.__name__, column), {}).setdefault(name, []).append(value)
    return [
        [
            cell,
            column,
            *(f"{median(values[name]):.1f} ({min(values[name]):.1f} to {max(values[name]):.1f})" for name in servers),
        ]
        for (cell, column), values in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=Path("build/bundles"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each cell in a round (default: %(default)s)")
    args = parser.parse_args()
    ranker = next(iter(load_rankers(args.bundles).values()))
    workload = Workload(args.bundles)
    draws = {}
    for shape in (W, CHEAP, LARGE):
        requests = [RankRequest.model_validate_json(body) for body in workload.distinct(shape, DRAWN)]
        draws[shape] = [(ranker.history(r), ranker.candidates(r, r.request_time or 0.0)[0]) for r in requests]
    rows = asyncio.run(measure(ranker, draws, args.rounds, args.seconds))
    print(f"{cpu_name()}; {args.rounds} rounds, medians (least to greatest)\n")
    print(table(("cell", "", "workers", "semaphore and executor"), rows))


if __name__ == "__main__":
    main()
