"""The thread of loads, and what becomes of a version that nobody gets any more."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from slatewise.bundle.loader import load_rankers
from slatewise.inference.arrays import History, HistoryState
from slatewise.main import open_pipeline, open_versions
from slatewise.ranking.background_load import BackgroundLoad, free, with_pause
from slatewise.ranking.history_cache import Entry, HistoryCache
from slatewise.ranking.trace import Trace
from slatewise.ranking.versions import Command
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from tests.ranking.support import until
from tests.support.versions import KEY, example_of, publish

if TYPE_CHECKING:
    from tests.conftest import Tiny


def test_functions_run_in_order_in_one_thread_and_errors_return() -> None:
    async def main() -> None:
        before = sys.getswitchinterval()
        async with BackgroundLoad() as load:
            seen: list[Any] = []

            def note(k: int) -> None:
                seen.append((k, threading.current_thread().name, sys.getswitchinterval() < before))

            await asyncio.gather(*(load.run(lambda k=k: note(k)) for k in range(5)))
            assert seen == [(k, "slatewise-load", True) for k in range(5)]
            with pytest.raises(ZeroDivisionError):
                await load.run(lambda: 1 // 0)
            assert await load.run(lambda: 5) == 5
        assert sys.getswitchinterval() == before

    asyncio.run(main())


def test_each_step_is_followed_by_a_pause_of_its_length() -> None:
    begin = time.perf_counter()
    assert with_pause(lambda: time.sleep(0.05) or 7) == 7
    assert 0.1 <= time.perf_counter() - begin < 5


def test_free_empties_what_it_is_given() -> None:
    class Part:
        pass

    part = Part()
    gone = weakref.ref(part)
    large = {str(k): k for k in range(50_000)}
    parts = [part, large]
    del part
    free(parts)
    assert parts == [] and large == {} and gone() is None


def test_forget_version_keeps_the_others() -> None:
    rows = np.zeros(1, np.int64)
    floats = np.zeros((1, 1, 1), np.float32)
    entry = Entry(History(rows, rows, rows), HistoryState((floats,), (floats,), floats[0]))

    async def main() -> None:
        cache = HistoryCache(10**9)
        for k in range(2500):
            cache.put(("a", 1, "x", "v", str(k)), entry)
        for other in (("a", 2, "x", "v", "0"), ("a", 1, "y", "v", "0"), ("b", 1, "x", "v", "0")):
            cache.put(other, entry)
        await cache.forget_version(("a", 1, "x"))
        assert [key[:3] for key in cache.entries] == [("a", 2, "x"), ("a", 1, "y"), ("b", 1, "x")]  # type: ignore[index]
        assert cache.nbytes == 3 * entry.nbytes

    asyncio.run(main())


def test_many_switches_leave_one_version_in_memory(tiny: Tiny, tmp_path: Path) -> None:
    """Every replaced version is gone after its last request, sessions and tables included. Memory stays flat."""
    publish(tiny.folder, tmp_path, 1)
    publish(tiny.folder, tmp_path, 2)
    settings = Settings(bundles=tmp_path, admin_key=KEY)  # type: ignore[arg-type]
    request = RankRequest.model_validate(example_of(tiny.folder))

    async def main() -> tuple[list[float], int]:
        rankers = load_rankers(tmp_path)
        seen: list[weakref.ref[Any]] = []
        resident = []
        async with open_pipeline(settings, rankers) as pipeline, open_versions(settings, pipeline) as versions:
            assert versions is not None and rankers == {}
            for k in range(12):
                await versions.execute(Command("switch", "tiny", 1 + k % 2))
                ranking = await pipeline.rank(request, Trace(time.perf_counter()))
                assert ranking.ranker.manifest.version == 1 + k % 2
                seen += [weakref.ref(ranking.ranker), weakref.ref(ranking.ranker.engines["fp32"])]
                del ranking
                resident.append(psutil.Process(os.getpid()).memory_info().rss / 2**20)
            await until(lambda: not versions.loads.leaving)
        return resident, sum(ref() is not None for ref in seen)

    gc.collect()
    resident, alive = asyncio.run(main())
    assert alive <= 2, "a replaced version is still in memory"
    assert max(resident[-4:]) - max(resident[4:8]) < 12, resident
