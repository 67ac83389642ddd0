"""Pruning inside a request: the costly exits score only the best candidates of the exit before.

    dot      all candidates
    point    the best `point` of them by `dot`
    set      the best `set` of those by `point`

A request is pruned only if the exit that answers scores at least `top_n` candidates. So all results of an answer have
scores of the same exit.

Called by: `schemas.py`, `bundle/manifest.py`, `ranking/validation.py`, `ranking/offers.py`, training. Calls: nothing.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Prune(BaseModel):
    """Numbers of candidates that the exits score, at most. Null: all that the exit before has scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    point: int | None = Field(None, ge=1, strict=True, description="`point` scores the best of `dot`.")
    set: int | None = Field(None, ge=1, strict=True, description="`set` compares the best of `point`.")

    @model_validator(mode="after")
    def check_order(self) -> Self:
        if self.point is not None and self.set is not None and self.set > self.point:
            raise PydanticCustomError("prune_order", "`set` must be at most `point`")
        return self


class Pruned(NamedTuple):
    """Numbers of candidates that the exits of one request score; `dot` scores all."""

    exit: str  # that answers: `point` or `set`
    point: int
    last: int  # by the exit that answers; at least `top_n`, and fewer than all


def pruned_to(prune: Prune | None, exit: str, candidates: int, top_n: int | None) -> Pruned | None:
    """Return the numbers for a request that this exit answers; `None`: it is not pruned."""
    if prune is None or top_n is None or exit == "dot":
        return None
    point = min(candidates, prune.point or candidates)
    last = min(point, prune.set or point) if exit == "set" else point
    return Pruned(exit, point, last) if top_n <= last < candidates else None
