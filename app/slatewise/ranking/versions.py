"""Loads, switches, rolls back and frees versions while others are served. One command at a time.

    load      a version beside the served one, as candidate: checked, warm, and asked by nobody
    canary    the candidate answers a share of the users, until it is promoted or stopped
    shadow    both versions rank a share of the requests
    switch    a version becomes the served one; the candidate does so without a load
    roll-back the candidate goes, or else the version that was served before comes back
    pin       as switch, and polling leaves the ranker alone
    unload    the candidate goes, or the ranker

Called by: `http/admin.py`, `watch.py`, `http/rank.py` with each answer; `main.py` builds it. Calls: `registry.py`,
`loads.py`, `rollout.py`, `shadow.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

from slatewise import metrics
from slatewise.bundle.folder import look
from slatewise.bundle.manifest import versions
from slatewise.bundle.ranker import Ranker
from slatewise.errors import Conflict, Invalid, NotFound
from slatewise.ranking.background_load import BackgroundLoad
from slatewise.ranking.loads import Loads, Needs
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.ranking.registry import Line
from slatewise.ranking.rollout import Answered, Candidate, StopRule
from slatewise.ranking.shadow import Agreement, Shadow, observe
from slatewise.ranking.trace import Trace
from slatewise.schemas import RankRequest
from slatewise.version_schemas import CandidateState, StopBounds, VersionState

log = logging.getLogger("slatewise")

Action = Literal["load", "unload", "switch", "roll-back", "pin", "unpin", "promote", "canary", "shadow"]
MOST_CANARY = 0.5  # above it, the stop rule would lack answers of the served version to compare with


@dataclass(frozen=True)
class Command:
    action: Action
    ranker: str
    version: int | None = None
    share: float = 0.0
    bounds: StopBounds | None = None
    by: str = "admin"

    def __str__(self) -> str:
        return f"{self.action} {self.ranker}" + ("" if self.version is None else f" version {self.version}")


class Versions:
    """Changes the versions in a pipeline's registry. Lives on the event loop."""

    def __init__(self, pipeline: Pipeline, background: BackgroundLoad, needs: Needs) -> None:
        self.registry = pipeline.registry
        self.loads = Loads(background, needs, self.registry, pipeline.cache)
        self.shadow = Shadow(pipeline, self.on_agreement)
        self.running: Command | None = None
        self.task: asyncio.Task[None] | None = None
        self.stopped: dict[str, str] = {}
        self.unwanted: dict[tuple[str, int], str] = {}  # left by roll-back or rule -> SHA-256 of its manifest
        self.unloaded: set[str] = set()  # names that polling leaves alone
        for name in self.registry.lines:
            metrics.show_versions(name)

    async def close(self) -> None:
        await self.shadow.stop()
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    # Commands

    async def execute(self, command: Command) -> None:
        """Carry out a command; equal commands at the same time are one. A client that leaves does not end it.

        Raises Conflict while another command is in progress, NotFound, Invalid, or Refused with the reason.
        """
        if self.running is None:
            self.running = command
            self.task = asyncio.create_task(self.perform(command))
            self.task.add_done_callback(self.ended)
        elif self.running != command:
            raise Conflict(f"in progress: {self.running}; repeat the command afterwards")
        assert self.task is not None
        await asyncio.shield(self.task)

    def ended(self, task: asyncio.Task[None]) -> None:
        self.running = self.task = None
        if not task.cancelled():
            task.exception()  # mark as retrieved: the client may be gone

    async def perform(self, command: Command) -> None:
        name, version = command.ranker, command.version
        log.info("%s (%s)", command, command.by)
        if command.action == "load":
            await self.load(name, self.needed(version))
        elif command.action in ("switch", "pin"):
            await self.switch(name, self.needed(version))
            self.registry.lines[name].pinned |= command.action == "pin"
        elif command.action == "unpin":
            self.registry.line(name).pinned = False
        elif command.action == "promote":
            line = self.registry.line(name)
            if line.version != version:  # else it was promoted before
                await self.switch(name, self.candidate(line, version).version)
        elif command.action == "unload":
            self.unload(name, version)
        elif command.action == "roll-back":
            await self.roll_back(name, version)
        else:
            await self.roll_out(command)

    def needed(self, version: int | None) -> int:
        if version is None:
            raise Invalid.at("/version", "is missing")
        return version

    def candidate(self, line: Line, version: int | None) -> Candidate:
        """Raises Conflict."""
        if line.candidate is None or version not in (None, line.candidate.version):
            raise Conflict("no such candidate is loaded" if line.candidate is None else other_candidate(line.candidate))
        return line.candidate

    async def load(self, name: str, version: int) -> Candidate | None:
        """Load a version beside the served one. Return `None` if it is served already."""
        line = self.registry.line(name)
        if line.version == version:
            return None
        if line.candidate is not None:
            return self.candidate(line, version)
        ranker = await self.loads.load(name, version, line.serving)
        candidate = self.registry.add_candidate(name, ranker)
        await self.loads.needs.read_pointers()
        return candidate

    async def switch(self, name: str, version: int) -> None:
        """Serve a version, which is loaded first unless it is the candidate."""
        if name not in self.registry.lines:
            self.registry.add(await self.loads.load(name, version, None))
            metrics.show_versions(name)
            await self.loads.needs.read_pointers()
        elif await self.load(name, version) is not None:
            old = self.registry.promote(name)
            log.info("serving %s version %d instead of %d", name, version, old.manifest.version)
            self.loads.retire(old)
        self.unwanted.pop((name, version), None)
        self.unloaded.discard(name)
        metrics.CANARY_SHARE.labels(name).set(0)

    def unload(self, name: str, version: int | None) -> None:
        """Drop the candidate, or with the number of the served version the ranker."""
        line = self.registry.lines.get(name)
        if line is None:
            if name in self.unloaded:
                return
            raise NotFound("no such ranker")
        if line.candidate is not None and version in (None, line.candidate.version):
            self.drop_candidate(name)
        elif version == line.version:
            if len(self.registry.lines) == 1:
                raise Conflict("the only ranker is not unloaded: stop the server")
            if line.candidate is not None:
                raise Conflict(other_candidate(line.candidate))
            self.unloaded.add(name)
            self.loads.retire(self.registry.remove(name))

    async def roll_back(self, name: str, version: int | None) -> None:
        """Leave the candidate, or else the served version. With `version`, only if it is the one to leave."""
        line = self.registry.line(name)
        if line.candidate is not None and version in (None, line.candidate.version):
            await self.leave(name, line.candidate.version)
            self.drop_candidate(name)
            return
        if version not in (None, line.version):
            return  # it was left before
        older = [v for v in versions(self.loads.needs.root / name) if v < line.version]
        target = line.previous if line.previous is not None else max(older, default=None)
        if target is None:
            raise Conflict(f"version {line.version} has no version before it")
        left = line.version
        await self.leave(name, left)
        await self.switch(name, target)
        line.previous = None

    async def leave(self, name: str, version: int) -> None:
        """Keep polling from loading a version again before its manifest changes."""
        seen = await self.loads.background.run(partial(look, self.loads.needs.root / name / str(version)))
        self.unwanted[name, version] = seen.manifest

    async def roll_out(self, command: Command) -> None:
        """Give the candidate a share of the users (canary) or of the requests (shadow)."""
        name = command.ranker
        line = self.registry.line(name)
        if command.action == "canary" and command.share > MOST_CANARY:
            raise Invalid.at("/share", f"at most {MOST_CANARY:g}: the stop rule compares with the others; then promote")
        if command.version is None or line.candidate is not None:
            candidate = self.candidate(line, command.version)
        else:
            loaded = await self.load(name, command.version)
            if loaded is None:
                raise Conflict(f"version {command.version} is served to all")
            candidate = loaded
        if command.action == "shadow":
            candidate.shadow = command.share
            return
        if command.bounds is not None and command.bounds != candidate.rule.bounds:
            candidate.rule = StopRule(command.bounds)
        candidate.canary = command.share
        self.stopped.pop(name, None)
        metrics.CANARY_SHARE.labels(name).set(command.share)

    # Answers

    def drop_candidate(self, name: str) -> None:
        self.loads.retire(self.registry.drop_candidate(name))
        metrics.CANARY_SHARE.labels(name).set(0)

    def answered(self, request: RankRequest | None, ranking: Ranking | None, trace: Trace, code: int) -> None:
        """Take note of an answer, for the stop rule and the shadow. Called at the end of each request."""
        ranker = trace.ranker
        line = None if ranker is None else self.registry.lines.get(ranker.name)
        if ranker is None or line is None or (candidate := line.candidate) is None:
            return
        by_candidate = ranker is candidate.ranker
        if candidate.canary:
            seconds = time.perf_counter() - trace.timings.entered
            degraded = ranking is not None and bool(ranking.degraded)
            answer = Answered.of(code, degraded, trace.history.cache, seconds)
            if answer is not None:
                kind = candidate.rule.candidate_answer(answer) if by_candidate else None
                if ranker is line.serving:
                    candidate.rule.served_answer(answer)
                if kind is not None:
                    self.stop(line, kind)
                    return
        other = line.other(ranker)
        if other is None or request is None or ranking is None or not candidate.shadows(request.id or ""):
            return
        self.shadow.offer(request, ranking, trace, other)

    def on_agreement(self, shown: Ranker, other: Ranker, agreement: Agreement) -> None:
        line = self.registry.lines.get(shown.name)
        candidate = None if line is None else line.candidate
        if line is None or candidate is None or not (candidate.ranker is shown or candidate.ranker is other):
            return  # it is gone meanwhile
        observed = observe(agreement, candidate.ranker is shown, shown.name)
        if candidate.canary and (kind := candidate.rule.agreement(observed.overlap)):
            self.stop(line, kind)

    def stop(self, line: Line, kind: str) -> None:
        """Stop a canary: its users go back to the served version, and polling does not load it again."""
        candidate = line.candidate
        assert candidate is not None
        name = line.serving.name
        reason = f"version {candidate.version}: {candidate.rule.reason(kind)}"
        log.error("canary of %s stopped: %s", name, reason)
        self.stopped[name] = reason
        self.unwanted[name, candidate.version] = candidate.ranker.digest
        metrics.series(metrics.CANARY_STOPS, name, kind).inc()
        self.drop_candidate(name)

    def states(self) -> list[VersionState]:
        """Return the states of all rankers that are served, or of which a version was tried."""
        return [self.state(name) for name in dict.fromkeys([*self.registry.lines, *self.loads.attempts])]

    def state(self, name: str) -> VersionState:
        """Raises NotFound."""
        line = self.registry.lines.get(name)
        if line is None and name not in self.loads.attempts:
            raise NotFound("no such ranker")
        candidate = None if line is None else line.candidate
        return VersionState(
            ranker=name,
            version=None if line is None else line.version,
            previous=None if line is None else line.previous,
            pinned=line is not None and line.pinned,
            candidate=None if candidate is None else shown(candidate),
            stopped=self.stopped.get(name),
            last_load=self.loads.attempts.get(name),
            in_use=[key[1] for key in self.loads.leaving if key[0] == name],
        )


def shown(candidate: Candidate) -> CandidateState:
    rule = candidate.rule
    return CandidateState(
        version=candidate.version,
        canary=candidate.canary,
        shadow=candidate.shadow,
        bounds=rule.bounds,
        answers=rule.answers,
    )


def other_candidate(candidate: Candidate) -> str:
    return f"version {candidate.version} is loaded as candidate: promote it, roll it back or unload it first"
