"""Loads a bundle's folder into a `Ranker`, or refuses it with a reason.

Three checks are made: the SHA-256 of every file, the shapes and dtypes that the manifest declares, and the scores of
each variant for the golden request of the manifest, on this processor. A variant that fails is left out. If a whole
version fails, the next older one is loaded. The operators of the graphs are checked once, when the bundle is written
(`slatewise_train/graph_check.py`).

Called by: `main.py`, `check.py`, and the package slatewise_train. Calls: `manifest.py`, `titles.py`,
`inference/engine.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slatewise.bundle.manifest import Manifest, ManifestError, NoSuchVariant, read_manifest, versions
from slatewise.bundle.ranker import Ranker, Vocabulary
from slatewise.bundle.signature import PublicKeys
from slatewise.bundle.titles import read_titles
from slatewise.inference.arrays import FIRST_ITEM, Float32, Float64
from slatewise.inference.engine import Engine, EngineError
from slatewise.inference.item_table import Int8Items, record
from slatewise.schemas import RankRequest

log = logging.getLogger("slatewise")

REQUIRED = ("items.npy", "ids.json", "fields.npy")
MOST_EXAMPLES = 64
OPTIONAL = ("users.json", "meta_embeddings.npy", "report.json", "warmup.jsonl", "display.json", "examples.json")


# Versions


def load_rankers(
    root: Path, threads: int = 1, variants: tuple[str, ...] = (), keys: PublicKeys | None = None
) -> dict[str, Ranker]:
    """Load the newest valid version of each ranker below `root`, by name; `variants` and `keys` as in `load_bundle`.

    Raises ManifestError if no bundle can be loaded, and NoSuchVariant if a ranker has none of `variants`.
    """
    rankers: dict[str, Ranker] = {}
    reasons = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
        for version in reversed(versions(folder)):
            try:
                rankers[folder.name] = load_version(folder, version, threads, variants, keys)
                break
            except NoSuchVariant:
                raise
            except ManifestError as error:
                reasons.append(str(error))
                log.error("not served: %s", error)
    if not rankers:
        make = "make one with `slatewise train`, then `slatewise export`"
        raise ManifestError(f"{root}: no bundle can be served; {make}. {' '.join(reasons)}")
    return rankers


def load_version(
    folder: Path, version: int, threads: int, variants: tuple[str, ...], keys: PublicKeys | None = None
) -> Ranker:
    """Load one version from a ranker's folder. Raises ManifestError if the manifest and the path differ."""
    ranker = load_bundle(folder / str(version), threads, variants, keys)
    if (ranker.name, ranker.manifest.version) != (folder.name, version):
        raise ManifestError(f"{folder / str(version)} holds {ranker.name} version {ranker.manifest.version}")
    return ranker


def load_bundle(folder: Path, threads: int, variants: tuple[str, ...] = (), keys: PublicKeys | None = None) -> Ranker:
    """Load a bundle, with the variants that pass their checks.

    variants: names of the variants to load; empty: all. keys: one of them must have signed the bundle; none: it needs
    no signature. Raises NoSuchVariant if the bundle has none of them, and
    ManifestError if the bundle fails a check or every chosen variant is refused.
    """
    manifest = read_manifest(folder, keys)
    check_files(folder, manifest)
    ranker = make_ranker(folder, manifest)
    chosen = [name for name in manifest.variants if name in variants or not variants]
    if missing := [name for name in variants if name not in manifest.variants]:
        log.warning("%s: no variant %s; it has %s", folder, ", ".join(missing), ", ".join(manifest.variants))
    if not chosen:
        raise NoSuchVariant(
            f"{folder} has none of the variants {', '.join(variants)}; it has {', '.join(manifest.variants)}"
        )
    engines: dict[str, Engine] = {}
    refused: dict[str, str] = {}
    for name in chosen:
        try:
            engines[name] = load_variant(folder, ranker, name, threads)
        except (ManifestError, EngineError, LookupError, ValueError) as error:
            refused[name] = str(error)
            log.error("%s: variant %s is not served: %s", folder, name, error)
    if not engines:
        raise ManifestError(f"{folder}: no variant can be served: {refused}")
    return dataclasses.replace(ranker, engines=engines, refused=refused)


# Files


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file; `None` if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else None


def map_array(path: Path) -> NDArray[Any]:
    """Map the array of an .npy file into memory, as an ndarray: np.memmap is slow to index. Pickles are refused."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check the files that all variants share. `check_variant_files` checks the files of each variant.

    Raises ManifestError if a file has no digest in the manifest, and the errors of `check_file`.
    """
    required = [*REQUIRED]
    if manifest.meta_size:
        required.append("default_meta.npy")
    if manifest.model:
        required.append(manifest.model.weights)
    for name in (*required, *(name for name in OPTIONAL if (folder / name).exists())):
        if name not in manifest.files:
            raise ManifestError(f"the manifest has no digest of {name}")
    for name, digest in manifest.files.items():
        if not name.startswith("variants/") and name != "items8.npy":
            check_file(folder, name, digest)


def check_file(folder: Path, name: str, digest: str) -> None:
    """Raise ManifestError if a file is missing, is a symbolic link, lies outside the bundle, or has another SHA-256."""
    path = folder / name
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise ManifestError(f"{name} leads out of the bundle")
    if not path.is_file():
        raise ManifestError(f"{name} is missing")
    if sha256(path) != digest:
        raise ManifestError(f"{name} does not have the manifest's sha256")


# Ranker


def make_ranker(folder: Path, manifest: Manifest) -> Ranker:
    """Build the ranker without engines. Raises ManifestError for an unreadable file or an array of another shape."""
    try:
        ids = read_json(folder / "ids.json")
        users = (read_json(folder / "users.json") or []) if manifest.meta_size else []
        report = read_json(folder / "report.json") or {}
        if not isinstance(report, dict) or not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names) for names in (ids, users)
        ):
            raise ValueError("ids.json, users.json or report.json is of another shape")
        items = map_array(folder / "items.npy")
        field_vectors = np.load(folder / "fields.npy", allow_pickle=False)
        default_meta, embedded = load_meta(folder, manifest, len(users))
        warmup = read_warmup(folder / "warmup.jsonl")
        vocabulary = make_vocabulary(ids, manifest)
        titles = read_titles(folder / "display.json", vocabulary.items)
        examples = read_examples(folder / "examples.json", manifest)
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{folder}: {error}") from error
    field_rows = sum(len(field.values) + 1 for field in manifest.fields.values())
    for name, array, shape in (
        ("items.npy", items, (len(ids) + FIRST_ITEM, manifest.width)),
        ("fields.npy", field_vectors, (field_rows, manifest.width)),
        ("default_meta.npy", default_meta, (manifest.meta_size,)),
        ("meta_embeddings.npy", embedded, (len(users), manifest.meta_size)),
    ):
        check_array(f"{folder}: {name}", array, shape)
    return Ranker(
        manifest=manifest,
        vocabulary=vocabulary,
        items=items,
        field_vectors=field_vectors,
        field_offsets={name: field.offset for name, field in manifest.fields.items()},
        default_meta=default_meta,
        embedded_meta=embedded,
        embedded_users={user: row for row, user in enumerate(users)},
        engines={},
        refused={},
        report=report,
        warmup=warmup,
        titles=titles,
        examples=examples,
    )


def load_meta(folder: Path, manifest: Manifest, users: int) -> tuple[Float32, Float32]:
    """Load the default meta-embedding (M,) and those of the embedded store (users, M); empty arrays if M is 0."""
    if not manifest.meta_size:
        return np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    default = np.load(folder / "default_meta.npy", allow_pickle=False)
    embedded = map_array(folder / "meta_embeddings.npy") if users else np.zeros((0, manifest.meta_size), np.float32)
    return default, embedded


def read_warmup(path: Path) -> list[RankRequest]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [RankRequest.model_validate_json(line) for line in lines]


def read_examples(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Read the requests of demo users, the manifest's example first. Raises ValueError for an invalid request."""
    bodies = read_json(path) if path.exists() else []
    if not isinstance(bodies, list) or len(bodies) > MOST_EXAMPLES:
        raise ValueError(f"{path.name} is not a list of at most {MOST_EXAMPLES} requests")
    for body in bodies:
        RankRequest.model_validate(body)
    return [manifest.example, *(body for body in bodies if body != manifest.example)]


def check_array(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise ManifestError unless the array is float32, has this shape, and is finite."""
    if array.dtype != np.float32 or array.shape != shape:
        raise ManifestError(f"{name} is {array.dtype} {array.shape}, expected float32 {shape}")
    if not np.isfinite(array).all():
        raise ManifestError(f"{name} holds a number that is not finite")


def make_vocabulary(ids: list[str], manifest: Manifest) -> Vocabulary:
    return Vocabulary(
        items={item: row for row, item in enumerate(ids, FIRST_ITEM)},
        actions={action: row for row, action in enumerate(manifest.actions, 1)},
        fields={
            name: {value: row for row, value in enumerate(field.values, field.offset + 1)}
            for name, field in manifest.fields.items()
        },
    )


# Variants


def load_variant(folder: Path, ranker: Ranker, name: str, threads: int) -> Engine:
    """Load, check and warm up the engine of one variant. Raises ManifestError or EngineError with the reason."""
    manifest = ranker.manifest
    table = manifest.variants[name].items
    check_variant_files(folder, manifest, name)
    items = ranker.items if table == "items.npy" else load_int8_items(folder / table, ranker.items.shape)
    engine = Engine(folder / "variants" / name, items, manifest.exits, threads)
    check_golden(ranker, engine, name)
    for request in ranker.warmup:  # allocates memory now instead of during the first request
        for multi_threaded in (False, True) if engine.multi_threaded else (False,):
            score_request(ranker, engine, request, multi_threaded)
    return engine


def check_variant_files(folder: Path, manifest: Manifest, name: str) -> None:
    """Raise ManifestError if a graph or the int8 item table of the variant is missing or has another digest."""
    table = manifest.variants[name].items
    tables: set[str] = set() if table == "items.npy" else {table}  # `check_files` checks items.npy
    prefix = f"variants/{name}/"
    files = {path: digest for path, digest in manifest.files.items() if path.startswith(prefix) or path in tables}
    expected = tables | {f"{prefix}{graph}.onnx" for graph in ("encode", *manifest.exits)}
    if missing := expected - files.keys():
        raise ManifestError(f"the manifest has no digest of {', '.join(sorted(missing))}")
    for path, digest in files.items():
        check_file(folder, path, digest)


def load_int8_items(path: Path, shape: tuple[int, ...]) -> Int8Items:
    """Load the int8 item table; `shape` is that of the float32 table. Raises ManifestError if they do not match."""
    try:
        records = map_array(path)
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{path}: {error}") from error
    if records.dtype != record(shape[1]) or records.shape != shape[:1]:
        raise ManifestError(
            f"{path.name} is {records.dtype} {records.shape}, expected {shape[0]} records of {record(shape[1])}"
        )
    if not (np.isfinite(records["scale"]).all() and np.isfinite(records["middle"]).all()):
        raise ManifestError(f"{path.name} holds a number that is not finite")
    return Int8Items(records)


def check_golden(ranker: Ranker, engine: Engine, name: str) -> None:
    """Score the golden request. Raises ManifestError if a weighted sum differs by more than the golden bound."""
    manifest = ranker.manifest
    variant = manifest.variants[name]
    found = score_request(ranker, engine, RankRequest.model_validate(manifest.example))
    expected = (len(manifest.example["candidates"]["item_ids"]), len(manifest.heads))
    for exit, probabilities in found.items():
        if probabilities.shape != expected:
            raise ManifestError(f"exit {exit} does not give a probability for each candidate and head")
    scores = found[manifest.default_exit] @ ranker.score_weights(None)
    worst = float(np.abs(scores - np.array(variant.golden_scores)).max())
    bound = variant.golden_bound or variant.bound
    if not worst <= bound:
        raise ManifestError(f"golden scores differ by {worst:.2e} on this processor, bound {bound:.0e}")


def score_request(
    ranker: Ranker, engine: Engine, request: RankRequest, multi_threaded: bool = False
) -> dict[str, Float64]:
    """Return the (N, heads) probabilities by exit, from `Engine.score` with the embedded store's meta-embedding."""
    history = ranker.history(request)
    candidates, _ = ranker.candidates(request, request.request_time or 0.0, engine.items)
    meta = ranker.embedded_meta_of(request.user)
    return {exit: engine.score(history, candidates, meta, exit, multi_threaded) for exit in ranker.manifest.exits}
