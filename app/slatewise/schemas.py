"""The wire: what a request may hold and what an answer holds, as columns. No NumPy here.

Limits that settings or the bundle decide (candidates, history) are checked in `pipeline.py`.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_ID = 256

Exit = Literal["auto", "dot", "point", "set"]
Text = Annotated[str, Field(min_length=1, max_length=MAX_ID, strict=True)]
Integer = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)]
Id = Annotated[Text | Integer, Field(union_mode="left_to_right")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
UnixSeconds = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=99_999_999_999)]
REQUEST_ID = r"[!-~]{1,128}"
RequestId = Annotated[str, Field(pattern=f"^{REQUEST_ID}$", strict=True)]


T = TypeVar("T")
Column = Annotated[list[T], Field(fail_fast=True)]  # one fault says enough of a column of thousands


def as_text(ids: list[Any]) -> list[str]:
    """An integer is taken as its decimal string; most columns hold none, which one loop in C tells."""
    return ids if set(map(type, ids)) <= {str} else list(map(str, ids))


if TYPE_CHECKING:  # what validation makes of them
    User: TypeAlias = str
    Ids: TypeAlias = list[str]
    SomeIds: TypeAlias = list[str]
else:
    User = Annotated[Id, AfterValidator(str)]
    Ids = Annotated[Column[Id], AfterValidator(as_text)]
    SomeIds = Annotated[Column[Id], Field(min_length=1), AfterValidator(as_text)]

Values = Annotated[list[Text], Field(fail_fast=True, max_length=64)]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class History(Wire):
    """What the user did, oldest first. A null time or action is a missing one."""

    item_ids: Ids = Field(default_factory=list)
    actions: Column[Text | None] | None = None
    timestamps: Column[UnixSeconds | None] | None = None
    offset: int = Field(
        0, ge=0, le=2**31, strict=True, description="Index, in the user's whole history, of the first event sent."
    )


class Candidates(Wire):
    """What to rank, in first-stage order. A null feature is a missing one; `fields` describe items the ranker may not know."""

    item_ids: SomeIds
    features: dict[Text, Column[Number | None]] = Field(default_factory=dict)
    fields: dict[Text, Column[Values | Text | None]] = Field(default_factory=dict)


class RankRequest(Wire):
    id: RequestId | None = None
    ranker: Text | None = Field(None, description="Name of the ranker; may be left out where only one is served.")
    variant: Text = "auto"
    exit: Exit = "auto"
    user: User | None = None
    history: History = Field(default_factory=History)
    candidates: Candidates
    request_time: UnixSeconds | None = Field(None, description="Unix seconds; default: now.")
    head_weights: dict[Text, Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e6, le=1e6)]] | None = Field(
        None, min_length=1
    )
    top_n: int | None = Field(None, ge=1, strict=True)
    deadline_ms: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=600_000)] | None = None
    allow_degraded: bool = Field(True, strict=True)
    priority: int = Field(0, ge=-100, le=100, strict=True, description="Lower is more important.")


class Results(Wire):
    """Columns of equal length; `index` points into the candidates sent."""

    index: list[int]
    item_ids: list[str]
    scores: list[float]
    heads: dict[str, list[float]]


class HistoryUse(Wire):
    used: int
    dropped: int
    unknown: int
    cache: Literal["miss", "hit", "extended", "none"]


class MetaEmbeddingUse(Wire):
    status: Literal["hit", "default", "stale", "error", "off"]
    version: str | None = None
    age_seconds: float | None = None


class RankResponse(Wire):
    id: str | None
    ranker: str
    version: int
    variant: str | None = Field(description="null where the model was not asked (exit `input_order`).")
    exit: Literal["dot", "point", "set", "input_order"]
    results: Results
    unknown_candidates: list[int] = Field(
        description="Positions whose id the ranker does not know; they are ranked all the same."
    )
    history: HistoryUse
    meta_embedding: MetaEmbeddingUse
    degraded: list[Literal["deadline", "overload", "exit", "variant", "store_error"]]
    timings_ms: dict[str, float]


class FaultBody(BaseModel):
    pointer: str
    detail: str


class Problem(BaseModel):
    """RFC 9457 problem details; `error` and `message` repeat the detail for clients that look for them."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    message: str
    request_id: str | None = None
    errors: list[FaultBody] = []


class ModelName(BaseModel):
    name: str
    version: int
    variants: list[str]


class Models(BaseModel):
    models: list[ModelName]


class Limits(BaseModel):
    max_candidates: int
    max_history: int
    history_used: int
    set_wise: int


class ModelCard(BaseModel):
    """The public part of a manifest, with the limits of this server."""

    name: str
    version: int
    trained_on: str
    heads: dict[str, float]
    exits: list[str]
    default_exit: str
    default_variant: str
    set_wise: bool
    actions: list[str]
    features: list[str]
    fields: dict[str, list[str]]
    limits: Limits
    variants: dict[str, dict[str, Any]]
    refused_variants: dict[str, str]
    report: dict[str, Any]
    example: dict[str, Any]


class Health(BaseModel):
    status: str
