"""The rankers that are served, by name.

The pipeline, the store, `/models` and `/readyz` ask the registry, and it sets the metric of the served variants. So it
alone decides which version of a ranker serves.

Called by: `main.py`, which fills it, and everything that needs a ranker. Calls: nothing but the metrics.
"""

from __future__ import annotations

from collections.abc import Iterable

from slatewise import metrics
from slatewise.bundle.ranker import Ranker
from slatewise.errors import Invalid, NotFound


class Registry:
    """One version of each ranker."""

    def __init__(self, rankers: Iterable[Ranker]) -> None:
        self._rankers = {ranker.name: ranker for ranker in rankers}
        for ranker in self._rankers.values():
            for variant in ranker.engines:
                metrics.MODEL_INFO.labels(ranker.name, str(ranker.manifest.version), variant).set(1)

    def serving(self) -> tuple[Ranker, ...]:
        return tuple(self._rankers.values())

    def resolve(self, name: str | None) -> Ranker:
        """The ranker of that name; `None`: the only one. Raises NotFound, or Invalid if `None` is ambiguous."""
        if name is None:
            if len(self._rankers) != 1:
                raise Invalid.at("/ranker", f"must be one of {', '.join(self._rankers)}")
            return next(iter(self._rankers.values()))
        if name not in self._rankers:
            raise NotFound(f"no such ranker; served: {', '.join(self._rankers)}")
        return self._rankers[name]
