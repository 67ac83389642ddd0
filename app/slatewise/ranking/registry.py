"""The rankers that are served, by name: for each one the served version, and at most one candidate beside it.

All methods run on the event loop. A request asks once (`choose`), and all that it computes comes from the version that
it got, so no answer mixes two versions, and a switch is one assignment.

Called by: `main.py`, which builds it, `versions.py`, which changes it, `pipeline.py`, `http/models.py`,
`http/health.py`, and the store through `loaded`. Calls: `rollout.py`, `metrics.py` for the series of each ranker.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slatewise import metrics
from slatewise.bundle.ranker import Ranker
from slatewise.errors import Invalid, NotFound
from slatewise.ranking.rollout import Candidate


@dataclass(eq=False)
class Line:
    """The versions of one ranker."""

    serving: Ranker
    candidate: Candidate | None = None
    previous: int | None = None  # the version served before
    pinned: bool = False

    @property
    def version(self) -> int:
        return self.serving.manifest.version

    def other(self, ranker: Ranker) -> Ranker | None:
        """Return the other loaded version, which a shadow asks. `None` if there is none, or `ranker` was replaced."""
        if self.candidate is None:
            return None
        if ranker is self.serving:
            return self.candidate.ranker
        return self.serving if ranker is self.candidate.ranker else None


class Registry:
    """Holds the versions of each ranker."""

    def __init__(self, rankers: Iterable[Ranker]) -> None:
        self.lines = {ranker.name: Line(ranker) for ranker in rankers}
        for line in self.lines.values():
            show(line.serving)

    def serving(self) -> tuple[Ranker, ...]:
        """Return the served version of each ranker."""
        return tuple(line.serving for line in self.lines.values())

    def loaded(self) -> tuple[Ranker, ...]:
        """Return all versions that may answer, the served ones first."""
        candidates = (line.candidate.ranker for line in self.lines.values() if line.candidate is not None)
        return (*self.serving(), *candidates)

    def resolve(self, name: str | None) -> Ranker:
        """Return the served version of `name`. With `None`, that of the only ranker; Invalid if there is not one.

        Raises NotFound.
        """
        return self.line(name).serving

    def line(self, name: str | None) -> Line:
        """As `resolve`, with the candidate."""
        if name is None:
            if len(self.lines) != 1:
                raise Invalid.at("/ranker", f"must be one of {', '.join(self.lines)}")
            return next(iter(self.lines.values()))
        if name not in self.lines:
            raise NotFound(f"no such ranker; served: {', '.join(self.lines)}")
        return self.lines[name]

    def choose(self, name: str | None, user: str | None, request_id: str | None) -> Ranker:
        """Return the version that answers a request: always the same one for a user. Raises as `resolve`."""
        line = self.line(name)
        candidate = line.candidate
        if candidate is None or not candidate.canary:
            return line.serving
        key = user if user is not None else request_id
        return candidate.ranker if key is not None and candidate.answers(key) else line.serving

    def add_candidate(self, name: str, ranker: Ranker) -> Candidate:
        candidate = self.lines[name].candidate = Candidate(ranker)
        show(ranker)
        return candidate

    def drop_candidate(self, name: str) -> Ranker:
        """Return the version that no new request gets any more."""
        line = self.lines[name]
        assert line.candidate is not None
        ranker, line.candidate = line.candidate.ranker, None
        hide(ranker)
        return ranker

    def add(self, ranker: Ranker) -> None:
        """Serve a ranker of a new name."""
        self.lines[ranker.name] = Line(ranker)
        show(ranker)

    def remove(self, name: str) -> Ranker:
        """Serve a name no more. Return the version that no new request gets."""
        ranker = self.lines.pop(name).serving
        hide(ranker)
        return ranker

    def promote(self, name: str) -> Ranker:
        """Serve the candidate. Return the version that no new request gets any more."""
        line = self.lines[name]
        assert line.candidate is not None
        old = line.serving
        line.serving, line.candidate, line.previous = line.candidate.ranker, None, line.version
        hide(old)
        show(line.serving)  # a version may share its number with the one that it replaces
        return old


def show(ranker: Ranker) -> None:
    """Create the series of a version that may answer."""
    for variant in ranker.engines:
        metrics.MODEL_INFO.labels(ranker.name, str(ranker.manifest.version), variant).set(1)
    metrics.UNKNOWN_ACTIONS.labels(ranker.name)
    for field in ranker.manifest.fields:
        metrics.UNKNOWN_VALUES.labels(ranker.name, field)


def hide(ranker: Ranker) -> None:
    """Remove the series that say that a version is served. What it answered stays counted."""
    for variant in ranker.engines:
        metrics.MODEL_INFO.remove(ranker.name, str(ranker.manifest.version), variant)
