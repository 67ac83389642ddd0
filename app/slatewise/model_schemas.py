"""Schemas of what `GET /models` shows of a ranker.

Called by: `bundle/manifest.py`, which stores the verdict, `http/models.py`, and the package slatewise_train. Calls:
`version_schemas.py`.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slatewise.pruning import Prune
from slatewise.version_schemas import VersionState


class Verdict(BaseModel):
    """Whether the ranker beats simple baselines on held-out data, as export measured it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beats_baselines: bool | None = Field(
        description="Whether NDCG@10 minus that of the best baseline is above 0 with 95 % confidence; "
        "null: not measured."
    )
    grade: Literal["better", "unclear", "worse", "unknown"] = Field(
        description="The 95 % interval of the difference is above 0, holds 0, or is below 0; unknown: not measured."
    )
    line: str = Field(description="The verdict as a sentence.")
    exit: str | None = Field(default=None, description="The exit that was compared.")
    baseline: str | None = Field(default=None, description="The best baseline.")
    difference: list[float] | None = Field(
        default=None, description="NDCG@10 of the ranker minus the baseline's, paired: mean, low and high end."
    )
    warnings: list[str] = Field(default=[], description="Signs of an unsuccessful training.")


class Limits(BaseModel):
    max_candidates: int
    max_history: int
    history_used: int
    set_wise: int


class ModelName(BaseModel):
    name: str
    version: int
    variants: list[str]
    verdict: Verdict | None
    limits: Limits
    versions: VersionState | None = Field(
        default=None, description="Only if versions change without a restart (SLATEWISE_RELOAD)."
    )


class Models(BaseModel):
    models: list[ModelName]


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
    fields: dict[str, list[str]] = Field(description="The known values of each field; empty for a text field.")
    return_fields: list[str] = Field(description="The names that a request's `return_fields` may contain.")
    limits: Limits
    prune: Prune | None = Field(description="Candidates that the exits of a pruned request score; null: none is.")
    explore: bool = Field(description="Whether requests may have `explore`.")
    variants: dict[str, dict[str, Any]]
    refused_variants: dict[str, str]
    verdict: Verdict | None
    report: dict[str, Any]
    example: dict[str, Any]
