"""The rankers that are served, by name.

It holds one version of each ranker; the loader chose the version.

Called by: `main.py`, which builds it, `pipeline.py`, `http/models.py`, `http/health.py`, and the store through
`serving`. Calls: `metrics.py` for the served variants, and the series of each ranker.
"""

from __future__ import annotations

from collections.abc import Iterable

from slatewise import metrics
from slatewise.bundle.ranker import Ranker
from slatewise.errors import Invalid, NotFound


class Registry:
    """Holds one version of each ranker."""

    def __init__(self, rankers: Iterable[Ranker]) -> None:
        self._rankers = {ranker.name: ranker for ranker in rankers}
        for ranker in self._rankers.values():
            for variant in ranker.engines:
                metrics.MODEL_INFO.labels(ranker.name, str(ranker.manifest.version), variant).set(1)
            metrics.UNKNOWN_ACTIONS.labels(ranker.name)
            for field in ranker.manifest.fields:
                metrics.UNKNOWN_VALUES.labels(ranker.name, field)

    def serving(self) -> tuple[Ranker, ...]:
        return tuple(self._rankers.values())

    def resolve(self, name: str | None) -> Ranker:
        """Return the ranker `name`. With `None`, return the only ranker; raise Invalid if there is not exactly one.

        Raises NotFound.
        """
        if name is None:
            if len(self._rankers) != 1:
                raise Invalid.at("/ranker", f"must be one of {', '.join(self._rankers)}")
            return next(iter(self._rankers.values()))
        if name not in self._rankers:
            raise NotFound(f"no such ranker; served: {', '.join(self._rankers)}")
        return self._rankers[name]
