"""A dialect: the shape of one ranking call, native or foreign. All dialects share one lifecycle, in `rank.py`.

    bytes ---parse---> RankRequest ---pipeline---> Ranking ---render---> response
                            |                         |
                            +-------------------------+--- render_error ---> response

A dialect translates. It ranks nothing, and it knows nothing of admission, deadlines, metrics and the log.

Called by: `rank.py`, `hot_routes.py`, `auth.py` and `calls/`. Calls: nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import Response

from slatewise.errors import RankingError
from slatewise.ranking.admission import RequestLimits
from slatewise.ranking.pipeline import Ranking
from slatewise.ranking.registry import Registry
from slatewise.ranking.trace import Timings
from slatewise.schemas import RankRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Incoming:
    """One call as it arrived. The body is decompressed, and within the limit of bytes."""

    body: bytes
    headers: Headers
    path: Mapping[str, str]  # parameters of the route
    registry: Registry
    limits: RequestLimits


@dataclass(frozen=True)
class Dialect(Generic[T]):
    """One ranking call. `T` holds the facts of the foreign request that rendering needs and a RankRequest lacks.

    parse: raises RankingError. It leaves `history` unset if the call brings none.
    render_error: the second argument is the id of the request.
    """

    path: str  # template of the route, and the metrics' label `endpoint`
    name: str  # of the operation, in the OpenAPI document
    description: str
    parse: Callable[[Incoming], tuple[RankRequest, T]]
    render: Callable[[RankRequest, T, Ranking, Timings], Response]
    render_error: Callable[[RankingError, str], Response]
    body: type[BaseModel]  # schema of the request, for the OpenAPI document
    answer: Any  # schema of the answer, for the OpenAPI document
    responses: Mapping[int | str, dict[str, Any]]  # errors and other forms of the answer, for the OpenAPI document
    is_binary: bool = False  # the body may be JSON with other bytes behind it: `parse` calls `check_counts`
    any_type: bool = False  # accepts every Content-Type, not only JSON
