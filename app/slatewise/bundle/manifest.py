"""The manifest of a bundle: the schema, the known formats, and the function that reads it.

    <root>/<ranker>/<version>/
      manifest.json                    the manifest
      manifest.json.sig                its signature (optional)
      items.npy ids.json               item table (rows, d): row 0 unknown item, row 1 start token; ids of rows 2 and up
      items8.npy                       the item table in int8, for the variants that name it (optional)
      items4.npy                       the item table in packed codes, for the variants that name it (optional)
      fields.npy                       vectors of field values, for unknown items that arrive with `candidates.fields`
      weights.npz                      float32 weights of the model, apart from the item table (format 2)
      default_meta.npy                 the meta-embedding of unknown users (absent when `meta_size` is 0)
      meta_embeddings.npy users.json   meta-embeddings of the embedded store (optional)
      meta_block.npz                   the meta block, which the refresh job adapts to users (optional)
      display.json                     titles and fields of items, for display (optional)
      examples.json                    requests of demo users, for the page (optional)
      warmup.jsonl                     requests to warm up with (optional)
      report.json report.md report.png   quality by exit, beside baselines (optional)
      training.png                     learning curves (optional)
      variants.md variants.png         size, latency and quality by variant (optional)
      variants/<name>/*.onnx           graphs: encode, then one for each exit
      variants/<name>/calibration.json   calibration by exit and head, as written into the graphs (format 2)
      variants/<name>/explore.onnx explore.npy   graph and posterior of exploration (optional)

`slatewise_train/bundle_writer.py` writes it. Called by: `loader.py` and every command that reads a bundle. Calls:
`signature.py`.
"""

import json
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from slatewise.bundle.signature import PublicKeys, SignatureFault
from slatewise.model_schemas import Verdict
from slatewise.pruning import Prune

FORMAT = 2  # the format that is written
KNOWN_FORMATS = (1, 2)  # the formats that are read
EXPLORE_GRAPH = "explore.onnx"  # of a variant
POSTERIOR = "explore.npy"  # (heads, D, D) float32, see `inference/exploration.py`


class ManifestError(ValueError):
    """The bundle cannot be trusted; the message gives the reason."""


class NoSuchVariant(ManifestError):
    """The bundle has none of the variants that the operator chose. No older version may be served instead."""


Weight = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]


class Member(BaseModel):
    """Part of a manifest. It is immutable, and unknown members are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(Member):
    dtype: str
    shape: list[int | str]


class Io(Member):
    """The inputs and outputs of one graph."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Column(Member):
    """One column of fields: row `offset` of fields.npy stands for a missing value, then one row per value."""

    offset: int = Field(ge=0)
    values: list[str]
    text: bool = Field(default=False, description="Whether a cell is text, and its values are the words of the text.")


class ModelDescription(Member):
    """Family, configuration and weights, from which training can rebuild the model. The server does not read them."""

    family: str = Field(min_length=1, description="Ranker family, a key of `families.FAMILIES`.")
    config: dict[str, Any] = Field(description="Configuration of the model, as its family defines it.")
    weights: str = Field(
        pattern=r"^[\w-]+\.npz$", description="File of the float32 weights: arrays by parameter name, without pickle."
    )


class Variant(Member):
    items: Literal["items.npy", "items8.npy", "items4.npy"] = Field(
        default="items.npy", description="Its item table: float32 rows, or a form of `item_table.py`."
    )
    bytes: int = Field(description="Graphs and item table on disk.")
    bound: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="Largest difference of a score between requests that should score alike.",
    )
    golden_bound: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Tolerance of the golden scores on other processors; default: `bound`. "
        "Integer rounding can differ between processors.",
    )
    invariance: dict[str, float] = Field(description="Largest differences measured at export, by property.")
    quality: dict[str, dict[str, Any]] = Field(description="Quality on held-out data, by exit.")
    latency_ms: dict[str, Any]
    agreement: dict[str, float] = Field(
        default={}, description="With fp32: Kendall's tau, overlap of the first ten, largest difference of a score."
    )
    difference: dict[str, list[float]] = Field(
        default={}, description="Quality minus fp32's, paired, with a 95 % interval."
    )
    within_gate: bool | None = Field(
        default=None,
        description="Whether quality passed the gate; null: not measured. "
        "A variant that failed is published only when forced, and never as the default.",
    )
    resident_bytes: int | None = Field(
        default=None, description="Resident memory that loading this variant alone adds to a process with one thread."
    )
    golden_scores: list[float] = Field(
        description="Weighted sums of the heads' probabilities for the manifest's `example`, in input order. An answer "
        "has them divided by the sum of the weights."
    )

    @property
    def milliseconds(self) -> float:
        """Encode and score time, summed over the measured request shapes; infinite if no shape was measured."""
        rows = self.latency_ms.get("rows", [])
        return float(sum(row["encode_p50"] + row["score_p50"] for row in rows)) if rows else inf

    @property
    def ndcg_minus_fp32(self) -> float:
        """NDCG@10 minus fp32's, of the next item or else of the held-out slates; 0 for fp32, and if not measured."""
        measured = (self.difference.get(name) for name in ("leave_one_out_ndcg10", "slate_ndcg10"))
        return next((values[0] for values in measured if values), 0.0)


class BundleLimits(Member):
    history_used: int = Field(ge=1)
    set_wise: int = Field(
        ge=0, description="Most candidates in a slate of the exit `set`; 0: the ranker has no set-wise block."
    )


class Update(Member):
    """What an update of a version (`slatewise update`) learned, and how it compares with that version."""

    parent: int = Field(description="The version that it comes from.")
    events: int = Field(description="New events that it was trained on.")
    trained_until: float | None = Field(description="Time of the newest event, unix seconds.")
    overlap10: float | None = Field(description="Share of the ten best that both versions have; null: not measured.")
    rank_biased_overlap: float | None = Field(description="The same, weighted by rank; null: not measured.")
    ndcg10_difference: list[float] | None = Field(
        description="NDCG@10 minus the parent's on new events, paired: mean, low and high end; null: not measured."
    )


class Manifest(Member):
    format: Literal[1, 2]
    ranker: str
    version: int = Field(ge=0)
    created: AwareDatetime
    trained_on: str
    space: str = Field(description="Name of the vector space of the meta-embeddings that it reads.")
    model: ModelDescription | None = Field(default=None, description="Present from format 2 on.")
    width: int = Field(ge=1)
    heads: dict[str, Weight] = Field(description="Output heads, in order, with their weight in the score.")
    exits: list[str]
    default_exit: str
    default_variant: str
    actions: list[str] = Field(description="Row k + 1 of the action table.")
    history_actions: list[str] = Field(
        default=[],
        description="Which rows of a table of events make history: actions, `label:NAME`, or `*` for all. Empty: the "
        "training stated nothing. For the refresh job; the server does not read it.",
    )
    features: list[str] = Field(description="Numeric candidate features, in order.")
    fields: dict[str, Column]
    meta_size: int = Field(ge=0, description="Length of a meta-embedding; 0: the ranker reads no meta-embeddings.")
    limits: BundleLimits
    graphs: dict[str, Io]
    variants: dict[str, Variant]
    files: dict[str, str] = Field(description="SHA-256 of every other file, by path inside the bundle.")
    verdict: Verdict | None = Field(default=None, description="Comparison with baselines; null: not compared.")
    prune: Prune | None = Field(
        default=None,
        description="Candidates that the exits of a request with `top_n` score; null: all. Left out of the file if it "
        "is null, because older servers refuse the member.",
    )
    update: Update | None = Field(
        default=None, description="Of an updated ranker; null: it was trained from the start. Left out as `prune` is."
    )
    example: dict[str, Any] = Field(
        description="A request body that works as it stands; the golden request of every variant."
    )

    @model_validator(mode="after")
    def check_model(self) -> Self:
        """Check that the member `model` is present in format 2 and absent in format 1."""
        if (self.model is None) != (self.format == 1):
            raise ValueError(f"format {self.format} {'needs' if self.model is None else 'has no'} member `model`")
        return self

    @model_validator(mode="after")
    def check_slate(self) -> Self:
        """Check that a ranker with the exit `set` has slates of at least one candidate."""
        if "set" in self.exits and not self.limits.set_wise:
            raise ValueError("limits.set_wise is 0, and there is an exit `set`")
        return self


def versions(folder: Path) -> list[int]:
    """The version numbers in a ranker's folder, ascending."""
    return sorted(int(v.name) for v in folder.glob("*") if v.is_dir() and v.name.isdecimal() and v.name.isascii())


def bundle_folder(path: Path) -> Path:
    """`path` itself if it is one version of a ranker; the newest version if it is the ranker's folder.

    Raises ManifestError if it is neither.
    """
    if (path / "manifest.json").exists():
        return path
    newest = max(versions(path), default=None)
    if newest is None:
        raise ManifestError(f"{path}: no bundle, and no folder of a ranker's versions")
    return path / str(newest)


def read_manifest(folder: Path, keys: PublicKeys | None = None) -> Manifest:
    """Read and check the manifest in a bundle's folder.

    Raises ManifestError if the file is missing or is not JSON, the format is not known, a member is missing, unknown or
    invalid, or there are `keys` and it is not signed by one of them.
    """
    return parse_manifest(read_manifest_bytes(folder, keys), folder)


def read_manifest_bytes(folder: Path, keys: PublicKeys | None = None) -> bytes:
    """Raises ManifestError if the file cannot be read, or there are `keys` and it is not signed by one of them."""
    try:
        raw = (folder / "manifest.json").read_bytes()
        if keys:
            keys.check(folder, raw)
    except SignatureFault as error:
        raise ManifestError(f"{folder} {error}") from error
    except OSError as error:
        raise ManifestError(f"{folder}: no readable manifest.json ({error})") from error
    return raw


def parse_manifest(text: bytes, folder: Path) -> Manifest:
    """Check the bytes of a manifest; `folder` is named in the errors. Raises ManifestError, as `read_manifest`."""
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is in no answer
    except ValueError as error:
        raise ManifestError(f"{folder}: no readable manifest.json ({error})") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found not in KNOWN_FORMATS:
        known = " and ".join(map(str, KNOWN_FORMATS))
        raise ManifestError(f"{folder}: format {found!r} is not known, this version reads formats {known}")
    try:
        return Manifest.model_validate(content)
    except ValueError as error:
        raise ManifestError(f"{folder}: {error}") from error
