"""A candidate version beside the served one: who gets it (canary), and when it is stopped.

A share of the users gets the candidate: those whose hash is below the share. So a user always gets the same version,
from every replica, and a larger share keeps the users of a smaller one. Requests without a user go by their id.

The stop rule compares each answer of the candidate with the latest answer of the served version that was not compared
yet, so that a fault of both, for example of Redis, stops nothing:

    failed      share of failed answers, above that of the served version
    degraded    share of degraded answers, above that of the served version
    latency     share of answers that took more than `latency_ratio` times as long, above 1/2: half of them do so if the
                candidate is slower by exactly this ratio. Answers with equal use of the history cache are compared.
    agreement   1 - overlap of the first ten results with those of the other version, by the shadow

Each is a test of its own (`sequential.py`), with a probability of a false alarm of at most `false_alarm` for ever.

Called by: `registry.py`, `versions.py`. Calls: `sequential.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from slatewise.bundle.ranker import Ranker
from slatewise.ranking.sequential import Evidence
from slatewise.schemas import CacheResult
from slatewise.version_schemas import StopBounds

IGNORED = (429, 499, 503)  # overload, the client's end, and shutdown say nothing about a version


def place_of(salt: str, key: str) -> float:
    """Return the place of a user or a request in [0, 1): uniform over keys, and another one for each salt."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, salt=hashlib.blake2b(salt.encode(), digest_size=16).digest())
    return int.from_bytes(digest.digest(), "big") / 2**64


@dataclass(frozen=True)
class Answered:
    """One answer, as the stop rule sees it. `seconds` is `None` unless the whole ranking was computed."""

    failed: bool
    degraded: bool
    cache: CacheResult
    seconds: float | None

    @classmethod
    def of(cls, code: int, degraded: bool, cache: CacheResult, seconds: float) -> Answered | None:
        """Return `None` for a status that says nothing about the version."""
        if code in IGNORED:
            return None
        return cls(code != 200, degraded, cache, seconds if code == 200 and not degraded else None)


class StopRule:
    """The evidence against one candidate."""

    def __init__(self, bounds: StopBounds) -> None:
        self.bounds = bounds
        self.failed = Evidence(bounds.failed, bounds.false_alarm, -1)
        self.degraded = Evidence(bounds.degraded, bounds.false_alarm, -1)
        self.slow = Evidence(0.5, bounds.false_alarm, 0)
        self.disagreement = Evidence(1 - bounds.overlap, bounds.false_alarm, 0)
        self.served: Answered | None = None  # the latest answer of the served version that was not compared
        self.served_seconds: dict[CacheResult, float] = {}  # the same for durations
        self.answers = 0  # of the candidate

    def served_answer(self, answer: Answered) -> None:
        self.served = answer
        if answer.seconds is not None:
            self.served_seconds[answer.cache] = answer.seconds

    def candidate_answer(self, answer: Answered) -> str | None:
        """Return why the candidate must be stopped, or `None`."""
        self.answers += 1
        served, self.served = self.served, None
        if served is not None:
            if self.failed.add(answer.failed - served.failed):
                return "failed"
            if self.degraded.add(answer.degraded - served.degraded):
                return "degraded"
        before = None if answer.seconds is None else self.served_seconds.pop(answer.cache, None)
        if answer.seconds is not None and before is not None:
            slow = answer.seconds > self.bounds.latency_ratio * before
            return "latency" if self.slow.add(float(slow)) else None
        return None

    def agreement(self, overlap: float) -> str | None:
        """Add the overlap of the first ten results. Return why the candidate must be stopped, or `None`."""
        return "agreement" if self.disagreement.add(1 - overlap) else None

    def reason(self, kind: str) -> str:
        """Describe an alarm for people."""
        bounds = self.bounds
        limits = {
            "failed": f"more failed answers than the served version, by more than {bounds.failed:g}",
            "degraded": f"more degraded answers than the served version, by more than {bounds.degraded:g}",
            "latency": f"answers take more than {bounds.latency_ratio:g} times as long",
            "agreement": f"mean overlap of the first ten results with the served version below {bounds.overlap:g}",
        }
        return f"{limits[kind]}; stopped after {self.answers} answers, false-alarm rate {bounds.false_alarm:g}"


@dataclass(eq=False)
class Candidate:
    """A version that is loaded beside the served one of its ranker, and the shares of the requests that it gets."""

    ranker: Ranker
    canary: float = 0.0  # share of the users whose requests it answers
    shadow: float = 0.0  # share of the requests that the other version ranks too, after the answer
    rule: StopRule = field(default_factory=lambda: StopRule(StopBounds()))

    @property
    def version(self) -> int:
        return self.ranker.manifest.version

    def answers(self, key: str) -> bool:
        """Return whether it answers the user or request `key`."""
        return self.canary > 0 and place_of(f"{self.ranker.name}/{self.version}", key) < self.canary

    def shadows(self, request_id: str) -> bool:
        """Return whether both versions rank this request. Independent of who answers."""
        return self.shadow > 0 and place_of(f"shadow/{self.ranker.name}/{self.version}", request_id) < self.shadow
