"""A ranker on disk becomes a ranker in memory, or is refused with a reason.

Before: a folder that `models/slatewise_train/export.py` published. After: `pipeline.py` ranks with it. Loading checks every digest, the
schema, and each variant's golden request on this processor: a variant that misses its bound is not served, the others
are; a version that cannot be loaded leaves the next older one serving.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from slatewise.bundle.graph_check import check_name
from slatewise.bundle.manifest import Manifest, ManifestError, NoSuchVariant, read_manifest
from slatewise.bundle.ranker import Ranker, Vocabulary
from slatewise.inference.arrays import (
    FIRST_ITEM,
    Float64,
)
from slatewise.inference.engine import Engine, EngineError
from slatewise.inference.item_table import Int8Items, record
from slatewise.schemas import RankRequest

log = logging.getLogger("slatewise")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


REQUIRED = ("items.npy", "ids.json", "fields.npy", "default_meta.npy")
SHARED = (*REQUIRED, "users.json", "meta_embeddings.npy", "report.json", "warmup.jsonl", "display.json")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises ManifestError where a file of the manifest is missing, leads out of the bundle, or has another digest.

    A variant's files are checked with the variant, items8.npy too.
    """
    for name in SHARED:
        if name not in manifest.files and (name in REQUIRED or (folder / name).exists()):
            raise ManifestError(f"the manifest has no digest of {name}")
    for name, digest in manifest.files.items():
        if not name.startswith("variants/") and name != "items8.npy":
            check_file(folder, name, digest)


def check_file(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise ManifestError(f"{name} leads out of the bundle")
    if not path.is_file():
        raise ManifestError(f"{name} is missing")
    if sha256(path) != digest:
        raise ManifestError(f"{name} does not have the manifest's sha256")


def load_variant(folder: Path, ranker: Ranker, name: str, threads: int) -> Engine:
    """One variant, warm, once it gives its golden scores. Raises ManifestError or EngineError with the reason."""
    manifest = ranker.manifest
    graphs = ["encode", *manifest.exits]
    table = manifest.variants[name].items
    own = set() if table == "items.npy" else {table}  # items.npy is checked with the bundle
    mine = {
        path: digest for path, digest in manifest.files.items() if path.startswith(f"variants/{name}/") or path in own
    }
    wanted = own | {f"variants/{name}/{graph}.onnx" for graph in graphs}
    if missing := wanted - mine.keys():
        raise ManifestError(f"the manifest has no digest of {', '.join(sorted(missing))}")
    for path, digest in mine.items():
        check_file(folder, path, digest)
    items = ranker.items if table == "items.npy" else load_int8_items(folder / table, ranker.items.shape)
    check_name(name, folder / "variants" / name, graphs, isinstance(items, Int8Items))
    engine = Engine(folder / "variants" / name, items, manifest.exits, threads)
    found = score_request(ranker, engine, RankRequest.model_validate(manifest.example))  # finite, or an EngineError
    for exit, probabilities in found.items():
        if probabilities.shape != (len(manifest.example["candidates"]["item_ids"]), len(manifest.heads)):
            raise ManifestError(f"exit {exit} does not give a probability for each candidate and head")
    scores = found[manifest.default_exit] @ ranker.score_weights(None)
    golden = manifest.variants[name]
    worst = float(np.abs(scores - np.array(golden.golden_scores)).max())
    bound = golden.golden_bound or golden.bound
    if not worst <= bound:
        raise ManifestError(f"golden scores differ by {worst:.2e} on this processor, bound {bound:.0e}")
    for request in ranker.warmup:  # so that the first client finds memory at its size
        for multi_threaded in (False, True) if engine.multi_threaded else (False,):
            score_request(ranker, engine, request, multi_threaded)
    return engine


def load_int8_items(path: Path, shape: tuple[int, ...]) -> Int8Items:
    try:
        records = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{path}: {error}") from error
    if records.dtype != record(shape[1]) or records.shape != shape[:1]:
        raise ManifestError(
            f"{path.name} is {records.dtype} {records.shape}, expected {shape[0]} records of {record(shape[1])}"
        )
    if not (np.isfinite(records["scale"]).all() and np.isfinite(records["middle"]).all()):
        raise ManifestError(f"{path.name} holds a number that is not finite")
    return Int8Items(records)


def score_request(
    ranker: Ranker, engine: Engine, request: RankRequest, multi_threaded: bool = False
) -> dict[str, Float64]:
    """(N, heads) probabilities by exit, the slow, obvious way, with the embedded store's vector."""
    history, _ = ranker.history(request)
    candidates, _ = ranker.candidates(request, request.request_time or 0.0, engine.items)
    meta = ranker.embedded_meta_of(request.user)
    return {exit: engine.score(history, candidates, meta, exit, multi_threaded) for exit in ranker.manifest.exits}


def make_ranker(folder: Path, manifest: Manifest) -> Ranker:
    """The bundle without its variants. Raises ManifestError where an array is not what the manifest says."""
    try:
        items = np.asarray(
            np.load(folder / "items.npy", mmap_mode="r", allow_pickle=False)
        )  # the map, without np.memmap's slow indexing
        ids = read_json(folder / "ids.json")
        field_vectors = np.load(folder / "fields.npy", allow_pickle=False)
        default_meta = np.load(folder / "default_meta.npy", allow_pickle=False)
        users = read_json(folder / "users.json") or []
        embedded = (
            np.load(folder / "meta_embeddings.npy", mmap_mode="r", allow_pickle=False)
            if users
            else np.zeros((0, manifest.meta_size), np.float32)
        )
        report = read_json(folder / "report.json") or {}
        if not isinstance(report, dict) or not all(
            isinstance(names, list) and all(isinstance(n, str) for n in names) for names in (ids, users)
        ):
            raise ValueError("ids.json, users.json or report.json is of another shape")
        lines = (folder / "warmup.jsonl").read_text().splitlines() if (folder / "warmup.jsonl").exists() else []
        warmup = [RankRequest.model_validate_json(line) for line in lines]
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{folder}: {error}") from error
    expected = {
        "items.npy": (items, (len(ids) + FIRST_ITEM, manifest.width)),
        "fields.npy": (field_vectors, (sum(len(f.values) + 1 for f in manifest.fields.values()), manifest.width)),
        "default_meta.npy": (default_meta, (manifest.meta_size,)),
        "meta_embeddings.npy": (embedded, (len(users), manifest.meta_size)),
    }
    for name, (array, shape) in expected.items():
        if array.dtype != np.float32 or array.shape != shape:
            raise ManifestError(f"{folder}: {name} is {array.dtype} {array.shape}, expected float32 {shape}")
        if not np.isfinite(array).all():
            raise ManifestError(f"{folder}: {name} holds a number that is not finite")
    return Ranker(
        manifest=manifest,
        vocabulary=Vocabulary(
            items=dict(zip(ids, range(FIRST_ITEM, len(ids) + FIRST_ITEM), strict=True)),
            actions={name: k + 1 for k, name in enumerate(manifest.actions)},
            fields={name: {v: f.offset + k + 1 for k, v in enumerate(f.values)} for name, f in manifest.fields.items()},
        ),
        items=items,
        field_vectors=field_vectors,
        field_offsets={name: f.offset for name, f in manifest.fields.items()},
        default_meta=default_meta,
        embedded_meta=embedded,
        embedded_users={user: k for k, user in enumerate(users)},
        engines={},
        refused={},
        report=report,
        warmup=warmup,
    )


def load_bundle(folder: Path, threads: int, variants: tuple[str, ...] = ()) -> Ranker:
    """With these of its variants, or all. Raises ManifestError where it cannot be trusted or none of them can be served."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    ranker = make_ranker(folder, manifest)
    chosen = [name for name in manifest.variants if name in variants or not variants]
    if missing := [name for name in variants if name not in manifest.variants]:
        log.warning("%s: no variant %s; it has %s", folder, ", ".join(missing), ", ".join(manifest.variants))
    if not chosen:
        raise NoSuchVariant(
            f"{folder} has none of the variants {', '.join(variants)}; it has {', '.join(manifest.variants)}"
        )
    for name in chosen:
        try:
            ranker.engines[name] = load_variant(folder, ranker, name, threads)
        except (ManifestError, EngineError, LookupError, ValueError) as error:
            ranker.refused[name] = str(error)
            log.error("%s: variant %s is not served: %s", folder, name, error)
    if not ranker.engines:
        raise ManifestError(f"{folder}: no variant can be served: {ranker.refused}")
    return ranker


def versions(folder: Path) -> list[int]:
    """The versions of one ranker's folder, ascending."""
    return sorted(int(v.name) for v in folder.glob("*") if v.is_dir() and v.name.isdecimal() and v.name.isascii())


def load_rankers(root: Path, threads: int = 1, variants: tuple[str, ...] = ()) -> dict[str, Ranker]:
    """The newest version of each ranker that can be loaded, with these of its variants or all.

    Raises ManifestError where there is none at all, or a ranker has none of these variants.
    """
    rankers: dict[str, Ranker] = {}
    reasons = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
        for version in reversed(versions(folder)):
            try:
                ranker = load_bundle(folder / str(version), threads, variants)
                if (ranker.name, ranker.manifest.version) != (folder.name, version):
                    raise ManifestError(
                        f"{folder / str(version)} holds {ranker.name} version {ranker.manifest.version}"
                    )
                rankers[folder.name] = ranker
                break
            except NoSuchVariant:
                raise
            except ManifestError as error:
                reasons.append(str(error))
                log.error("not served: %s", error)
    if not rankers:
        raise ManifestError(f"{root}: no bundle can be served; make one with `make train`. {' '.join(reasons)}")
    return rankers
