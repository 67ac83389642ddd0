"""Schemas of the versions of rankers: states, as `GET /models` and `/admin` show them, and the bodies of commands.

Called by: `model_schemas.py`, `ranking/`, `http/admin.py`, and `metrics.py` for the closed lists of label values.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# waiting: files, or the vectors of a new space, are not there yet
LoadOutcome = Literal["loaded", "rejected", "failed", "waiting"]
StopReason = Literal["failed", "degraded", "latency", "agreement"]
ShadowResult = Literal["compared", "differs", "dropped", "failed"]


class StopBounds(BaseModel):
    """Bounds of the stop rule of a canary."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    failed: float = Field(0.01, gt=0, le=1, description="Most that the share of failed answers may be higher.")
    degraded: float = Field(0.05, gt=0, le=1, description="Most that the share of degraded answers may be higher.")
    latency_ratio: float = Field(1.5, ge=1, le=1000, description="Most that answers may take, over the served version.")
    overlap: float = Field(0.3, ge=0, lt=1, description="Least mean overlap of the first ten results; by the shadow.")
    false_alarm: float = Field(
        0.001, ge=1e-12, le=0.5, description="Probability with which each of the four bounds ever stops a good version."
    )


class LoadAttempt(BaseModel):
    """The latest attempt to load a version."""

    version: int
    outcome: LoadOutcome
    reason: str | None = Field(default=None, description="Why the version is not served.")
    at: float = Field(description="Unix seconds.")
    seconds: float | None = Field(default=None, description="Duration of the load.")


class CandidateState(BaseModel):
    """A version that is loaded beside the served one."""

    version: int
    canary: float = Field(description="Share of the users whose requests it answers.")
    shadow: float = Field(description="Share of the requests that both versions rank.")
    bounds: StopBounds
    answers: int = Field(description="Answers that the stop rule has seen.")


class VersionState(BaseModel):
    """The versions of one ranker in this process."""

    ranker: str
    version: int | None = Field(description="The served version; null: none of this ranker.")
    previous: int | None = Field(default=None, description="The version served before, to which a roll-back goes.")
    pinned: bool = False
    candidate: CandidateState | None = None
    stopped: str | None = Field(default=None, description="Why the last canary was stopped by its rule.")
    last_load: LoadAttempt | None = None
    in_use: list[int] = Field(default=[], description="Replaced versions whose last requests have not ended.")


class VersionStates(BaseModel):
    rankers: list[VersionState]
    mode: Literal["poll", "admin"] = Field(description="The setting SLATEWISE_RELOAD.")
    running: str | None = Field(default=None, description="The command in progress.")


class VersionBody(BaseModel):
    """The body of `load`, `unload`, `switch`, `pin` and `roll-back`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int | None = Field(default=None, ge=0)


class RolloutBody(BaseModel):
    """The body of `canary` and `shadow`. Without a version: the loaded candidate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int | None = Field(default=None, ge=0)
    share: float = Field(ge=0, le=1, allow_inf_nan=False, description="Of a canary: at most 0.5. 0 ends it.")
    bounds: StopBounds | None = Field(default=None, description="Of a canary; `null`: the defaults, or those it has.")
