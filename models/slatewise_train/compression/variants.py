"""Make and measure one variant, and decide whether it is published.

The name of a variant states its kind: `lowrank` (or a smaller share, `lowrank-25`) or `student`, then `int8`, then
`tables8`, each optional. `tables4` has `int8` alone beside it.

Called by: `compress.py`. Calls: `bases.py`, `quantize.py`, `source.py`, `evaluation/`, `bundle_writer.py`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import onnx

from slatewise.bundle.files import sha256
from slatewise.bundle.manifest import Variant
from slatewise.bundle.ranker import weighted_mean
from slatewise.inference.engine import Engine
from slatewise.inference.item_table import ItemTable, read_item_table
from slatewise.process import cpu_name
from slatewise_train.bundle_writer import (
    FP32_BOUND,
    bytes_on_disk,
    golden_scores,
    longest_call,
    quality_rows,
    write_exploration,
    write_graphs,
    write_variant,
)
from slatewise_train.compression import source as sources
from slatewise_train.compression.bases import Base, Options, checkpoints_of
from slatewise_train.compression.quantize import SAFE_BITS, RecordingEngine, observe, quantize
from slatewise_train.compression.source import Source
from slatewise_train.evaluation import parity
from slatewise_train.evaluation.calibration import fit_calibrations
from slatewise_train.evaluation.exploration import Examples
from slatewise_train.evaluation.latency import resident_bytes
from slatewise_train.evaluation.offline import Outcome, difference, tabulate
from slatewise_train.evaluation.report import ndcg_by_table
from slatewise_train.graph_check import name_parts, table_of
from slatewise_train.rankers import families
from slatewise_train.rankers.base import Calibrations, uncalibrated

LEAST_INTEGER_BOUND = 1e-4  # parity requests seldom have a value near a rounding step; one changed a score by 2e-5
INTEGER_BOUND = 2e-3  # another order of summation can round a value near a rounding step the other way
GATE = 0.99  # a published variant has at least this share of fp32's NDCG@10

Graphs = dict[str, onnx.ModelProto]


@dataclass(frozen=True)
class Recipe:
    """The kind of a variant, as its name states it."""

    base: str  # fp32, student, tables4, or one of `low_rank_kinds`
    integers: bool
    table: str  # file of its item table

    @classmethod
    def named(cls, name: str) -> Recipe:
        """Read the kind from a variant's name.

        Raises ValueError for fp32, from which all variants are made, and for any name that is not a variant's.
        """
        parts = name_parts(name)
        if parts == ["fp32"]:
            raise ValueError("fp32 is not made: variants are made from it")
        base = "-".join(part for part in parts if part not in ("int8", "tables8"))
        return cls(base or "fp32", "int8" in parts, table_of(parts))

    @property
    def max_bound(self) -> float:
        """Maximum allowed score difference; also the tolerance of the golden scores on other processors."""
        return INTEGER_BOUND if self.integers else FP32_BOUND

    @property
    def min_bound(self) -> float:
        return LEAST_INTEGER_BOUND if self.integers else FP32_BOUND


def draft(
    source: Source, recipe: Recipe, base: Base, items: ItemTable, scratch: Path, bits: int = SAFE_BITS
) -> tuple[Graphs, Calibrations]:
    """Build the graphs of a variant and its calibrations. Intermediate graphs are written into the folder `scratch`.

    The calibrations are fitted on the quantized graphs; without data they are those of fp32.
    """
    manifest = source.manifest
    longest = longest_call(manifest.limits.history_used)
    plain = families.graphs(base.model, uncalibrated(manifest.exits, len(manifest.heads)), longest).all()
    ranges: dict[str, dict[str, tuple[float, float]]] = {}
    if recipe.integers:
        write_graphs(scratch, plain)
        recorder = RecordingEngine(scratch, items, manifest.exits)
        for sample in source.samples[::2]:
            sample.score(recorder, manifest.exits[-1])
        ranges = {name: observe(graph, recorder.feeds[name]) for name, graph in plain.items() if name in recorder.feeds}

    def with_integers(graphs: Graphs) -> Graphs:
        return {
            name: quantize(graph, ranges[name], bits) if name in ranges else graph for name, graph in graphs.items()
        }

    calibrations = source.calibrations
    if source.data is not None:
        write_graphs(scratch, with_integers(plain))
        calibrations = fit_calibrations(source.engine(scratch, items), source.data, source.meta)
    return with_integers(families.graphs(base.model, calibrations, longest).all()), calibrations


def measure_or_resume(source: Source, stage: Path, name: str, options: Options, base: Base) -> Variant:
    """Call `measure_variant`, or return the result of an earlier call with the same inputs.

    Results are stored beside the checkpoints.
    """
    kept = checkpoints_of(source, options) / name
    folder = stage / "variants" / name
    digest = input_digest(source, name, options, base)
    if (kept / "digest").exists() and (kept / "digest").read_text() == digest:
        shutil.copytree(kept / "graphs", folder)
        return Variant.model_validate_json((kept / "variant.json").read_text())
    variant = measure_variant(source, stage, name, options, base)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept / "graphs")
    (kept / "variant.json").write_text(variant.model_dump_json())
    (kept / "digest").write_text(digest)  # last, because it declares the result complete
    return variant


def input_digest(source: Source, name: str, options: Options, base: Base) -> str:
    """Return the SHA-256 of everything that the result of `measure_variant` depends on."""
    lengths = None if source.data is None else source.data.split.train_lengths.tolist()
    values = (name, options.bits, sources.SAMPLES, source.most_users, cpu_name(), lengths)
    digest = hashlib.sha256(repr(values).encode())
    digest.update(sha256(source.folder / "manifest.json").encode())
    for parameter, value in base.model.state_dict().items():
        digest.update(f"{parameter} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    digest.update(b"" if base.codes is None else base.codes.tobytes())
    return digest.hexdigest()


def measure_variant(source: Source, stage: Path, name: str, options: Options, base: Base) -> Variant:
    """Write a variant's graphs and return its row of the manifest, without latency.

    Raises ValueError when a measured difference is above half of the largest bound for its kind.
    """
    recipe = Recipe.named(name)
    folder = stage / "variants" / name
    manifest = source.manifest
    table = stage / recipe.table
    items = read_item_table(table)
    graphs, calibrations = draft(source, recipe, base, items, stage / "draft", options.bits)
    write_variant(stage, name, graphs, calibrations)
    engine = source.engine(folder, items)
    if source.posterior is not None:
        write_exploration(folder, base.model, calibrations, posterior_of(source, base, engine))
    measured = parity.measure_parity(engine, manifest, base.model, calibrations)
    if recipe.integers:
        del measured["onnx_against_torch"]  # `agreement` reports the distance of int8 from fp32
    check_bounds(name, measured, recipe.max_bound)
    variant = Variant(
        items=recipe.table,
        bytes=bytes_on_disk(folder, manifest.graphs, table),
        bound=max(round_bound(measured), recipe.min_bound),
        golden_bound=recipe.max_bound,
        invariance=parity.rounded(measured),
        quality={},
        latency_ms={},
        agreement=agreement(source, engine),
        resident_bytes=resident_bytes(folder, table, manifest.exits),
        golden_scores=golden_scores(engine, stage, manifest),
    )
    outcome = source.run_cases(engine)
    if outcome is None or source.outcome is None:
        return variant
    quality = {
        "quality": quality_rows(tabulate(outcome), manifest.exits),
        "difference": difference(outcome, source.outcome, manifest.default_exit),
        "within_gate": within_gate(manifest.default_exit, outcome, source.outcome),
    }
    return variant.model_copy(update=quality)


def posterior_of(source: Source, base: Base, engine: Engine) -> np.ndarray:
    """Fit the posterior of a variant's last layer: its hidden states differ from fp32's. Without data it is fp32's."""
    assert source.posterior is not None
    if source.data is None:
        return source.posterior
    return Examples(engine, source.data, base.model, source.meta).posterior()


def remeasure_fp32(source: Source, stage: Path) -> Variant:
    """Return the source's row of fp32, with size, score differences and quality measured on this machine.

    Raises ValueError when a difference is above half of FP32_BOUND.
    """
    manifest = source.manifest
    folder = stage / "variants/fp32"
    measured = parity.measure_parity(source.fp32, manifest, source.model, source.calibrations)
    check_bounds("fp32", measured, FP32_BOUND)
    changes = {
        "bytes": bytes_on_disk(folder, manifest.graphs, stage / "items.npy"),
        "invariance": parity.rounded(measured),
        "resident_bytes": resident_bytes(folder, stage / "items.npy", manifest.exits),
    }
    if source.outcome is not None:  # on the users of the other variants, which may not be those of the export
        changes["quality"] = quality_rows(tabulate(source.outcome), manifest.exits)
    return manifest.variants["fp32"].model_copy(update=changes)


def round_bound(measured: Mapping[str, float]) -> float:
    """Return the published bound: twice the largest difference, rounded up.

    It is rounded to 1, 2 or 5 times a power of ten and is at least 1e-5.
    """
    worst = 2 * max(value for name, value in measured.items() if name not in parity.OPTIONS)
    steps = (float(f"{digit}e{power}") for power in range(-5, 1) for digit in (1, 2, 5))
    return next(step for step in steps if worst <= step)


def check_bounds(name: str, measured: Mapping[str, float], bound: float) -> None:
    """Raises ValueError when a difference that should be zero is above half of the bound."""
    if failed := {
        prop: value for prop, value in measured.items() if prop not in parity.OPTIONS and not value <= bound / 2
    }:
        raise ValueError(f"{name} is above half of its bound {bound}: {failed}")


def agreement(source: Source, engine: Engine) -> dict[str, float]:
    """Compare an engine with fp32 at the default exit, on the samples that were not used for the int8 ranges.

    kendall_tau and top10_overlap are means over the samples, largest_score_difference is the maximum.
    """
    exit = source.manifest.default_exit
    taus = []
    overlaps = []
    largest = 0.0
    weights = np.array(list(source.manifest.heads.values()))
    for sample in source.samples[1::2]:
        exact, found = (weighted_mean(sample.score(one, exit), weights) for one in (source.fp32, engine))
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


# Which variants are published


def within_gate(exit: str, outcome: Outcome, exact: Outcome) -> bool:
    """Return whether the variant keeps at least GATE of fp32's NDCG@10 at an exit, in both tables.

    A table without this exit is ignored.
    """
    kept = []
    if exit in outcome.ranks:
        kept.append((outcome.gains(exit).mean(), exact.gains(exit).mean()))
    if exit in outcome.slates and outcome.measurable():
        kept.append((np.nanmean(outcome.per_slate(exit)[:, 0]), np.nanmean(exact.per_slate(exit)[:, 0])))
    return bool(all(found >= GATE * wanted for found, wanted in kept))


def rejections(variants: Mapping[str, Variant], exit: str) -> dict[str, str]:
    """Return the variants that are not published, with the reason: below the gate, or dominated by another variant."""
    reasons = {
        name: f"keeps less than {GATE:.0%} of fp32's NDCG@10"
        for name, variant in variants.items()
        if variant.within_gate is False
    }
    # Low rank first: it is dropped when a student of about the same cost is as good.
    for name in sorted(variants.keys() - reasons.keys(), key=lambda name: "lowrank" not in name):
        others = {other: variant for other, variant in variants.items() if other not in reasons}
        if better := dominated(name, others, exit):
            reasons[name] = f"{better} is as good, as fast and as small"
    return reasons


def dominated(name: str, variants: Mapping[str, Variant], exit: str) -> str | None:
    """Return a variant that is at least as good, fast and small, or None. fp32 is never dominated.

    A student may be 5 % slower and larger than the low-rank variant that it dominates.
    """

    def dominates(other: str) -> bool:
        mine = variants[name]
        theirs = variants[other]
        slack = 1.05 if "lowrank" in name and "student" in other else 1.0
        cheap = theirs.milliseconds <= slack * mine.milliseconds and theirs.bytes <= slack * mine.bytes
        better = ndcg_by_table(theirs, exit)
        known = [(row[0], better[table][0]) for table, row in ndcg_by_table(mine, exit).items()]
        return bool(known) and cheap and all(theirs >= mine for mine, theirs in known)

    return None if name == "fp32" else next((other for other in variants if other != name and dominates(other)), None)
