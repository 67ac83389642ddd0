"""Write bundles. This is the only module that writes a manifest.

    with staging(folder, version) as stage:          a folder beside the target, renamed to it at the end
        manifest = write_content(stage, content, version)       files that all variants share
        io = write_variant(stage, name, graphs, calibrations)   graphs of one variant
        publish(stage, manifest)                                check graphs, digest files, write and load the manifest

Called by: `export.py`, `compress.py`, `compression/`, `demo/`. Calls: `graph_check.py`, `evaluation/`, and
`bundle/loader.py` of the server to load the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from slatewise.bundle.files import Files, sha256
from slatewise.bundle.golden import score_request
from slatewise.bundle.loader import load_bundle, make_ranker
from slatewise.bundle.manifest import (
    EXPLORE_GRAPH,
    FORMAT,
    POSTERIOR,
    BundleLimits,
    Column,
    Io,
    Manifest,
    ManifestError,
    Tensor,
    Variant,
)
from slatewise.inference.engine import HISTORY_CHUNK, SLATE, Engine
from slatewise.schemas import RankRequest
from slatewise_train.evaluation import parity
from slatewise_train.evaluation.calibration import write_calibrations
from slatewise_train.evaluation.latency import measure_latency
from slatewise_train.graph_check import check_exploration, check_variant, layers_of_low_rank
from slatewise_train.rankers import families
from slatewise_train.rankers.base import Calibrations, RankerModel
from slatewise_train.rankers.weights import save_weights, serving_form

FP32_BOUND = 1e-5  # largest score difference of float32 graphs between requests that should score alike
CALIBRATION = "calibration.json"
FP32 = Path("variants/fp32")


@dataclass(frozen=True)
class BundleContent:
    """The content of a bundle, without graphs and measurements."""

    ranker: str
    trained_on: str
    model: RankerModel
    ids: list[str]  # of the item table's rows from FIRST_ITEM on
    actions: list[str]
    features: list[str]
    fields: dict[str, list[str]]
    heads: dict[str, float]  # weight in the score
    history_used: int
    users: list[str]
    vectors: np.ndarray  # (users, M) float32 meta-embeddings of the embedded store
    titles: dict[str, dict[str, Any]]  # item id -> title and fields, for display
    example: dict[str, Any]
    warmup: list[dict[str, Any]]
    history_actions: Sequence[str] = ()  # of the TOML, for the refresh job
    text: Sequence[str] = ()  # the fields that are text columns
    examples: Sequence[dict[str, Any]] = ()  # requests of demo users, the example first
    space: str | None = None  # of the meta-embeddings, if it is that of an older version; None: a new one

    @property
    def exits(self) -> list[str]:
        return list(self.model.exits)


def longest_call(history_used: int) -> int:
    """Return the number of history positions that the rotary tables of the graphs must cover."""
    return max(history_used, HISTORY_CHUNK)


@contextmanager
def staging(folder: Path, version: int) -> Iterator[Path]:
    """Yield a folder beside `folder/version` and rename it to that path at the end.

    A bundle is therefore published completely or not at all. Raises ValueError when the version exists, because a
    published version never changes.
    """
    target = folder / str(version)
    stage = folder / f".staging-{version}"
    if target.exists():
        raise ValueError(f"{target} exists: a published version does not change")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    yield stage
    stage.rename(target)


def write_content(stage: Path, content: BundleContent, version: int) -> Manifest:
    """Write the files that all variants share. Returns the manifest without graphs, variants and digests."""
    model = content.model
    described = save_weights(stage, serving_form(model))
    field_vectors, fields = tabulate_fields(model, content.fields, content.text)
    np.save(stage / "fields.npy", field_vectors)
    write_json(stage / "ids.json", content.ids)
    write_json(stage / "display.json", content.titles)
    if len(content.examples) > 1:  # one alone is the manifest's example
        write_json(stage / "examples.json", list(content.examples))
    (stage / "warmup.jsonl").write_text("".join(json.dumps(request) + "\n" for request in content.warmup))
    if model.vector_size:
        np.save(stage / "default_meta.npy", model.default_vector().numpy())
        np.save(stage / "meta_embeddings.npy", content.vectors)
        write_json(stage / "users.json", content.users)
    return Manifest(
        format=FORMAT,
        ranker=content.ranker,
        version=version,
        created=datetime.now(UTC).replace(microsecond=0),
        trained_on=content.trained_on,
        space=content.space or f"{content.ranker}-{version}",
        model=described,
        width=model.config.width,
        heads=content.heads,
        exits=content.exits,
        default_exit=content.exits[-1],
        default_variant="fp32",
        actions=content.actions,
        history_actions=list(content.history_actions),
        features=content.features,
        fields=fields,
        meta_size=model.vector_size,
        limits=BundleLimits(history_used=content.history_used, set_wise=SLATE if "set" in content.exits else 0),
        graphs={},
        variants={},
        files={},
        example=content.example,
    )


def tabulate_fields(
    model: RankerModel, fields: Mapping[str, list[str]], text: Sequence[str]
) -> tuple[np.ndarray, dict[str, Column]]:
    """Return the array of fields.npy, and the manifest's description of it."""
    tables = [np.zeros((0, model.config.width), np.float32)]
    columns = {}
    offset = 0
    for name, values in fields.items():
        table = model.field_table(name).detach().numpy()
        columns[name] = Column(offset=offset, values=values, text=name in text)
        tables.append(table)
        offset += len(table)
    return np.concatenate(tables), columns


def write_variant(
    stage: Path, name: str, graphs: Mapping[str, onnx.ModelProto], calibrations: Calibrations
) -> dict[str, Io]:
    """Write a variant's graphs and the calibrations that they contain. Returns inputs and outputs by graph.

    `compression/source.py` reads the calibrations of fp32. Those of other variants are a record only.
    """
    folder = stage / "variants" / name
    described = write_graphs(folder, graphs)
    write_calibrations(folder / CALIBRATION, calibrations)
    return described


def write_graphs(folder: Path, graphs: Mapping[str, onnx.ModelProto]) -> dict[str, Io]:
    """Write .onnx files. Returns inputs and outputs by graph."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph in graphs.items():
        onnx.save(graph, folder / f"{name}.onnx")
    return {
        name: Io(inputs=tensors(graph.graph.input), outputs=tensors(graph.graph.output))
        for name, graph in graphs.items()
    }


def tensors(values: Iterable[onnx.ValueInfoProto]) -> dict[str, Tensor]:
    """Return dtype and shape by name. A dimension without a fixed size is given as its symbol."""
    return {
        value.name: Tensor(
            dtype=onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            shape=[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def write_fp32(stage: Path, manifest: Manifest, content: BundleContent, calibrations: Calibrations) -> Manifest:
    """Write the graphs of the variant fp32, and rank.onnx for other servers. Returns the manifest with its graphs."""
    graphs = families.graphs(content.model, calibrations, longest_call(content.history_used))
    described = write_variant(stage, "fp32", graphs.all(), calibrations)
    write_graphs(stage / FP32, {"rank": graphs.rank(np.load(stage / "items.npy"), list(content.heads.values()))})
    return manifest.model_copy(update={"graphs": described})


def write_exploration(folder: Path, model: RankerModel, calibrations: Calibrations, posterior: np.ndarray) -> None:
    """Write what a variant explores with. Older servers check the digests of these files, and do not read them.

    posterior: (heads, D, D) float32 factors, of `evaluation/exploration.py`.
    """
    onnx.save(families.explore(model, calibrations), folder / EXPLORE_GRAPH)
    np.save(folder / POSTERIOR, posterior)


def open_fp32(stage: Path, manifest: Manifest) -> Engine:
    return Engine(stage / FP32, np.load(stage / "items.npy"), manifest.exits)


def check_parity(
    stage: Path, manifest: Manifest, content: BundleContent, calibrations: Calibrations
) -> dict[str, float]:
    """Return the largest score differences, by property. Raises ValueError when one of them is above FP32_BOUND."""
    measured = parity.measure_parity(open_fp32(stage, manifest), manifest, content.model, calibrations)
    told = [f"{name.replace('_', ' ')} {value:.1e}" for name, value in measured.items() if name not in parity.OPTIONS]
    print(f"largest differences between scores, bound {FP32_BOUND:.0e}: {', '.join(told)}")
    if failed := {
        name: value for name, value in measured.items() if name not in parity.OPTIONS and not value <= FP32_BOUND
    }:
        raise ValueError(f"above the bound {FP32_BOUND}: {failed}")
    return parity.rounded(measured)


def measure_fp32(stage: Path, manifest: Manifest, invariance: dict[str, float], report: dict[str, Any]) -> Variant:
    """Return the manifest's row of the variant fp32. report: the tables of `tabulate`, or empty."""
    engine = open_fp32(stage, manifest)
    return Variant(
        bytes=bytes_on_disk(stage / FP32, manifest.graphs, stage / "items.npy"),
        bound=FP32_BOUND,
        invariance=invariance,
        quality=quality_rows(report, manifest.exits),
        latency_ms=measure_latency({"fp32": engine}, manifest)["fp32"],
        golden_scores=golden_scores(engine, stage, manifest),
    )


def publish(stage: Path, manifest: Manifest) -> None:
    """Write the manifest with the digest of every file, then load the bundle as the server does.

    Raises ManifestError when a variant's graphs are not of the kind that its name states, when its graph `explore` does
    not fit them, or when a variant is refused.
    """
    graphs = ["encode", *manifest.exits]
    own = layers_of_low_rank(stage / FP32, graphs)
    for name, variant in manifest.variants.items():
        check_variant(name, stage / "variants" / name, graphs, variant.items, own)
        check_exploration(name, stage / "variants" / name)
    path = stage / "manifest.json"
    path.unlink(missing_ok=True)
    files = {str(p.relative_to(stage)): sha256(p) for p in sorted(stage.rglob("*")) if p.is_file()}
    # servers before a member refuse it
    absent: dict[str, Any] = {"fields": {name: {"text"} for name, field in manifest.fields.items() if not field.text}}
    absent |= {name: True for name in ("prune", "update") if getattr(manifest, name) is None}
    path.write_text(manifest.model_copy(update={"files": files}).model_dump_json(indent=1, exclude=absent))
    loaded = load_bundle(stage)
    if loaded.refused:
        raise ManifestError(f"not served: {loaded.refused}")


def golden_scores(engine: Engine, stage: Path, manifest: Manifest) -> list[float]:
    """Return the weighted sums for the manifest's example, computed by the functions with which the server checks them.

    They are not divided by the sum of the weights, so bundles of all versions state the same quantity.
    """
    ranker = make_ranker(Files(stage, None), manifest)
    found = score_request(ranker, engine, RankRequest.model_validate(manifest.example))
    scores: list[float] = (found[manifest.default_exit] @ ranker.score_weights(None)).tolist()
    return scores


def quality_rows(report: Mapping[str, Any], exits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the rows of a report's tables that the manifest repeats, by exit."""
    return {
        exit: {table: report[table][exit] for table in ("leave_one_out", "slates") if exit in report.get(table, {})}
        for exit in exits
    }


def bytes_on_disk(folder: Path, graphs: Iterable[str], items: Path) -> int:
    """Return the size of the item table and of the graphs that a server loads."""
    return sum(path.stat().st_size for path in (items, *(folder / f"{graph}.onnx" for graph in graphs)))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")))
