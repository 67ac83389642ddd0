"""A bundle becomes its next version with more variants: python -m slatewise_train.compress models/bundles/movielens models/movielens.toml

A variant's name says what it is: `lowrank` or `student`, then `int8`, then `tables8`, each or none. It is made of the bundle's own weights,
learns from fp32 again where `--epochs` says so, is calibrated anew, measured against fp32 on the same held-out cases and held to its
bound. Published is what is within the quality gate and on the front of quality, time and size; the report tells of all.
Without a TOML, which names the data, nothing is known of quality: nobody learns, the calibration is fp32's, nothing is gated, and size
and time are what there is to see.

Before: `export.py` or `reference.py` published fp32. After: `app/slatewise/bundle/loader.py` loads what was published; the default is the fastest.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from slatewise.bundle.features import request_context
from slatewise_train.compression.graph_check import name_parts
from slatewise.bundle.loader import load_bundle, sha256, versions
from slatewise.bundle.manifest import Variant, read_manifest
from slatewise.inference.arrays import FIRST_ITEM, Candidates, History
from slatewise.inference.engine import HISTORY_CHUNK, Engine
from slatewise.inference.item_table import Int8Items, ItemTable
from slatewise.process import cpu_name
from slatewise.settings import listed
from slatewise_train.compression.distill import DistillConfig, digest_weights, distill
from slatewise_train.compression.item_quantization import middle_max
from slatewise_train.compression.low_rank import (
    METHODS,
    Layer,
    LayerStatistics,
    allocate,
    collect_statistics,
    dense_layers,
    factor,
    layer_of,
    spectrum,
    timed_layer,
)
from slatewise_train.compression.quantize import FULL_BITS, SAFE_BITS, observe, quantize
from slatewise_train.compression.source import restore
from slatewise_train.compression.student import half, shrink
from slatewise_train.data import from_table, read_config
from slatewise_train.evaluation import parity as invariance
from slatewise_train.evaluation.offline import Outcome, difference, run_cases, slate_cases, tabulate
from slatewise_train.export import (
    FP32_BOUND,
    bytes_on_disk,
    fit_calibrations,
    golden_scores,
    measure_latency,
    quality_rows,
    staging,
    write_graphs,
    write_json,
)
from slatewise_train.rankers.base import Calibration, uncalibrated
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.rankers.ligr_onnx import LigrGraphs
from slatewise_train.train import Data, TrainConfig, Trainer, epoch_windows, load_data, make_batch

LEAST_INTEGER_BOUND = 1e-4  # also where nothing moved: few requests meet a value beside a rounding step, and one that does was seen to move a score by 2e-5
INTEGER_BOUND = (
    2e-3  # at most: a value beside a rounding step may take the other side where sums are done in another order
)
SAMPLES = 120
SLATE = 200  # half of them for ranges, half for agreement
SEEN_BATCHES = 40
GATE = 0.99  # of fp32's NDCG@10
NAMES = ("int8", "int8-tables8", "lowrank", "lowrank-int8", "student", "student-int8", "student-int8-tables8")

Calibrations = dict[str, list[Calibration]]


@dataclass(frozen=True)
class Options:
    """How variants are made, whatever their names."""

    method: str = "afm"  # of low rank
    share: float = 0.5  # of the dense layers' cost that low rank may keep
    budget: str = "size"  # what that cost is: numbers, or measured time
    shape: dict[str, int] = field(default_factory=dict)  # of the student; empty: `student.half`
    distill: DistillConfig | None = None  # what `lowrank` and `student` learn from fp32; None: nothing
    bits: int = SAFE_BITS  # of int8 weights
    checkpoints: Path = Path("build/compress")


@dataclass(frozen=True)
class Recipe:
    """What a variant's name says."""

    base: str  # fp32, lowrank or student
    integers: bool
    int8_items: bool

    @classmethod
    def named(cls, name: str) -> Recipe:
        """Raises ValueError for what is no name of a variant, or fp32's."""
        parts = name_parts(name)
        if parts == ["fp32"]:
            raise ValueError("fp32 is what variants are made of")
        return cls(parts[0] if parts[0] in ("lowrank", "student") else "fp32", "int8" in parts, "tables8" in parts)

    @property
    def most(self) -> float:
        """That a bound may be, and what the golden scores are held to on any processor."""
        return INTEGER_BOUND if self.integers else FP32_BOUND


@dataclass(frozen=True)
class Sample:
    """A request to calibrate by."""

    history: History
    rows: np.ndarray  # of its candidates
    numeric: np.ndarray
    context: np.ndarray
    meta: np.ndarray

    def candidates(self, items: ItemTable) -> Candidates:
        return Candidates(items.take(self.rows, axis=0), self.numeric, self.context)

    def score(self, engine: Engine, exit: str) -> np.ndarray:
        """(N, heads)"""
        return engine.score(self.history, self.candidates(engine.items), self.meta, exit)


class Recorder(Engine):
    """Keeps what each graph is given."""

    def __init__(self, *arguments: Any) -> None:
        self.feeds: dict[str, list[dict[str, np.ndarray]]] = {}
        super().__init__(*arguments)

    def run(self, graph: str, feeds: dict[str, np.ndarray], multi_threaded: bool = False) -> dict[str, np.ndarray]:
        self.feeds.setdefault(graph, []).append(feeds)
        return super().run(graph, feeds, multi_threaded)


class Source:
    """The bundle that is compressed, and the data that says what a variant loses; `most_users` bounds leave-one-out, for tests."""

    def __init__(
        self, folder: Path, data: Data | None, train: TrainConfig | None = None, most_users: int | None = None
    ) -> None:
        self.folder = folder
        self.data = data
        self.train = train or TrainConfig()
        self.most_users = most_users
        self.manifest = read_manifest(folder)
        self.items = np.load(folder / "items.npy")
        if data is not None and len(self.items) != len(data.catalogue.numeric):
            raise ValueError(
                f"{folder} has {len(self.items)} rows of items, the data {len(data.catalogue.numeric)}: other data than it was trained on"
            )
        self.model, self.calibrations = restore(folder)
        self.meta = np.load(folder / "default_meta.npy")
        self.vectors = np.load(folder / "meta_embeddings.npy")
        self.exact = self.engine(folder / "variants/fp32")
        self.samples = list(self.draw_samples())

    def engine(self, folder: Path, items: ItemTable | None = None) -> Engine:
        return Engine(folder, self.items if items is None else items, self.manifest.exits, 1)

    def draw_samples(self) -> Iterator[Sample]:
        """Of the validation users among random items where there is data, else drawn; vectors of the bundle's users."""
        draw = invariance.Requests(self.exact, self.manifest, 0)
        metas = itertools.cycle([self.meta, *self.vectors[:SAMPLES]])
        if self.data is not None and len(self.data.split.validation_users):
            for case in slate_cases(self.data, self.data.split.validation_users)[:SAMPLES]:
                among = draw.rng.integers(FIRST_ITEM, len(self.items), max(1, SLATE - len(case.upcoming)))
                rows = np.concatenate([case.upcoming, among])
                yield Sample(
                    case.history, rows, self.data.catalogue.numeric[rows], request_context(case.time)[None], next(metas)
                )
            return
        for length in draw.rng.integers(1, self.manifest.limits.history_used, SAMPLES // 3):
            history = draw.history(min(int(length), 2 * HISTORY_CHUNK))
            rows = draw.rng.integers(FIRST_ITEM, len(self.items), SLATE)
            late = draw.candidates(SLATE)
            yield Sample(history, rows, late.numeric, late.context, next(metas))

    def run_cases(self, engine: Engine) -> Outcome | None:
        return None if self.data is None else run_cases(engine, self.data, self.meta, self.most_users, baselines=False)

    @cached_property
    def outcome(self) -> Outcome | None:
        """Of fp32."""
        return self.run_cases(self.exact)

    def trainer(self) -> Trainer:
        assert self.data is not None
        return Trainer(self.data, {}, self.train, model=self.model)

    @cached_property
    def seen(self) -> dict[str, LayerStatistics]:
        return collect_statistics(self.model, self.losses)

    def losses(self) -> Iterator[Tensor]:
        """What low rank looks at: the training loss where there is data, else the size of the logits on drawn requests."""
        torch.manual_seed(0)
        if self.data is not None:
            trainer = self.trainer()
            rng = np.random.default_rng(0)
            self.model.eval()
            windows = epoch_windows(
                self.data.split.train_lengths, self.manifest.limits.history_used, self.train.batch_events, rng
            )
            for batch in itertools.islice(windows, SEEN_BATCHES):
                yield trainer.loss(make_batch(self.data.sequences, batch), ladder=True)
            return
        for sample in self.samples:
            found = invariance.logits_of(
                self.model, self.items, sample.history, sample.candidates(self.items), sample.meta
            )
            yield sum((value.square().mean() for value in found.values()), torch.zeros(()))


@dataclass(frozen=True)
class Base:
    """A ranker that variants are made of: fp32's own weights, fewer of them, or a student's."""

    model: Ligr
    ranks: dict[str, int | None] = field(default_factory=dict)  # of low rank


def checkpoints_of(source: Source, options: Options) -> Path:
    return options.checkpoints / source.manifest.ranker / str(source.manifest.version)


def make_base(source: Source, kind: str, options: Options) -> Base:
    if kind == "fp32":
        return Base(source.model)
    folder = checkpoints_of(source, options)
    if kind == "student":
        shape = options.shape or half(source.model.config)
        checkpoint = folder / f"student,{','.join(f'{name}={value}' for name, value in sorted(shape.items()))}.pt"
        base = Base(shrink(source.model, shape))
    else:
        checkpoint = folder / f"lowrank,{options.method},{options.share:g},{options.budget}.pt"
        base = low_rank_base(source, options, checkpoint.with_suffix(".json"))
    if options.distill is not None and source.data is not None:
        distill(
            base.model,
            source.trainer(),
            np.concatenate([source.vectors, source.meta[None]]),
            options.distill,
            checkpoint,
        )
    return base


def low_rank_base(source: Source, options: Options, known: Path) -> Base:
    """`known` keeps the ranks: measured times differ from run to run, and what was stopped is to go on. Raises ValueError where nothing saves."""
    if known.exists():
        ranks: dict[str, int | None] = json.loads(known.read_text())
    else:
        layers = dict[str, Layer]()
        for name, layer in dense_layers(source.model).items():
            weight = layer.weight.detach().double()
            curve = spectrum(options.method, weight, source.seen[name])
            layers[name] = layer_of(curve, weight) if options.budget == "size" else timed_layer(curve, weight)
        ranks = allocate(layers, options.share * sum(layer.whole for layer in layers.values()))
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, ranks)
    if not any(ranks.values()):
        raise ValueError(f"low rank would save nothing at a share of {options.share:g} ({options.budget})")
    return Base(factor(source.model, source.seen, options.method, ranks), ranks)


def draft(
    source: Source, recipe: Recipe, base: Base, items: ItemTable, stage: Path, bits: int = SAFE_BITS
) -> tuple[dict[str, onnx.ModelProto], Calibrations]:
    """A variant as graphs, before anything is measured: weights, integers, then a calibration of its own; `stage` is scratch."""
    longest = max(source.manifest.limits.history_used, HISTORY_CHUNK)
    plain = LigrGraphs(base.model, uncalibrated(source.manifest.exits, len(source.manifest.heads)), longest).all()
    ranges: dict[str, dict[str, tuple[float, float]]] = {}
    if recipe.integers:
        write_graphs(stage, plain)
        recorder = Recorder(stage, items, source.manifest.exits, 1)
        for sample in source.samples[::2]:
            sample.score(recorder, source.manifest.exits[-1])
        ranges = {name: observe(graph, recorder.feeds[name]) for name, graph in plain.items() if name in recorder.feeds}

    def finish(graphs: dict[str, onnx.ModelProto]) -> dict[str, onnx.ModelProto]:
        return {
            name: quantize(graph, ranges[name], bits) if name in ranges else graph for name, graph in graphs.items()
        }

    calibrations = source.calibrations
    if source.data is not None:
        write_graphs(stage, finish(plain))
        calibrations = fit_calibrations(source.engine(stage, items), source.data, source.meta)
    return finish(LigrGraphs(base.model, calibrations, longest).all()), calibrations


def measured_once(source: Source, stage: Path, name: str, options: Options, base: Base) -> Variant:
    """`measure`, or what it found when it was stopped after this variant: kept beside the checkpoints, with a digest of all that went in."""
    kept = checkpoints_of(source, options) / name
    folder = stage / "variants" / name
    digest = hashlib.sha256(
        repr(
            (
                name,
                options.bits,
                SAMPLES,
                source.most_users,
                cpu_name(),
                source.data and source.data.split.train_lengths.tolist(),
            )
        ).encode()
    )
    digest.update(sha256(source.folder / "manifest.json").encode())
    digest_weights(digest, base.model)
    if (kept / "digest").exists() and (kept / "digest").read_text() == digest.hexdigest():
        shutil.copytree(kept / "graphs", folder)
        return Variant.model_validate_json((kept / "variant.json").read_text())
    variant = measure(source, stage, name, options, base)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept / "graphs")
    (kept / "variant.json").write_text(variant.model_dump_json())
    (kept / "digest").write_text(digest.hexdigest())  # last: without it nothing counts
    return variant


def measure(source: Source, stage: Path, name: str, options: Options, base: Base) -> Variant:
    """A variant's row of the manifest, but for its times. Raises ValueError where it misses its bound."""
    recipe = Recipe.named(name)
    folder = stage / "variants" / name
    manifest = source.manifest
    table = "items8.npy" if recipe.int8_items else "items.npy"
    items = open_items(stage / table)
    graphs, calibrations = draft(source, recipe, base, items, stage / "draft", options.bits)
    write_graphs(folder, graphs)
    engine = source.engine(folder, items)
    measured = invariance.measure(engine, manifest, base.model, calibrations)
    if recipe.integers:
        del measured["onnx_against_torch"]  # `agreement` says how far the integers are
    check_bounds(name, measured, recipe.most)
    outcome = source.run_cases(engine)
    return Variant(
        items=table,
        bytes=bytes_on_disk(folder, list(manifest.graphs), stage / table),
        bound=max(round_bound(measured), LEAST_INTEGER_BOUND if recipe.integers else FP32_BOUND),
        golden_bound=recipe.most,
        invariance=invariance.rounded(measured),
        quality={} if outcome is None else quality_rows(tabulate(outcome), manifest.exits),
        latency_ms={},
        agreement=agreement(source, engine),
        difference={}
        if outcome is None or source.outcome is None
        else difference(outcome, source.outcome, manifest.default_exit),
        within_gate=None
        if outcome is None or source.outcome is None
        else within_gate(manifest.default_exit, outcome, source.outcome),
        resident_bytes=resident_bytes(folder, stage / table, manifest.exits),
        golden_scores=golden_scores(engine, stage, manifest),
    )


def round_bound(measured: dict[str, float]) -> float:
    """The printed bound: twice the worst that was measured, rounded up to 1, 2 or 5 times a power of ten, at least fp32's."""
    worst = 2 * max(value for what, value in measured.items() if what not in invariance.OPTIONS)
    steps = (float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 2, 5))
    return next(step for step in steps if worst <= step)


def check_bounds(name: str, measured: dict[str, float], bound: float) -> None:
    """Raises ValueError where something that must not change a score changes it by more than half of the bound."""
    if failed := {
        what: value for what, value in measured.items() if what not in invariance.OPTIONS and not value <= bound / 2
    }:
        raise ValueError(f"{name} is above half of its bound {bound}: {failed}")


def agreement(source: Source, engine: Engine) -> dict[str, float]:
    """With fp32 at the default exit, over the samples that no range was taken from."""
    exit = source.manifest.default_exit
    taus = []
    overlaps = []
    largest = 0.0
    weights = np.array(list(source.manifest.heads.values()))
    for sample in source.samples[1::2]:
        exact, found = (sample.score(one, exit) @ weights for one in (source.exact, engine))
        first, second = (np.sign(scores[:, None] - scores) for scores in (exact, found))
        taus.append(float((first * second).sum() / max(1, np.abs(first).sum())))
        best = [set(np.argsort(-scores, kind="stable")[:10].tolist()) for scores in (exact, found)]
        overlaps.append(len(best[0] & best[1]) / min(10, len(exact)))
        largest = max(largest, float(np.abs(found - exact).max()))
    return {
        "kendall_tau": round(fmean(taus), 5),
        "top10_overlap": round(fmean(overlaps), 4),
        "largest_score_difference": round(largest, 6),
    }


def resident_bytes(folder: Path, table: Path, exits: list[str]) -> int:
    """What a variant, alone and with all of its item table touched, adds to a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(growth, (folder, table, exits))


def growth(folder: Path, table: Path, exits: list[str]) -> int:
    def resident() -> int:
        return next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )

    before = resident()
    engine = Engine(folder, open_items(table), exits, 1)
    after = resident()
    del engine  # it had to live until here
    return after - before


def within_gate(exit: str, outcome: Outcome, exact: Outcome) -> bool:
    """NDCG@10 of both tables, at least GATE of fp32's."""
    kept = []
    if exit in outcome.ranks:
        kept.append((outcome.gains(exit).mean(), exact.gains(exit).mean()))
    if exit in outcome.slates:
        kept.append((np.nanmean(outcome.per_slate(exit)[:, 0]), np.nanmean(exact.per_slate(exit)[:, 0])))
    return bool(all(found >= GATE * wanted for found, wanted in kept))


def dominated(name: str, variants: dict[str, Variant], exit: str) -> str | None:
    """Another variant that is as good, as fast and as small (within 5 %, a student against low rank): why this one is not worth its place. fp32 always is."""

    def better(other: str) -> bool:
        mine = variants[name]
        theirs = variants[other]
        slack = 1.05 if "lowrank" in name and "student" in other else 1.0
        cheap = theirs.milliseconds <= slack * mine.milliseconds and theirs.bytes <= slack * mine.bytes
        known = [(row[0], ndcg_of(theirs, exit)[table][0]) for table, row in ndcg_of(mine, exit).items()]
        return bool(known) and cheap and all(theirs >= mine for mine, theirs in known)

    return None if name == "fp32" else next((other for other in variants if other != name and better(other)), None)


def ndcg_of(variant: Variant, exit: str) -> dict[str, list[float]]:
    """By table, with its interval."""
    return {table: row["ndcg10"] for table, row in variant.quality.get(exit, {}).items()}


def compress(source: Source, root: Path, names: list[str], options: Options, force: bool = False) -> Path:
    """The published next version's folder."""
    manifest = source.manifest
    version = max(versions(root / manifest.ranker), default=manifest.version) + 1
    with staging(root / manifest.ranker, version) as stage:
        shutil.copytree(source.folder, stage, dirs_exist_ok=True)
        for other in manifest.variants.keys() - {"fp32"}:
            shutil.rmtree(stage / "variants" / other)
        (stage / "items8.npy").unlink(missing_ok=True)
        if any(Recipe.named(name).int8_items for name in names):
            np.save(stage / "items8.npy", middle_max(source.items))
        kinds = sorted({Recipe.named(name).base for name in names})
        bases = {kind: make_base(source, kind, options) for kind in kinds}
        variants = {"fp32": measured_again(source, stage)} | {
            name: measured_once(source, stage, name, options, bases[Recipe.named(name).base]) for name in names
        }
        shutil.rmtree(stage / "draft", ignore_errors=True)
        engines = {
            name: source.engine(stage / "variants" / name, open_items(stage / variant.items))
            for name, variant in variants.items()
        }
        times = measure_latency(engines, manifest)
        variants = {name: variant.model_copy(update={"latency_ms": times[name]}) for name, variant in variants.items()}
        reasons = {
            name: f"keeps less than {GATE:.0%} of fp32's NDCG@10"
            for name, variant in variants.items()
            if variant.within_gate is False
        }
        for name in sorted(
            variants.keys() - reasons.keys(), key=lambda name: "lowrank" not in name
        ):  # low rank first: against a student of its cost it goes
            others = {other: variant for other, variant in variants.items() if other not in reasons}
            if better := dominated(name, others, manifest.default_exit):
                reasons[name] = f"{better} is as good, as fast and as small"
        published = {name: variant for name, variant in variants.items() if force or name not in reasons}
        table = as_markdown(variants, manifest.default_exit, reasons)
        print(table)
        for name in variants.keys() - published.keys():
            shutil.rmtree(stage / "variants" / name)
        if not any(variant.items == "items8.npy" for variant in published.values()):
            (stage / "items8.npy").unlink(missing_ok=True)
        report = json.loads((stage / "report.json").read_text()) if (stage / "report.json").exists() else {}
        report["variants"] = {
            name: variant.model_dump(exclude={"golden_scores"})
            | {"published": name in published, "reason": reasons.get(name)}
            for name, variant in variants.items()
        }
        report["ranks"] = bases["lowrank"].ranks if "lowrank" in bases else {}
        write_json(stage / "report.json", report)
        (stage / "variants.md").write_text(table + "\n")
        plot(variants, manifest.default_exit, stage / "variants.png")
        (stage / "manifest.json").unlink()
        files = {str(p.relative_to(stage)): sha256(p) for p in sorted(stage.rglob("*")) if p.is_file()}
        default = min(
            (name for name in published if name not in reasons), key=lambda name: published[name].milliseconds
        )
        changes = {
            "version": version,
            "created": datetime.now(UTC).replace(microsecond=0),
            "variants": published,
            "default_variant": default,
            "files": files,
        }
        (stage / "manifest.json").write_text(manifest.model_copy(update=changes).model_dump_json(indent=1))
        loaded = load_bundle(stage, 1)  # as the server will
        if loaded.refused:
            raise ValueError(f"not served: {loaded.refused}")
    return root / manifest.ranker / str(version)


def open_items(path: Path) -> ItemTable:
    rows = np.load(path)
    return Int8Items(rows) if rows.dtype.names else rows


def measured_again(source: Source, stage: Path) -> Variant:
    """fp32's row, with what this machine says of its bounds and size."""
    manifest = source.manifest
    folder = stage / "variants/fp32"
    measured = invariance.measure(source.exact, manifest, source.model, source.calibrations)
    check_bounds("fp32", measured, FP32_BOUND)
    now = {
        "bytes": bytes_on_disk(folder, list(manifest.graphs), stage / "items.npy"),
        "invariance": invariance.rounded(measured),
        "resident_bytes": resident_bytes(folder, stage / "items.npy", manifest.exits),
    }
    return manifest.variants["fp32"].model_copy(update=now)


def as_markdown(variants: dict[str, Variant], exit: str, reasons: dict[str, str]) -> str:
    """A row a variant; what is not published says why."""

    def times(variant: Variant) -> str:
        row = next(
            (r for r in variant.latency_ms.get("rows", []) if (r["history"], r["candidates"]) == (200, 200)), None
        )
        return (
            ""
            if row is None
            else f"{row['encode_p50']:.2f} / {row['encode_p99']:.2f} | {row['score_p50']:.2f} / {row['score_p99']:.2f}"
        )

    def signed(value: list[float] | None) -> str:
        return "" if value is None else f"{value[0]:+.4f} ({value[1]:+.4f} to {value[2]:+.4f})"

    columns = [
        "variant",
        "KB on disk",
        "MB resident",
        "encode ms, p50 / p99",
        "score ms, p50 / p99",
        "HR@10",
        "NDCG@10",
        "minus fp32",
        "NDCG@10 of slates",
    ]
    columns += ["minus fp32", "AUC in the slate", "Kendall tau", "top 10", "bound", "published"]
    lines = [
        f"`{exit}`, {cpu_name()}, one thread; times of history 200, 200 candidates",
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
    ]
    for name, variant in variants.items():
        tables = variant.quality.get(exit, {})
        less = variant.difference
        next_item = tables.get("leave_one_out", {})
        slates = tables.get("slates", {})
        cells = [
            name,
            f"{variant.bytes / 1024:.0f}",
            "" if variant.resident_bytes is None else f"{variant.resident_bytes / 2**20:.1f}",
            times(variant),
        ]
        cells += [
            f"{row[metric][0]:.4f}" if metric in row else ""
            for row, metric in ((next_item, "hr10"), (next_item, "ndcg10"))
        ]
        cells += [
            signed(less.get("leave_one_out_ndcg10")),
            f"{slates['ndcg10'][0]:.4f}" if slates else "",
            signed(less.get("slate_ndcg10")),
        ]
        cells += [
            f"{slates['auc_in_slate'][0]:.4f}" if slates else "",
            *(str(variant.agreement.get(what, "")) for what in ("kendall_tau", "top10_overlap")),
        ]
        lines.append(
            f"| {' | '.join([*cells, f'{variant.bound:.0e}', f'no: {reasons[name]}' if name in reasons else 'yes'])} |"
        )
    return "\n".join(lines)


def plot(variants: dict[str, Variant], exit: str, path: Path) -> None:
    """Quality against time, the area of a bubble its size on disk."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    measured = all(ndcg_of(variant, exit) for variant in variants.values())
    for name, variant in variants.items():
        x = variant.milliseconds
        size = variant.bytes / 4096
        value = (
            next(iter(ndcg_of(variant, exit).values())) if measured else [variant.agreement.get("kendall_tau", 1.0)] * 3
        )
        axis.errorbar(
            x, value[0], yerr=[[value[0] - value[1]], [value[2] - value[0]]], color="0.8", capsize=2, zorder=0
        )
        axis.scatter(x, value[0], s=size, alpha=0.5)
        axis.annotate(name, (x, value[0]), xytext=(6, 6), textcoords="offset points")
    axis.set(
        xlabel="ms, encode + score, the sum over the measured shapes, one thread",
        ylabel="NDCG@10" if measured else "Kendall's tau with fp32",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_shape(text: str) -> dict[str, int]:
    """ "blocks=1,key_size=16"; raises ValueError."""
    try:
        return {name: int(value) for name, _, value in (part.partition("=") for part in text.split(",") if part)}
    except ValueError:
        raise ValueError(f"{text!r} is no shape: blocks=1,feed_forward=2,...") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranker", type=Path, help="a ranker's folder: its newest version is compressed")
    parser.add_argument("toml", type=Path, nargs="?", help="of its training")
    parser.add_argument("--variants", default=",".join(NAMES), help="default: %(default)s")
    parser.add_argument(
        "--epochs", type=int, default=0, help="that low-rank rankers and students learn from fp32; default: none"
    )
    parser.add_argument("--method", choices=METHODS, default="afm", help="of low rank; default: %(default)s")
    parser.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="of the dense layers' cost that low rank may keep; default: %(default)s",
    )
    parser.add_argument(
        "--budget", choices=("size", "time"), default="size", help="what low rank saves; default: %(default)s"
    )
    parser.add_argument(
        "--student", default="", help="its shape, as blocks=1,feed_forward=2,key_size=32; default: half of each"
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(SAFE_BITS, FULL_BITS),
        default=SAFE_BITS,
        help="of int8 weights; 8 needs VNNI; default: %(default)s",
    )
    parser.add_argument(
        "--force", action="store_true", help="publish also what is below the quality gate or earns no place"
    )
    args = parser.parse_args()
    if not (found := versions(args.ranker)):
        parser.error(f"{args.ranker} holds no version of a ranker")
    try:
        names = list(dict.fromkeys(listed(args.variants)))
        for name in names:
            Recipe.named(name)
        learning = DistillConfig(epochs=args.epochs) if args.epochs else None
        options = Options(
            args.method, args.share, args.budget, shape=read_shape(args.student), distill=learning, bits=args.bits
        )
        data = None
        train = None
        if args.toml is not None:
            config, toml = read_config(args.toml)
            data = load_data(config, toml)
            train = from_table(TrainConfig, toml.get("train", {}), "train")
        print(
            compress(Source(args.ranker / str(found[-1]), data, train), args.ranker.parent, names, options, args.force)
        )
    except (ValueError, KeyError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
