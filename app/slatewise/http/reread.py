"""Reads files again when they change: keys and certificates are rotated without a restart.

A file that cannot be used changes nothing: what was read before stays, the log and a metric say so, and the next change
is tried again. Kubernetes replaces the files of a Secret through a symbolic link, so the file behind it is compared.

Called by: `app.py` opens it. Calls: the readers of `keys.py` and `tls.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from slatewise import metrics

log = logging.getLogger("slatewise")
LOOK_SECONDS = 1.0  # between two looks at the files


@dataclass(frozen=True)
class Watched:
    """Files that are read together. `read` runs in a thread; it raises ValueError or OSError, and then changes nothing.

    kind: label of the metric, and the name in the log. seen: the look before the first reading.
    """

    kind: str
    paths: tuple[str, ...]
    read: Callable[[], None]
    seen: tuple[object, ...]


def look(paths: Sequence[str]) -> tuple[object, ...]:
    """Return what differs when one of the files is replaced or written to."""
    found: list[object] = []
    for path in paths:
        try:
            status = os.stat(path)
            found.append((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        except OSError as error:
            found.append(error.errno)
    return tuple(found)


async def follow(watched: Watched) -> None:
    """Read the files again after each change, for ever."""
    seen = watched.seen
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        found = await asyncio.to_thread(look, watched.paths)
        if found != seen:
            seen = found
            await asyncio.to_thread(read_again, watched)


def read_again(watched: Watched) -> None:
    result = "ok"
    try:
        watched.read()
        log.info("%s: read again", watched.kind)
    except (OSError, ValueError) as error:
        result = "failed"
        log.error("%s: the new files are not used, the old ones stay in use: %s", watched.kind, error)
    metrics.FILES_READ.labels(watched.kind, result).inc()
    metrics.FILES_STALE.labels(watched.kind).set(result == "failed")


@contextlib.asynccontextmanager
async def following(files: Sequence[Watched]) -> AsyncIterator[None]:
    """Follow the changes of all files while the context is open."""
    for watched in files:
        metrics.FILES_STALE.labels(watched.kind).set(0)
    tasks = [asyncio.create_task(follow(watched)) for watched in files]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
