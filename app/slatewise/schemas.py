"""Models of the JSON requests and responses. Lists are columns.

Pydantic validates requests. The response with a ranking is a typed dictionary: `http/rank.py` renders it without
validation, and FastAPI documents it. `ranking/validation.py` checks limits that depend on settings or on the bundle.

Called by: `http/`, `ranking/`, `bundle/`, `store/` and `metrics.py`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypeAlias, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from slatewise.pruning import Prune

MAX_ID = 256

ModelExit: TypeAlias = Literal["dot", "point", "set"]
EXITS: tuple[ModelExit, ...] = get_args(ModelExit)  # the cascade, cheapest first
AnsweredExit: TypeAlias = Literal[ModelExit, "input_order"]
EXPLORING: tuple[AnsweredExit, ...] = ("point", "set")  # the exits whose last layer may be drawn
RequestedExit: TypeAlias = Literal["auto", ModelExit]
CacheResult: TypeAlias = Literal["miss", "hit", "extended", "none"]
MetaStatus: TypeAlias = Literal["hit", "default", "stale", "error", "off"]
HistorySource: TypeAlias = Literal["request", "stored", "none"]
DegradedReason: TypeAlias = Literal["deadline", "overload", "exit", "variant", "store_error", "explanations"]

Text = Annotated[str, Field(min_length=1, max_length=MAX_ID, strict=True)]
Integer = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)]
Id = Annotated[Text | Integer, Field(union_mode="left_to_right")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
LAST_TIME = 99_999_999_999  # unix seconds that a request may have, at most
UnixSeconds = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=LAST_TIME)]
MOST_MILLISECONDS = 600_000.0
Milliseconds = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=MOST_MILLISECONDS)]
MOST_EXPLORATION = 100.0
REQUEST_ID = r"[!-~]{1,128}"
RequestId = Annotated[str, Field(pattern=f"^{REQUEST_ID}$", strict=True)]


T = TypeVar("T")
MOST_ENTRIES = 32_768  # of a column: an upper limit of the settings max_candidates and max_history
Column = Annotated[
    list[T], Field(fail_fast=True, max_length=MOST_ENTRIES)
]  # reports the first fault only: a column may have thousands


def as_text(ids: list[Any]) -> list[str]:
    """Convert integer ids to decimal strings. A column without integers is returned unchanged."""
    return ids if set(map(type, ids)) <= {str} else list(map(str, ids))


if TYPE_CHECKING:  # the types after validation
    User: TypeAlias = str
    Ids: TypeAlias = list[str]
    SomeIds: TypeAlias = list[str]
else:
    User = Annotated[Id, AfterValidator(str)]
    Ids = Annotated[Column[Id], AfterValidator(as_text)]
    SomeIds = Annotated[Column[Id], Field(min_length=1), AfterValidator(as_text)]

Values = Annotated[list[Text], Field(fail_fast=True, max_length=64)]
OffOrPrune = BeforeValidator(  # false: no numbers, so nothing is pruned
    lambda sent: {} if sent is False else sent, json_schema_input_type=Prune | Literal[False] | None
)


class RequestModel(BaseModel):
    # Pydantic's cache of strings is 16,384 entries wide. The ids of a request miss the processor's caches in it.
    model_config = ConfigDict(extra="forbid", frozen=True, cache_strings="keys")


class History(RequestModel):
    """The user's past events, oldest first. A null time or action means that it is missing.

    With timestamps, events in another order are read in time order.
    """

    item_ids: Ids = Field(default_factory=list)
    actions: Column[Text | None] | None = None
    timestamps: Column[UnixSeconds | None] | None = None
    offset: int = Field(
        0, ge=0, le=2**31, strict=True, description="Index, in the user's whole history, of the first event sent."
    )


class Candidates(RequestModel):
    """The items to rank, in first-stage order. A null feature is a missing one.

    `fields` describe unknown items. Several values are a list, or one text separated by `|`, as in a table of items.
    """

    item_ids: SomeIds
    features: dict[Text, Column[Number | None]] = Field(default_factory=dict)
    fields: dict[Text, Column[Values | Text | None]] = Field(default_factory=dict)


class RankRequest(RequestModel):
    id: RequestId | None = None
    ranker: Text | None = Field(None, description="Name of the ranker; optional if the server has only one.")
    variant: Text = "auto"
    exit: RequestedExit = "auto"
    user: User | None = None
    history: History = Field(default_factory=History)
    candidates: Candidates
    request_time: UnixSeconds | None = Field(None, description="Unix seconds; default: now.")
    head_weights: dict[Text, Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e6, le=1e6)]] | None = Field(
        None, min_length=1
    )
    top_n: int | None = Field(None, ge=1, strict=True)
    deadline_ms: Milliseconds | None = None
    allow_degraded: bool = Field(True, strict=True)
    priority: int = Field(0, ge=-100, le=100, strict=True, description="Lower is more important.")
    return_fields: list[Text] | None = Field(
        None,
        max_length=64,
        description="Fields to return for each result, such as `title`: see `GET /models/{ranker}`.",
    )
    explain: bool = Field(False, strict=True, description="Also say which events and neighbours moved each result.")
    prune: Annotated[Prune | None, OffOrPrune] = Field(None, description="Replaces the ranker's; false: prune nothing.")
    explore: float | None = Field(
        None,
        ge=0,
        le=MOST_EXPLORATION,
        allow_inf_nan=False,
        strict=True,
        description="Score by weights that are drawn from their posterior, with `id` as the seed: 1 draws from the "
        "posterior, other numbers multiply its standard deviations. Default: 0, no exploration.",
    )


class EncodeRequest(RequestModel):
    """A history to encode ahead of a rank request. Without `history`, the stored one of the user."""

    ranker: Text | None = Field(None, description="Name of the ranker; optional if the server has only one.")
    variant: Text = "auto"
    user: User
    history: History = Field(default_factory=History)


CLOSED = ConfigDict(extra="forbid")  # a response has no other members


@with_config(CLOSED)
class Results(TypedDict):
    index: list[int]
    item_ids: list[str]
    scores: Annotated[list[float] | None, Field(description="In [0, 1]; null for the exit `input_order`.")]
    heads: dict[str, list[float]]
    fields: NotRequired[
        Annotated[
            dict[str, list[str | list[str] | None]],
            Field(description="The columns that `return_fields` names; null: not known. Absent if none was asked for."),
        ]
    ]


@with_config(CLOSED)
@dataclass(frozen=True)
class HistoryUse:
    """Numbers of events: read by the model, skipped by the model, read with an unknown item, read with an action that
    the ranker does not know, and sent in wrong order.

    `reordered` counts the events that the request has behind a later one. The model reads all events oldest first.
    `source`: the history was in the request, was stored for the user, or there was none.
    """

    used: int
    dropped: int
    unknown: int
    unknown_actions: int
    reordered: int
    cache: CacheResult
    source: HistorySource = "none"


@with_config(CLOSED)
class MetaEmbeddingUse(TypedDict):
    status: MetaStatus
    version: str | None
    age_seconds: float | None


Delta = Annotated[
    list[float], Field(description="The score of the result minus its score without the event or neighbour.")
]
Places = Annotated[
    list[float],
    Field(description="Smoothed number of places that the event or neighbour raised the result; negative: lowered."),
]


@with_config(CLOSED)
class EventEffects(TypedDict):
    """Columns, by descending `places`: at most three events that raised the result, then as many that lowered it."""

    position: Annotated[list[int], Field(description="Positions in the history of the request.")]
    item_ids: list[str]
    delta: Delta
    places: Places


@with_config(CLOSED)
class NeighbourEffects(TypedDict):
    """Columns, by descending `places`. Empty for the exits `dot` and `point`, which score each candidate alone."""

    index: Annotated[list[int], Field(description="Positions in the candidates of the request.")]
    item_ids: list[str]
    delta: Delta
    places: Places


@with_config(CLOSED)
class Explanation(TypedDict):
    index: Annotated[int, Field(description="The result: its position in the candidates of the request.")]
    events: EventEffects
    neighbours: NeighbourEffects


@with_config(CLOSED)
class RankResponse(TypedDict):
    id: Annotated[str, Field(description="The id of the request, or one that the server made.")]
    ranker: str
    version: int
    variant: Annotated[str | None, Field(description="null for the exit `input_order`: no model scored the request.")]
    exit: AnsweredExit
    results: Annotated[
        Results, Field(description="Columns of equal length; `index` is the position in the candidates of the request.")
    ]
    unknown_candidates: Annotated[
        list[int], Field(description="Positions of candidates whose id the ranker does not know; they are ranked too.")
    ]
    adapted_candidates: NotRequired[
        Annotated[list[int], Field(description="Those of the unknown candidates that have a vector of their own.")]
    ]
    unknown_values: Annotated[
        dict[str, int],
        Field(
            description="For each field: the number of values, of unknown candidates, that the ranker does not know."
        ),
    ]
    history: HistoryUse
    meta_embedding: MetaEmbeddingUse
    degraded: list[DegradedReason]
    timings_ms: dict[str, float]
    pruned: NotRequired[
        Annotated[
            dict[ModelExit, int],
            Field(description="Only if not every exit scored all candidates: how many `point` and `set` scored."),
        ]
    ]
    explored: NotRequired[
        Annotated[
            bool,
            Field(description="Only with `explore`: whether the scores are drawn; not those of `dot`."),
        ]
    ]
    explanations: NotRequired[
        Annotated[
            list[Explanation] | None,
            Field(description="Only with `explain`: of the first results, best first. null: dropped, see `degraded`."),
        ]
    ]


class EncodedHistory(BaseModel):
    """Numbers of events that the model read and skipped."""

    used: int
    dropped: int
    cache: CacheResult
    source: HistorySource


class EncodeResponse(BaseModel):
    """What was encoded. A rank request with the same user, history and variant then uses the kept state."""

    ranker: str
    version: int
    variant: str
    history: EncodedHistory
    degraded: list[DegradedReason]  # `store_error`: the stored history could not be read


class FaultBody(BaseModel):
    pointer: str
    detail: str


class Problem(BaseModel):
    """RFC 9457 problem details. `error` and `message` repeat `detail` for clients that expect those names."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    message: str
    request_id: str
    errors: list[FaultBody] = []
