"""Polls the folder of the bundles (`SLATEWISE_RELOAD=poll`), and switches to new versions that are complete.

With `SLATEWISE_RELOAD_CANARY`, a new version of a served ranker is a canary first. It answers all users after
`SLATEWISE_RELOAD_CANARY_S`, unless the stop rule or a roll-back has ended it before.

A folder that was refused is tried again when it changes. Its times may mean nothing, and a file may have all of its
bytes before they are right, so a wrong digest is also looked at again after twice as long each time.

Called by: `main.py` runs it as a task. Calls: `versions.py`, `bundle/folder.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from functools import partial

from slatewise import metrics
from slatewise.bundle.folder import Seen, look_for
from slatewise.errors import Conflict, RankingError, Refused
from slatewise.ranking.versions import Command, Versions
from slatewise.version_schemas import LoadAttempt

log = logging.getLogger("slatewise")

MOST_SECONDS = 600.0  # between two looks at a wrong digest


@dataclass
class Failure:
    """A version that could not be loaded, as its folder was then."""

    seen: Seen
    wait: float  # seconds until the next try, although nothing seems to have changed
    again: float | None  # time.monotonic() of that try; `None`: never


class Watch:
    def __init__(self, versions: Versions, seconds: float, canary: float = 0.0, canary_seconds: float = 0.0) -> None:
        """canary: share of the users; 0: none. canary_seconds: until it is promoted; 0: never."""
        self.versions = versions
        self.seconds = seconds
        self.canary = canary
        self.canary_seconds = canary_seconds
        self.canaries: dict[str, tuple[int, float]] = {}  # version by ranker, and time.monotonic() of its start
        self.failures: dict[tuple[str, int], Failure] = {}

    async def run(self) -> None:
        """Poll until the task is cancelled."""
        while True:
            await asyncio.sleep(self.seconds)
            try:
                await self.poll()
            except Exception as error:  # the next poll may succeed
                log.error("polling the bundles", exc_info=error)

    async def poll(self) -> None:
        """Look once, and serve the newest version of each ranker that can be loaded."""
        await self.promote_canaries()
        versions = self.versions
        serving = {name: line.version for name, line in versions.registry.lines.items()}
        found = await versions.loads.background.run(partial(look_for, versions.loads.needs.root, serving))
        self.failures = {key: one for key, one in self.failures.items() if key[1] in found.get(key[0], {})}
        for name, seen in found.items():
            line = versions.registry.lines.get(name)
            if name in versions.unloaded or (line and (line.pinned or line.candidate)):
                continue
            for version, folder in seen.items():
                if self.is_due(name, version, folder) and await self.switch(name, version, folder):
                    break

    async def promote_canaries(self) -> None:
        """Serve the canaries of this polling whose time is over. Those that are gone are forgotten."""
        for name, (version, began) in list(self.canaries.items()):
            line = self.versions.registry.lines.get(name)
            if line is None or line.candidate is None or line.candidate.version != version:
                del self.canaries[name]
            elif self.canary_seconds and time.monotonic() - began >= self.canary_seconds and not line.pinned:
                try:
                    await self.versions.execute(Command("promote", name, version, by="poll"))
                except Conflict as error:  # a command is in progress: the next poll tries again
                    log.info("%s version %d: %s", name, version, error)

    def is_due(self, name: str, version: int, seen: Seen) -> bool:
        key = (name, version)
        if seen.manifest and self.versions.unwanted.get(key) == seen.manifest:
            return False
        failure = self.failures.get(key)
        if failure is not None and failure.seen == seen:
            return failure.again is not None and time.monotonic() >= failure.again
        if seen.missing:
            self.failures[key] = Failure(seen, 0.0, None)
            reason = f"{len(seen.missing)} files are not there yet, {seen.missing[0]} among them"
            self.versions.loads.attempts[name] = LoadAttempt(
                version=version, outcome="waiting", reason=reason, at=time.time()
            )
            metrics.series(metrics.MODEL_RELOADS, "waiting").inc()
            log.info("%s version %d: %s", name, version, reason)
            return False
        return True

    async def switch(self, name: str, version: int, seen: Seen) -> bool:
        """Return whether the version is served now, or polling should come back to it first."""
        key = (name, version)
        try:
            if self.canary and name in self.versions.registry.lines:
                await self.versions.execute(Command("canary", name, version, self.canary, by="poll"))
                self.canaries[name] = version, time.monotonic()
            else:
                await self.versions.execute(Command("switch", name, version, by="poll"))
        except Conflict as error:  # a command is in progress: the next poll tries again
            log.info("%s version %d: %s", name, version, error)
            return True
        except RankingError as error:
            before = self.failures.get(key)
            wait = self.seconds if before is None or before.seen != seen else min(2 * before.wait, MOST_SECONDS)
            again = isinstance(error, Refused) and error.again
            self.failures[key] = Failure(seen, wait, time.monotonic() + wait if again else None)
            return False
        self.failures.pop(key, None)
        return True
