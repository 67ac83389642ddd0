"""A bundle becomes its next version with more variants: python -m models.compress models/bundles/movielens models/movielens.toml

Each variant is made from the bundle's own weights (low rank in torch, integers on the graphs), calibrated anew, measured against
fp32 on the same held-out cases and held to its bound; one below the quality gate is not published. Without a TOML, which names
the data, nothing is known of quality: the calibration is fp32's, nothing is gated, and size and time are what there is to see.

Before: `export.py` or `reference.py` published fp32. After: `app/bundle.py` loads what was published; the default variant is the fastest within the gate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from app.bundle import load_bundle, sha256, versions
from app.engine import HISTORY_QUANTUM, Candidates, Engine, History, processor
from app.features import FIRST_ITEM, GAP_MISSING, START_ITEM, UNKNOWN_ACTION
from app.manifest import Variant, read_manifest
from models import invariance
from models.data import from_table, read_config
from models.evaluate import Outcome, candidates_of, difference, run_cases, slate_cases, tabulate
from models.export import FP32_BOUND, fit_calibrations, golden_scores, measure_latency, quality_rows, staging, write_graphs, write_json
from models.graphs import Calibration, LigrGraphs
from models.ligr import Ligr
from models.low_rank import Seen, allocate, dense_layers, factor, layer_of, see, spectrum
from models.quantize import observe, quantize
from models.restore import restore
from models.train import Data, TrainConfig, Trainer, epoch_windows, load_data, make_batch

INTEGER_BOUND = 2e-3  # a value beside a rounding step may take the other side where sums are done in another order
SAMPLES, SLATE = 60, 200
SEEN_BATCHES = 40
GATE = 0.99  # of fp32's NDCG@10

Sample = tuple[History, Candidates, np.ndarray]  # with the user's vector
Calibrations = dict[str, list[Calibration]]


@dataclass(frozen=True)
class Recipe:
    """How a variant is made of fp32."""

    method: str | None = None  # of low_rank.METHODS
    share: float = 1.0  # of the dense layers' numbers that low rank may keep
    integers: bool = False

    @property
    def bound(self) -> float:
        return INTEGER_BOUND if self.integers else FP32_BOUND


RECIPES = {
    "int8": Recipe(integers=True),
    "lowrank": Recipe("afm", 0.5),
    "lowrank-int8": Recipe("afm", 0.5, integers=True),
}


class Recorder(Engine):
    """Keeps what each graph is given."""

    def __init__(self, *arguments: Any) -> None:
        self.feeds: dict[str, list[dict[str, np.ndarray]]] = {}
        super().__init__(*arguments)

    def run(self, graph: str, feeds: dict[str, np.ndarray], wide: bool = False) -> dict[str, np.ndarray]:
        self.feeds.setdefault(graph, []).append(feeds)
        return super().run(graph, feeds, wide)


class Source:
    """The bundle that is compressed, and the data that says what a variant loses; `most_users` bounds leave-one-out, for tests."""

    def __init__(self, folder: Path, data: Data | None, train: TrainConfig | None = None, most_users: int | None = None) -> None:
        self.folder, self.data, self.train, self.most_users = folder, data, train, most_users
        self.manifest, self.items = read_manifest(folder), np.load(folder / "items.npy")
        if data is not None and len(self.items) != len(data.catalogue.numeric):
            raise ValueError(f"{folder} has {len(self.items)} rows of items, the data {len(data.catalogue.numeric)}: other data than it was trained on")
        self.model, self.calibrations = restore(folder)
        self.meta, self.vectors = np.load(folder / "default_meta.npy"), np.load(folder / "meta_embeddings.npy")
        self.exact = self.engine(folder / "variants/fp32")
        self.samples = list(self.draw_samples())
        self.outcome: Outcome | None = None if data is None else self.run_cases(self.exact)

    def engine(self, folder: Path) -> Engine:
        return Engine(folder, self.items, self.manifest.exits, 1)

    def draw_samples(self) -> Iterator[Sample]:
        """Requests to calibrate by: of the validation users among random items where there is data, else drawn; vectors of the bundle's users."""
        draw = invariance.Requests(self.exact, self.manifest, 0)
        metas = itertools.cycle([self.meta, *self.vectors[:SAMPLES]])
        if self.data is not None and len(self.data.split.validation_users):
            for case in slate_cases(self.data, self.data.split.validation_users)[:SAMPLES]:
                among = draw.rng.integers(FIRST_ITEM, len(self.items), max(1, SLATE - len(case.upcoming)))
                yield case.history, candidates_of(self.exact, self.data, np.concatenate([case.upcoming, among]), case.time), next(metas)
            return
        for length in draw.rng.integers(1, self.manifest.limits.history_used, SAMPLES // 3):
            yield draw.history(min(int(length), 2 * HISTORY_QUANTUM)), draw.candidates(SLATE), next(metas)

    def run_cases(self, engine: Engine) -> Outcome:
        assert self.data is not None
        return run_cases(engine, self.data, self.meta, self.most_users, baselines=False)

    @cached_property
    def seen(self) -> dict[str, Seen]:
        return see(self.model, self.losses)

    def losses(self) -> Iterator[Tensor]:
        """What low rank looks at: the training loss where there is data, else the size of the logits on drawn requests."""
        torch.manual_seed(0)
        if self.data is not None and self.train is not None:
            trainer, rng = Trainer(self.data, {}, self.train, model=self.model), np.random.default_rng(0)
            self.model.eval()
            windows = epoch_windows(self.data.split.train_lengths, self.manifest.limits.history_used, self.train.batch_events, rng)
            for batch in itertools.islice(windows, SEEN_BATCHES):
                yield trainer.loss(make_batch(self.data.sequences, batch), ladder=True)
            return
        for history, candidates, meta in self.samples:
            yield sum((value.square().mean() for value in logits_of(self.model, history, candidates, meta)), torch.zeros(()))


def logits_of(model: Ligr, history: History, candidates: Candidates, meta: np.ndarray) -> tuple[Tensor, Tensor]:
    """Of the exits `point` and `set`, with gradients."""
    columns = ((START_ITEM, history.items), (UNKNOWN_ACTION, history.actions), (GAP_MISSING, history.gaps))  # the start token first
    rows, actions, gaps = (torch.from_numpy(np.concatenate([[first], column]))[None] for first, column in columns)
    state, users = model.encode(model.tokens(model.item_table()[rows], actions, gaps))
    vectors = torch.from_numpy(candidates.vectors)[None]
    fused = model.fuse(torch.from_numpy(candidates.numeric)[None], torch.from_numpy(meta)[None, None], torch.from_numpy(candidates.context)[:, None])
    hidden = model.hidden(vectors, state, torch.tensor([rows.shape[1]]), None, fused)
    point = model.dot_logits(users[:, -1:], vectors) + model.point_logits(hidden)
    return point, point + model.set_logits(hidden) if model.config.set_blocks else point


@dataclass(frozen=True)
class Draft:
    """A variant as graphs, before anything is measured."""

    model: Ligr
    calibrations: Calibrations
    graphs: dict[str, onnx.ModelProto]
    ranks: dict[str, int | None]


def draft(source: Source, recipe: Recipe, stage: Path) -> Draft:
    """Weights, integers, then a calibration of its own; `stage` is scratch."""
    model, ranks = source.model, {}
    if recipe.method is not None:
        layers, seen = dense_layers(model), source.seen
        known = {name: layer.weight.detach().double() for name, layer in layers.items()}
        shapes = {name: layer_of(spectrum(recipe.method, weight, seen[name]), weight) for name, weight in known.items()}
        ranks = allocate(shapes, recipe.share * sum(layer.whole for layer in shapes.values()))
        model = factor(model, seen, recipe.method, ranks)
    longest = max(source.manifest.limits.history_used, HISTORY_QUANTUM)
    identity = {exit: [Calibration.identity() for _ in source.manifest.heads] for exit in source.manifest.exits}
    plain = LigrGraphs(model, identity, longest).all()
    ranges: dict[str, dict[str, tuple[float, float]]] = {}
    if recipe.integers:
        write_graphs(stage, plain)
        recorder = Recorder(stage, source.items, source.manifest.exits, 1)
        for history, candidates, meta in source.samples:
            recorder.score(history, candidates, meta, source.manifest.exits[-1])
        ranges = {name: observe(graph, recorder.feeds[name]) for name, graph in plain.items() if name in recorder.feeds}

    def finish(graphs: dict[str, onnx.ModelProto]) -> dict[str, onnx.ModelProto]:
        return {name: quantize(graph, ranges[name]) if name in ranges else graph for name, graph in graphs.items()}

    calibrations = source.calibrations
    if source.data is not None:
        write_graphs(stage, finish(plain))
        calibrations = fit_calibrations(source.engine(stage), source.data, source.meta)
    return Draft(model, calibrations, finish(LigrGraphs(model, calibrations, longest).all()), ranks)


def agreement(source: Source, engine: Engine) -> dict[str, float]:
    """With fp32 at the default exit, over the samples."""
    exit, taus, overlaps, largest = source.manifest.default_exit, [], [], 0.0
    weights = np.array(list(source.manifest.heads.values()))
    for history, candidates, meta in source.samples:
        exact, found = (one.score(history, candidates, meta, exit) @ weights for one in (source.exact, engine))
        first, second = (np.sign(scores[:, None] - scores) for scores in (exact, found))
        n = len(exact)
        taus.append(float((first * second).sum() / (n * (n - 1))))
        best = [set(np.argsort(-scores, kind="stable")[:10].tolist()) for scores in (exact, found)]
        overlaps.append(len(best[0] & best[1]) / min(10, n))
        largest = max(largest, float(np.abs(found - exact).max()))
    return {"kendall_tau": round(fmean(taus), 5), "top10_overlap": round(fmean(overlaps), 4), "largest_score_difference": round(largest, 6)}


def resident_bytes(folder: Path, graphs: list[str]) -> int:
    """What the sessions of a variant add to a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(growth, (folder, graphs))


def growth(folder: Path, graphs: list[str]) -> int:
    from app.engine import open_session

    def resident() -> int:
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))

    before = resident()
    sessions = [open_session(folder / f"{name}.onnx", 1) for name in graphs]
    return resident() - before if sessions else 0


def within_gate(source: Source, outcome: Outcome | None) -> bool:
    """NDCG@10 at the default exit, of both tables, at least GATE of fp32's."""
    if outcome is None or source.outcome is None:
        return True
    exit, kept = source.manifest.default_exit, []
    if exit in outcome.ranks:
        kept.append((outcome.gains(exit).mean(), source.outcome.gains(exit).mean()))
    if exit in outcome.slates:
        kept.append((np.nanmean(outcome.per_slate(exit)[:, 0]), np.nanmean(source.outcome.per_slate(exit)[:, 0])))
    return all(found >= GATE * exact for found, exact in kept)


def measure(source: Source, stage: Path, name: str, recipe: Recipe, made: Draft) -> tuple[Variant, bool]:
    """A variant's row of the manifest, and whether it is good enough. Raises ValueError where it misses its bound."""
    folder, manifest = stage / "variants" / name, source.manifest
    write_graphs(folder, made.graphs)
    engine = source.engine(folder)
    measured = invariance.measure(engine, manifest, made.model, made.calibrations)
    if recipe.integers:
        del measured["onnx_against_torch"]  # `agreement` says how far the integers are
    if failed := {what: value for what, value in measured.items() if what not in invariance.OPTIONS and not value <= recipe.bound}:
        raise ValueError(f"{name} is above its bound {recipe.bound}: {failed}")
    outcome = None if source.data is None else source.run_cases(engine)
    variant = Variant(
        bytes=sum((folder / f"{graph}.onnx").stat().st_size for graph in made.graphs),
        bound=recipe.bound,
        invariance={what: float(f"{value:.2e}") for what, value in measured.items()},
        quality={} if outcome is None else quality_rows(tabulate(outcome), manifest.exits),
        latency_ms=measure_latency(engine, manifest),
        agreement=agreement(source, engine),
        difference={} if outcome is None or source.outcome is None else difference(outcome, source.outcome, manifest.default_exit),
        resident_bytes=resident_bytes(folder, list(made.graphs)),
        golden_scores=golden_scores(engine, stage, manifest),
    )
    return variant, within_gate(source, outcome)


def milliseconds(variant: Variant) -> float:
    """Encode and score, over the shapes that were measured."""
    return sum(row["encode_p50"] + row["score_p50"] for row in variant.latency_ms.get("rows", []))


def compress(source: Source, root: Path, recipes: dict[str, Recipe], force: bool = False) -> Path:
    """The published next version's folder."""
    manifest = source.manifest
    version = max(versions(root / manifest.ranker), default=manifest.version) + 1
    with staging(root / manifest.ranker, version) as stage:
        shutil.copytree(source.folder, stage, dirs_exist_ok=True)
        for other in manifest.variants.keys() - {"fp32"}:
            shutil.rmtree(stage / "variants" / other)
        now = {"latency_ms": measure_latency(source.exact, manifest), "resident_bytes": resident_bytes(stage / "variants/fp32", list(manifest.graphs))}
        variants, ranks, refused = {"fp32": manifest.variants["fp32"].model_copy(update=now)}, {}, []
        for name, recipe in recipes.items():
            made = draft(source, recipe, stage / "draft")
            variants[name], good = measure(source, stage, name, recipe, made)
            ranks[name] = made.ranks
            if not good and not force:
                print(f"{name} keeps less than {GATE:.0%} of fp32's NDCG@10: not published")
                refused.append(name)
        shutil.rmtree(stage / "draft", ignore_errors=True)
        table = as_markdown(variants, manifest.default_exit)
        print(table)
        for name in refused:
            shutil.rmtree(stage / "variants" / name)
        published = {name: variant for name, variant in variants.items() if name not in refused}
        report = json.loads((stage / "report.json").read_text()) if (stage / "report.json").exists() else {}
        rows = {name: variant.model_dump(exclude={"golden_scores"}) for name, variant in variants.items()}
        report["variants"] = {name: row | {"ranks": ranks.get(name, {}), "published": name in published} for name, row in rows.items()}
        write_json(stage / "report.json", report)
        (stage / "variants.md").write_text(table + "\n")
        plot(variants, manifest.default_exit, stage / "variants.png")
        (stage / "manifest.json").unlink()
        files = {str(p.relative_to(stage)): sha256(p) for p in sorted(stage.rglob("*")) if p.is_file()}
        default = min(published, key=lambda name: milliseconds(published[name]))
        changes = {"version": version, "created": datetime.now(UTC).replace(microsecond=0), "variants": published, "default_variant": default, "files": files}
        (stage / "manifest.json").write_text(manifest.model_copy(update=changes).model_dump_json(indent=1))
        loaded = load_bundle(stage, 1)  # as the server will
        if loaded.refused:
            raise ValueError(f"not served: {loaded.refused}")
    return root / manifest.ranker / str(version)


def ndcg_of(variant: Variant, exit: str) -> list[float] | None:
    tables = variant.quality.get(exit, {})
    return next((tables[name]["ndcg10"] for name in ("leave_one_out", "slates") if name in tables), None)


def as_markdown(variants: dict[str, Variant], exit: str) -> str:
    lines = [f"`{exit}`, {processor()}, one thread; encode + score of history 200, 200 candidates", ""]
    lines += ["| variant | KB on disk | MB resident | encode + score ms | NDCG@10 | minus fp32 | Kendall tau | top 10 | bound |", "| --- " * 9 + "|"]
    for name, variant in variants.items():
        row = next((r for r in variant.latency_ms.get("rows", []) if (r["history"], r["candidates"]) == (200, 200)), None)
        time = "" if row is None else f"{row['encode_p50'] + row['score_p50']:.2f}"
        ndcg, less = ndcg_of(variant, exit), variant.difference.get("leave_one_out_ndcg10") or variant.difference.get("slate_ndcg10")
        quality = "" if ndcg is None else f"{ndcg[0]:.4f} ({ndcg[1]:.4f} to {ndcg[2]:.4f})"
        minus = "" if less is None else f"{less[0]:+.4f} ({less[1]:+.4f} to {less[2]:+.4f})"
        tau, overlap = (variant.agreement.get(what, "") for what in ("kendall_tau", "top10_overlap"))
        resident = "" if variant.resident_bytes is None else f"{variant.resident_bytes / 2**20:.1f}"
        lines.append(f"| {name} | {variant.bytes / 1024:.0f} | {resident} | {time} | {quality} | {minus} | {tau} | {overlap} | {variant.bound:.0e} |")
    return "\n".join(lines)


def plot(variants: dict[str, Variant], exit: str, path: Path) -> None:
    """Quality against time, the area of a bubble its size on disk."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, variant in variants.items():
        ndcg, x = ndcg_of(variant, exit) or [variant.agreement.get("kendall_tau", 1.0)], milliseconds(variant)
        axis.scatter(x, ndcg[0], s=variant.bytes / 1024, alpha=0.5)
        axis.annotate(name, (x, ndcg[0]))
    quality = "NDCG@10" if all(ndcg_of(variant, exit) for variant in variants.values()) else "Kendall's tau with fp32"
    axis.set(xlabel="ms, encode + score over the measured shapes, one thread", ylabel=quality)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranker", type=Path, help="a ranker's folder: its newest version is compressed")
    parser.add_argument("toml", type=Path, nargs="?", help="of its training")
    parser.add_argument("--variants", default=",".join(RECIPES), help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="publish also what is below the quality gate")
    args = parser.parse_args()
    if unknown := set(args.variants.split(",")) - RECIPES.keys():
        parser.error(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    if not (found := versions(args.ranker)):
        parser.error(f"{args.ranker} holds no version of a ranker")
    data, train = None, None
    if args.toml is not None:
        config, toml = read_config(args.toml)
        data, train = load_data(config, toml), from_table(TrainConfig, toml.get("train", {}), "train")
    try:
        source = Source(args.ranker / str(found[-1]), data, train)
        print(compress(source, args.ranker.parent, {name: RECIPES[name] for name in args.variants.split(",")}, args.force))
    except (ValueError, KeyError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
