"""Loads a bundle's folder into a `Ranker`, or refuses it with a reason.

These checks are made: the SHA-256 of every file, over the bytes that are used (`files.py`); shapes, dtypes and sizes of
the numbers; and, on this processor, the scores of each variant for the golden request of the manifest and for the
extreme rows of the tables (`probe.py`). A variant that fails is left out. If a whole version fails, the next older one
is loaded. The operators of the graphs are checked once, when the bundle is written (`slatewise_train/graph_check.py`).

Called by: `main.py`, `check.py`, `ranking/versions.py`, and the package slatewise_train. Calls: `manifest.py`,
`files.py`, `item_tables.py`, `probe.py`, `titles.py`, `inference/engine.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from slatewise.bundle.files import Files, WrongDigest, check_file, checked_path, strings
from slatewise.bundle.golden import check_golden, score_request
from slatewise.bundle.item_tables import FLOAT32, OF_VARIANTS, check_array, load_items, shared_table
from slatewise.bundle.manifest import (
    POSTERIOR,
    Manifest,
    ManifestError,
    NoSuchVariant,
    parse_manifest,
    read_manifest,
    read_manifest_bytes,
    versions,
)
from slatewise.bundle.probe import check_fields, extreme_rows, probe
from slatewise.bundle.ranker import Ranker, Vocabulary
from slatewise.bundle.signature import PublicKeys
from slatewise.bundle.titles import read_titles
from slatewise.inference.arrays import FIRST_ITEM, Float32
from slatewise.inference.engine import EXPLORE, Engine, EngineError, Step, at_once
from slatewise.inference.item_table import ItemTable
from slatewise.inference.timed_calls import time_calls
from slatewise.schemas import RankRequest

log = logging.getLogger("slatewise")

REQUIRED = (FLOAT32, "ids.json", "fields.npy")
MOST_EXAMPLES = 64
OPTIONAL = ("users.json", "meta_embeddings.npy", "report.json", "warmup.jsonl", "display.json", "examples.json")
USED = ("ids.json", "fields.npy", *OPTIONAL, "default_meta.npy")  # what `make_ranker` reads, beside an item table


# Versions


Lacking = Callable[[Manifest, Manifest], str | None]  # of an older and a newer version: why the newer one must wait


def load_rankers(
    root: Path,
    variants: tuple[str, ...] = (),
    keys: PublicKeys | None = None,
    lacking: Lacking = lambda older, newer: None,
) -> dict[str, Ranker]:
    """Load the newest valid version of each ranker below `root`, by name; `variants` and `keys` as in `load_bundle`.

    lacking: a version for which it has a reason is loaded only if no older one can be. Raises ManifestError if no
    bundle can be loaded, and NoSuchVariant if a ranker has none of `variants`.
    """
    rankers: dict[str, Ranker] = {}
    reasons = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
        for version in by_preference(folder, lacking):
            try:
                rankers[folder.name] = load_version(folder, version, variants, keys)
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


def by_preference(folder: Path, lacking: Lacking) -> list[int]:
    """Return the versions in a ranker's folder: the newest first, those that must wait last."""
    waiting = []
    numbers = versions(folder)
    for older, newer in pairwise(numbers):
        try:
            reason = lacking(read_manifest(folder / str(older)), read_manifest(folder / str(newer)))
        except ManifestError:  # the load will say why
            continue
        if reason:
            waiting.append(newer)
            log.warning("%s version %d waits: %s", folder.name, newer, reason)
    return [v for v in reversed(numbers) if v not in waiting] + waiting[::-1]


def load_version(
    folder: Path,
    version: int,
    variants: tuple[str, ...],
    keys: PublicKeys | None = None,
    step: Step = at_once,
) -> Ranker:
    """Load one version from a ranker's folder. Raises ManifestError if the manifest and the path differ."""
    ranker = load_bundle(folder / str(version), variants, keys, step)
    if (ranker.name, ranker.manifest.version) != (folder.name, version):
        raise ManifestError(f"{folder / str(version)} holds {ranker.name} version {ranker.manifest.version}")
    return ranker


def load_bundle(
    folder: Path,
    variants: tuple[str, ...] = (),
    keys: PublicKeys | None = None,
    step: Step = at_once,
) -> Ranker:
    """Load a bundle, with the variants that pass their checks.

    variants: names of the variants to load; empty: all. keys: one of them must have signed the bundle; none: it needs
    no signature. step: as in `Engine`. Raises NoSuchVariant if the bundle has none of the variants, and ManifestError
    if the bundle fails a check or every chosen variant is refused.
    """
    content = read_manifest_bytes(folder, keys)
    manifest = parse_manifest(content, folder)
    files = Files(folder, manifest.files, step)
    chosen = [name for name in manifest.variants if name in variants or not variants]
    if missing := [name for name in variants if name not in manifest.variants]:
        log.warning("%s: no variant %s; it has %s", folder, ", ".join(missing), ", ".join(manifest.variants))
    shared = shared_table({manifest.variants[name].items for name in chosen})
    check_files(folder, manifest, (*USED, shared))
    ranker = make_ranker(files, manifest, shared)
    ranker = dataclasses.replace(ranker, digest=hashlib.sha256(content).hexdigest())
    if not chosen:
        raise NoSuchVariant(
            f"{folder} has none of the variants {', '.join(variants)}; it has {', '.join(manifest.variants)}"
        )
    extremes = extreme_rows(ranker.items)
    tables = {shared: ranker.items}
    engines: dict[str, Engine] = {}
    refused: dict[str, str] = {}
    for name in chosen:
        try:
            check_variant_digests(manifest, name)
            table = manifest.variants[name].items
            if table not in tables:
                tables[table] = load_items(files, table, ranker.items.shape)
            engines[name] = load_variant(files, ranker, name, tables[table], step)
            probe(ranker, engines[name], extremes)
        except (ManifestError, EngineError, LookupError, ValueError) as error:
            engines.pop(name, None)
            refused[name] = str(error)
            log.error("%s: variant %s is not served: %s", folder, name, error)
    if not engines:
        raise ManifestError(f"{folder}: no variant can be served: {refused}")
    return dataclasses.replace(ranker, engines=engines, refused=refused)


# Files


def check_files(folder: Path, manifest: Manifest, used: tuple[str, ...] = ()) -> None:
    """Check the files that all variants share. `check_variant_files` checks the files of each variant.

    used: files whose digest is checked when they are read; they must only exist.
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
        if name in used:
            checked_path(folder, name)
        elif not name.startswith("variants/") and name not in OF_VARIANTS:
            check_file(folder, name, digest)


# Ranker


def make_ranker(files: Files, manifest: Manifest, table: str = FLOAT32) -> Ranker:
    """Build the ranker without engines. table: the file of its item table.

    Raises ManifestError for an unreadable file or an array of another shape.
    """
    folder = files.folder
    try:
        ids = strings(files.read("ids.json"))
        users = strings(files.read_optional("users.json") or b"[]") if manifest.meta_size else []
        report = files.read_json("report.json") or {}
        if not isinstance(report, dict):
            raise ValueError("report.json is of another shape")
        field_vectors = files.read_array("fields.npy")
        default_meta, embedded = load_meta(files, manifest, len(users))
        warmup = read_warmup(files.read_optional("warmup.jsonl") or b"")
        vocabulary = make_vocabulary(ids, manifest)
        titles = read_titles(files.read_optional("display.json"), vocabulary.items)
        examples = read_examples(files.read_json("examples.json"), manifest)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, WrongDigest):
            raise
        raise ManifestError(f"{folder}: {error}") from error
    items = load_items(files, table, (len(ids) + FIRST_ITEM, manifest.width))
    for name, array, shape in (
        ("fields.npy", field_vectors, (check_fields(manifest.fields), manifest.width)),
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


def load_meta(files: Files, manifest: Manifest, users: int) -> tuple[Float32, Float32]:
    """Load the default meta-embedding (M,) and those of the embedded store (users, M); empty arrays if M is 0."""
    if not manifest.meta_size:
        return np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    default = files.read_array("default_meta.npy")
    return default, files.read_array("meta_embeddings.npy") if users else np.zeros((0, manifest.meta_size), np.float32)


def read_warmup(content: bytes) -> list[RankRequest]:
    return [RankRequest.model_validate_json(line) for line in content.splitlines()]


def read_examples(bodies: Any, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the requests of demo users, the manifest's example first. Raises ValueError for an invalid request.

    bodies: the content of examples.json; `None` without the file.
    """
    bodies = [] if bodies is None else bodies
    if not isinstance(bodies, list) or len(bodies) > MOST_EXAMPLES:
        raise ValueError(f"examples.json is not a list of at most {MOST_EXAMPLES} requests")
    for body in bodies:
        RankRequest.model_validate(body)
    return [manifest.example, *(body for body in bodies if body != manifest.example)]


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


def load_variant(files: Files, ranker: Ranker, name: str, items: ItemTable, step: Step = at_once) -> Engine:
    """Load, check and warm up the engine of one variant. items: its table.

    Raises ManifestError or EngineError with the reason.
    """
    manifest = ranker.manifest
    graphs = check_variant_digests(manifest, name)
    posterior = load_posterior(files, manifest, name)
    if posterior is not None:
        graphs = (*graphs, EXPLORE)
    read = {manifest.variants[name].items, *(f"variants/{name}/{graph}.onnx" for graph in graphs)}
    for path in variant_files(manifest, name) - read - {f"variants/{name}/{POSTERIOR}"}:
        check_file(files.folder, path, manifest.files[path])
    contents = {graph: files.read(f"variants/{name}/{graph}.onnx") for graph in graphs}
    engine = Engine(contents, items, manifest.exits, step, manifest.limits.set_wise, posterior)
    check_golden(ranker, engine, name)
    for request in ranker.warmup:  # allocates memory now instead of during the first request
        score_request(ranker, engine, request)
    limits = manifest.limits
    time_calls(engine, limits.history_used, limits.set_wise, len(manifest.features), manifest.meta_size, step)
    return engine


def load_posterior(files: Files, manifest: Manifest, name: str) -> Float32 | None:
    """Load the (heads, D, D) factors for exploration; `None` if the variant has none. Raises ManifestError."""
    path = f"variants/{name}/{POSTERIOR}"
    if not files.exists(path):
        return None
    try:
        factors: Float32 = files.read_array(path)
    except (ValueError, EOFError) as error:
        raise ManifestError(f"{path}: {error}") from error
    check_array(path, factors, (len(manifest.heads), *(factors.shape[-1:] * 2)))
    return factors


def variant_files(manifest: Manifest, name: str) -> set[str]:
    """Return the files of a variant that have a digest, its own item table included."""
    table = manifest.variants[name].items
    tables: set[str] = set() if table == FLOAT32 else {table}  # `check_files` checks items.npy
    return {path for path in manifest.files if path.startswith(f"variants/{name}/") or path in tables}


def check_variant_digests(manifest: Manifest, name: str) -> tuple[str, ...]:
    """Return the graphs of the variant. Raises ManifestError if one of them, or its own item table, has no digest."""
    graphs = ("encode", *manifest.exits)
    table = manifest.variants[name].items
    expected = {f"variants/{name}/{graph}.onnx" for graph in graphs} | ({table} - {FLOAT32})
    if missing := expected - manifest.files.keys():
        raise ManifestError(f"the manifest has no digest of {', '.join(sorted(missing))}")
    return graphs


def check_variant_files(folder: Path, manifest: Manifest, name: str) -> None:
    """Raise ManifestError if a graph or the own item table of the variant is missing or has another digest."""
    check_variant_digests(manifest, name)
    for path in variant_files(manifest, name):
        check_file(folder, path, manifest.files[path])
