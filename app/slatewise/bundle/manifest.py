"""What a bundle promises. `models/slatewise_train/export.py` writes it, `bundle.py` holds the files to it.

<root>/<ranker>/<version>/
  manifest.json               this
  items.npy ids.json          item table (rows, d), row 0 the unknown item, row 1 the start token; ids of rows 2, 3, ...
  items8.npy                  the same in int8, for the variants that name it (optional)
  display.json                titles and fields of the items that may show them (optional)
  fields.npy                  vectors of field values, for items that arrive with `candidates.fields`
  meta_embeddings.npy users.json   vectors of the embedded store (optional)
  default_meta.npy            the un-adapted vector
  warmup.jsonl                requests to warm up with
  report.json report.png      quality per exit, latency
  variants.md variants.png    what each variant costs and keeps (optional)
  variants/<name>/{encode,dot,point,set}.onnx      what a name promises: `operators.py`
"""

import json
from math import inf
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

FORMAT = 1


class ManifestError(ValueError):
    """A bundle that cannot be trusted, with the reason."""


class NoSuchVariant(ManifestError):
    """A bundle without any of the variants that were chosen: no reason to serve an older one."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(Part):
    dtype: str
    shape: list[int | str]


class Io(Part):
    """Inputs and outputs of one graph."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Column(Part):
    """One categorical column: row `offset` of fields.npy is "none", then one row a value."""

    offset: int = Field(ge=0)
    values: list[str]


class Variant(Part):
    items: Literal["items.npy", "items8.npy"] = Field(
        default="items.npy", description="Its item table: float32, or int8 records of `items.py`."
    )
    bytes: int = Field(description="Graphs and item table on disk.")
    bound: float = Field(gt=0, description="Largest difference of a score between requests that should score alike.")
    golden_bound: float | None = Field(
        default=None,
        gt=0,
        description="Of the golden scores on another processor; None: the same. Rounding steps may fall otherwise there.",
    )
    invariance: dict[str, float] = Field(description="Largest differences measured at export, by property.")
    quality: dict[str, dict[str, Any]] = Field(description="Per exit, on held-out data.")
    latency_ms: dict[str, Any]
    agreement: dict[str, float] = Field(
        default={}, description="With fp32: Kendall's tau, overlap of the first ten, largest difference of a score."
    )
    difference: dict[str, list[float]] = Field(
        default={}, description="Quality minus fp32's, paired, with a 95 % interval."
    )
    within_gate: bool | None = Field(
        default=None,
        description="Of quality; None: not known. One outside is published where forced, and never the default.",
    )
    resident_bytes: int | None = Field(default=None, description="What loading it alone adds to a process, one thread.")
    golden_scores: list[float] = Field(description="Scores of the manifest's `example`, in input order.")

    @property
    def milliseconds(self) -> float:
        """Encode and score, summed over the shapes that were measured; infinite where none was."""
        rows = self.latency_ms.get("rows", [])
        return float(sum(row["encode_p50"] + row["score_p50"] for row in rows)) if rows else inf


class BundleLimits(Part):
    history_used: int = Field(ge=1)
    set_wise: int = Field(ge=0, description="Most candidates that see each other; 0: the ranker is not set-wise.")


class Manifest(Part):
    format: int
    ranker: str
    version: int = Field(ge=0)
    created: AwareDatetime
    trained_on: str
    space: str = Field(description="Name of the vector space of the meta-embeddings it reads.")
    width: int = Field(ge=1)
    heads: dict[str, float] = Field(description="Output heads, in order, with their weight in the score.")
    exits: list[str]
    default_exit: str
    default_variant: str
    actions: list[str] = Field(description="Row k + 1 of the action table.")
    features: list[str] = Field(description="Numeric candidate features, in order.")
    fields: dict[str, Column]
    meta_size: int = Field(ge=1)
    limits: BundleLimits
    graphs: dict[str, Io]
    variants: dict[str, Variant]
    files: dict[str, str] = Field(description="SHA-256 of every other file, by path inside the bundle.")
    example: dict[str, Any] = Field(
        description="A request body that works as it stands; the golden request of every variant."
    )


def read_manifest(folder: Path) -> Manifest:
    """Raises ManifestError where there is none, the format is not known, or a member is missing, wrong or unknown."""
    try:
        content = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ManifestError(f"{folder}: no readable manifest.json ({error})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ManifestError(f"{folder}: format {found!r} is not known, this server reads format {FORMAT}")
    try:
        return Manifest.model_validate(content)
    except ValueError as error:
        raise ManifestError(f"{folder}: {error}") from error
