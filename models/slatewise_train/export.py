"""A trained ranker becomes a bundle: python -m slatewise_train.export models/movielens.toml

Writes the graphs, fits the calibrations, measures what must not change a score, quality and latency, and only then the
manifest; stages beside the target and renames. Nothing above its bound is published.
Before: `train.py`'s checkpoint. After: `app/slatewise/bundle/loader.py` loads `models/bundles/<name>/<version>/`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tqdm import tqdm

from slatewise.bundle.loader import load_bundle, make_ranker, score_request, sha256, versions
from slatewise.bundle.manifest import FORMAT, BundleLimits, Column, Io, Manifest, Tensor, Variant
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM, Candidates
from slatewise.inference.engine import CANDIDATE_CHUNK, HISTORY_CHUNK, Engine
from slatewise.process import cpu_name
from slatewise.schemas import RankRequest
from slatewise_train.config import Config
from slatewise_train.data import Data, Sequences, build_sequences, clean_events, read_table, values_of
from slatewise_train.evaluation import parity as invariance
from slatewise_train.evaluation.calibration import fit_calibration
from slatewise_train.evaluation.offline import candidates_of, evaluate, slate_cases
from slatewise_train.evaluation.report import quality_table
from slatewise_train.meta.limaml import META_BLOCK, MetaLearner, load_learner, save_learner, user_vectors
from slatewise_train.rankers.base import EXITS, Calibration, uncalibrated
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.rankers.ligr_onnx import LigrGraphs
from slatewise_train.train import Trainer, load_trainer

FP32_BOUND = 1e-5
SET_WISE_LIMIT = 1024
NEGATIVES = 99  # per positive, to calibrate heads of kind `next`
EXAMPLE_CANDIDATES = 24
EXAMPLE_EVENTS = 40


@dataclass(frozen=True)
class DemoData:
    """What a bundle shows: users with their events and vectors, titles and fields of items."""

    sequences: Sequences
    users: list[str]
    vectors: np.ndarray  # (users, M)
    titles: dict[str, dict[str, Any]]  # item id -> {"title": ..., column: [values]}


def demo_data(trainer: Trainer, learner: MetaLearner, config: Config) -> DemoData:
    """The `[demo]` data where the TOML names one, else the training data itself."""
    data = trainer.data
    demo = config.demo
    if demo is None:
        items = read_table(Path(config.tables.items))
        sequences = data.sequences
        users = sequences.users
    else:
        items = read_table(Path(demo.items))
        events, _ = clean_events(read_table(Path(demo.events)), data.config.max_bad_share)
        sequences = build_sequences(events, data.catalogue.vocabulary, data.config)
        users = [demo.user_prefix + user for user in sequences.users]
    kinds = [head.kind for head in data.config.heads]
    vectors = user_vectors(learner, trainer.model, kinds, sequences, data.config.history_length)
    columns = {c: values_of(items[c]) if c in items.columns else [[]] * len(items) for c in data.config.categorical}
    known = set(data.catalogue.vocabulary.items)
    titles = {}
    for k, row in enumerate(items.iter_rows(named=True)):
        if str(row["item_id"]) in known:
            titles[str(row["item_id"])] = {"title": row.get(data.config.title)} | {
                c: values[k] for c, values in columns.items()
            }
    return DemoData(sequences, users, vectors, titles)


def tabulate_fields(content: BundleContent) -> tuple[np.ndarray, dict[str, Column]]:
    """fields.npy and the manifest's description of it."""
    tables = [np.zeros((0, content.model.config.width), np.float32)]
    fields = {}
    offset = 0
    for name, values in content.fields.items():
        table = content.model.field[name].weight.detach().numpy()
        fields[name] = Column(offset=offset, values=values)
        tables.append(table)
        offset += len(table)
    return np.concatenate(tables), fields


def fit_calibrations(engine: Engine, data: Data, meta: np.ndarray) -> dict[str, list[Calibration]]:
    """From uncalibrated graphs: every exit and head, on the validation users' held-out slates.

    A head of kind `label` is fitted on the rated items; one of kind `next` on the next item among 99 items that the
    user never met, so its probability is that of such a slate.
    """
    rng = np.random.default_rng(0)
    heads = data.config.heads
    logits: dict[str, list[list[np.ndarray]]] = {exit: [[] for _ in heads] for exit in EXITS if exit in engine.sessions}
    labels: list[list[np.ndarray]] = [[] for _ in heads]
    for case in tqdm(slate_cases(data, data.split.validation_users), desc="calibration", mininterval=2):
        unseen = np.setdiff1d(np.arange(FIRST_ITEM, len(engine.items)), np.concatenate([case.seen, case.upcoming]))
        among = np.concatenate([case.upcoming[:1], rng.choice(unseen, min(NEGATIVES, len(unseen)), replace=False)])
        for rows, kind, target in (
            (case.upcoming, "label", case.labels),
            (among, "next", np.eye(len(among), 1).repeat(len(heads), axis=1)),
        ):
            candidates = candidates_of(engine, data, rows, case.time)
            scores = {exit: engine.score(case.history, candidates, meta, exit) for exit in logits}
            for k, head in enumerate(heads):
                if head.kind == kind:
                    known = ~np.isnan(target[:, k])
                    labels[k].append(target[known, k])
                    for exit, p in scores.items():
                        logits[exit][k].append(np.log(p[known, k]) - np.log1p(-p[known, k]))
    if not labels[0]:
        return {exit: [Calibration.identity() for _ in heads] for exit in logits}
    joined = [np.concatenate(column) for column in labels]
    return {
        exit: [fit_calibration(np.concatenate(columns[k]), joined[k]) for k in range(len(heads))]
        for exit, columns in logits.items()
    }


def write_graphs(folder: Path, graphs: dict[str, onnx.ModelProto]) -> dict[str, Io]:
    """The .onnx files; what goes in and out of each."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {}
    for name, graph in graphs.items():
        onnx.save(graph, folder / f"{name}.onnx")

        def tensors(values: Any) -> dict[str, Tensor]:
            return {
                v.name: Tensor(
                    dtype=onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name,
                    shape=[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
                )
                for v in values
            }

        described[name] = Io(inputs=tensors(graph.graph.input), outputs=tensors(graph.graph.output))
    return described


def measure_latency(engines: dict[str, Engine], manifest: Manifest, repeats: int = 60) -> dict[str, dict[str, Any]]:
    """Of each engine, in turns: milliseconds of encoding and of scoring at the highest exit, one thread, by history and slate."""
    draw = invariance.Requests(next(iter(engines.values())), manifest)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for events in (50, min(200, manifest.limits.history_used)):
        for n in (50, 200, 500):
            history = draw.history(events)
            drawn = draw.candidates(n)
            meta = draw.meta()
            rows_drawn = draw.rng.integers(FIRST_ITEM, len(draw.engine.items), n)
            states = {name: engine.extend(engine.start, history) for name, engine in engines.items()}
            seconds = {name: {"encode": list[float](), "score": list[float]()} for name in engines}
            for _ in range(repeats):
                for name, engine in engines.items():
                    begin = time.perf_counter()
                    engine.extend(engine.start, history)
                    seconds[name]["encode"].append(time.perf_counter() - begin)
                    begin = time.perf_counter()
                    candidates = Candidates(engine.items.take(rows_drawn, axis=0), drawn.numeric, drawn.context)
                    point = engine.point(candidates, meta, states[name])
                    if "set" in manifest.exits:
                        engine.set(point)
                    seconds[name]["score"].append(time.perf_counter() - begin)
            for name, found in seconds.items():
                quantiles = {
                    f"{stage}_p{q}": round(float(np.quantile(values, q / 100)) * 1e3, 3)
                    for stage, values in found.items()
                    for q in (50, 99)
                }
                rows[name].append({"history": events, "candidates": n} | quantiles)
    return {name: {"machine": cpu_name(), "threads": 1, "rows": found} for name, found in rows.items()}


def make_request(
    shown: DemoData, data: Data, user: int, name: str, events: int, candidates: int, rng: np.random.Generator
) -> dict[str, Any]:
    """A request of a shown user: their events before their last known ones, which are the candidates, among popular items."""
    vocabulary = data.catalogue.vocabulary
    s = shown.sequences
    rows = np.arange(s.offsets[user], s.offsets[user + 1])
    rows = rows[s.items[rows] != UNKNOWN_ITEM]
    ahead = rows[-min(candidates // 2, len(rows) // 3) :]
    before = rows[: len(rows) - len(ahead)]
    read = before[-events:]
    counts = np.bincount(data.sequences.items, minlength=len(data.catalogue.numeric))
    popular = np.argsort(-counts, kind="stable")[:500]
    titled = np.array([vocabulary.items[r - FIRST_ITEM] in shown.titles for r in popular])
    popular = np.setdiff1d(popular[titled], s.items[rows])
    among = popular if len(popular) else s.items[rows]
    wanted = candidates - len(ahead)
    slate = np.concatenate(
        [s.items[ahead], rng.choice(among, wanted, replace=len(among) < wanted)]
    )  # a small catalogue repeats
    rng.shuffle(slate)
    numeric = data.catalogue.numeric[slate]
    actions = [None, *vocabulary.actions]
    history: dict[str, Any] = {"item_ids": [vocabulary.items[r - FIRST_ITEM] for r in s.items[read]]}
    if vocabulary.actions:
        history["actions"] = [actions[a] for a in s.actions[read]]
    history["timestamps"] = [int(t) for t in s.timestamps[read]]
    features = {
        f: [None if np.isnan(v) else round(float(v), 3) for v in numeric[:, k]]
        for k, f in enumerate(data.config.numeric)
    }
    return {
        "user": name,
        "history": history,
        "candidates": {"item_ids": [vocabulary.items[r - FIRST_ITEM] for r in slate], "features": features},
        "request_time": int(s.timestamps[read[-1]]),
    }


def warmup_requests(
    example: dict[str, Any], ids: list[str], longest_history: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Smallest and largest shapes, so that memory has its size before the first client comes."""
    result = []
    for events, n in ((0, 1), (1, 20), (longest_history, CANDIDATE_CHUNK), (HISTORY_CHUNK, SET_WISE_LIMIT)):
        history = rng.integers(0, len(ids), events)
        slate = rng.integers(0, len(ids), n)
        result.append(
            {
                "history": {"item_ids": [ids[k] for k in history]},
                "candidates": {"item_ids": [ids[k] for k in slate]},
                "request_time": example["request_time"],
            }
        )
    return result


def plot_report(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    panels = (
        ("leave_one_out", "hr10", "HR@10, leave-one-out"),
        ("leave_one_out", "ndcg10", "NDCG@10, leave-one-out"),
        ("slates", "ndcg10", "NDCG@10, held-out slates"),
    )
    for axis, (table, metric, title) in zip(axes, panels, strict=True):
        rows = report[table]
        for k, (name, row) in enumerate(rows.items()):
            mean, low, high = row[metric]
            axis.barh(
                k, mean, xerr=[[mean - low], [high - mean]], color="tab:blue" if name in EXITS else "0.7", capsize=3
            )
        axis.set(yticks=range(len(rows)), yticklabels=list(rows), title=title)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def export(
    trainer: Trainer, learner: MetaLearner, toml: Config, root: Path, version: int, most_users: int | None = None
) -> Path:
    """The published bundle's folder. Raises ValueError where a measured bound is missed."""
    data = trainer.data
    model = trainer.model.eval()
    config = data.config
    rng = np.random.default_rng(0)
    default_meta = model.default_meta.detach().numpy()
    shown = demo_data(trainer, learner, toml)
    lengths = np.diff(shown.sequences.offsets)
    example_user = int(np.flatnonzero(lengths >= 100)[0]) if (lengths >= 100).any() else int(lengths.argmax())
    example = make_request(
        shown, data, example_user, shown.users[example_user], EXAMPLE_EVENTS, EXAMPLE_CANDIDATES, rng
    )
    content = BundleContent(
        ranker=config.name,
        trained_on=toml.tables.trained_on,
        model=model,
        ids=data.catalogue.vocabulary.items,
        actions=data.catalogue.vocabulary.actions,
        features=list(config.numeric),
        fields=data.catalogue.vocabulary.fields,
        heads={head.name: head.weight for head in config.heads},
        history_used=config.history_length,
        users=shown.users,
        vectors=shown.vectors,
        titles=shown.titles,
        example=example,
        warmup=warmup_requests(example, data.catalogue.vocabulary.items, config.history_length, rng),
    )
    with staging(root / config.name, version) as stage:
        write_content(stage, content)
        save_learner(stage / META_BLOCK, learner, [head.kind for head in config.heads])
        write_graphs(stage / "draft", LigrGraphs(model, content.identity, content.longest_call).all())
        calibrations = fit_calibrations(
            Engine(stage / "draft", np.load(stage / "items.npy"), content.exits, 1), data, default_meta
        )
        shutil.rmtree(stage / "draft")

        def report_quality(engine: Engine) -> dict[str, Any]:
            report = evaluate(engine, data, default_meta, most_users)
            report["bad_rows"] = data.bad_rows
            write_json(stage / "report.json", report)
            plot_report(report, stage / "report.png")
            print(quality_table(report))
            return report

        publish(stage, content, calibrations, version, report_quality, toml.export.default_exit)
    return root / config.name / str(version)


@dataclass(frozen=True)
class BundleContent:
    """What a bundle holds before anything is measured."""

    ranker: str
    trained_on: str
    model: Ligr
    ids: list[str]  # of the item table's rows from FIRST_ITEM on
    actions: list[str]
    features: list[str]
    fields: dict[str, list[str]]
    heads: dict[str, float]
    history_used: int
    users: list[str]
    vectors: np.ndarray  # (users, M)
    titles: dict[str, dict[str, Any]]
    example: dict[str, Any]
    warmup: list[dict[str, Any]]

    @property
    def exits(self) -> list[str]:
        return list(EXITS) if self.model.config.set_blocks else list(EXITS[:2])

    @property
    def identity(self) -> dict[str, list[Calibration]]:
        return uncalibrated(self.exits, len(self.heads))

    @property
    def longest_call(self) -> int:
        """Positions that the rotary tables need."""
        return max(self.history_used, HISTORY_CHUNK)


@contextmanager
def staging(folder: Path, version: int) -> Iterator[Path]:
    """A folder beside the target, renamed to it at the end: a bundle is there whole or not at all."""
    target = folder / str(version)
    stage = folder / f".staging-{version}"
    if target.exists():
        raise ValueError(f"{target} exists: a published version does not change")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    yield stage
    stage.rename(target)


def write_content(stage: Path, content: BundleContent) -> None:
    """The files that all variants share."""
    np.save(stage / "items.npy", content.model.item_table().detach().numpy())
    np.save(stage / "fields.npy", tabulate_fields(content)[0])
    np.save(stage / "default_meta.npy", content.model.default_meta.detach().numpy())
    np.save(stage / "meta_embeddings.npy", content.vectors)
    write_json(stage / "ids.json", content.ids)
    write_json(stage / "users.json", content.users)
    write_json(stage / "display.json", content.titles)
    (stage / "warmup.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content.warmup))


def publish(
    stage: Path,
    content: BundleContent,
    calibrations: dict[str, list[Calibration]],
    version: int,
    report_quality: Callable[[Engine], dict],
    default_exit: str | None,
) -> None:
    """Graphs, what is measured on them, and last the manifest. Raises ValueError where a measured bound is missed."""
    model = content.model
    exits = content.exits
    items = np.load(stage / "items.npy")
    graphs = LigrGraphs(model, calibrations, content.longest_call)
    described = write_graphs(stage / "variants/fp32", graphs.all())
    write_graphs(stage / "variants/fp32", {"rank": graphs.rank(items, list(content.heads.values()))})
    manifest = Manifest(
        format=FORMAT,
        ranker=content.ranker,
        version=version,
        created=datetime.now(UTC).replace(microsecond=0),
        trained_on=content.trained_on,
        space=f"{content.ranker}-{version}",
        width=model.config.width,
        heads=content.heads,
        exits=exits,
        default_exit=exits[-1],  # until the held-out results are there
        default_variant="fp32",
        actions=content.actions,
        features=content.features,
        fields=tabulate_fields(content)[1],
        meta_size=model.config.meta_size,
        limits=BundleLimits(history_used=content.history_used, set_wise=SET_WISE_LIMIT if "set" in exits else 0),
        graphs=described,
        variants={},
        files={},
        example=content.example,
    )
    engine = Engine(stage / "variants/fp32", items, exits, 1)
    measured = invariance.measure(engine, manifest, model, calibrations)
    print(measured)
    if failed := {
        name: value for name, value in measured.items() if name not in invariance.OPTIONS and not value <= FP32_BOUND
    }:
        raise ValueError(f"above the bound {FP32_BOUND}: {failed}")
    report = report_quality(Engine(stage / "variants/fp32", items, exits, 1))
    manifest = manifest.model_copy(update={"default_exit": default_exit or best_exit(report, exits)})
    variant = Variant(
        bytes=bytes_on_disk(stage / "variants/fp32", list(described), stage / "items.npy"),
        bound=FP32_BOUND,
        invariance=invariance.rounded(measured),
        quality=quality_rows(report, exits),
        latency_ms=measure_latency({"fp32": engine}, manifest)["fp32"],
        golden_scores=golden_scores(engine, stage, manifest),
    )
    files = {str(p.relative_to(stage)): sha256(p) for p in sorted(stage.rglob("*")) if p.is_file()}
    manifest = manifest.model_copy(update={"variants": {"fp32": variant}, "files": files})
    (stage / "manifest.json").write_text(manifest.model_dump_json(indent=1))
    load_bundle(stage, 1)  # as the server will: digests, schema, golden request


def bytes_on_disk(folder: Path, graphs: list[str], items: Path) -> int:
    """Of the graphs that a server loads, and of the item table."""
    return sum(path.stat().st_size for path in (items, *(folder / f"{graph}.onnx" for graph in graphs)))


def best_exit(report: dict, exits: list[str]) -> str:
    """The exit with the highest NDCG@10, summed over the report's tables; among equals the cheaper one."""
    tables = [report[name] for name in ("leave_one_out", "slates") if report[name]]
    return max(exits, key=lambda exit: sum(table[exit]["ndcg10"][0] for table in tables))


def quality_rows(report: dict, exits: list[str]) -> dict[str, dict[str, Any]]:
    """Per exit, what the manifest says of it."""
    return {
        exit: {table: report[table][exit] for table in ("leave_one_out", "slates") if exit in report.get(table, {})}
        for exit in exits
    }


def golden_scores(engine: Engine, stage: Path, manifest: Manifest) -> list[float]:
    """The example's scores, by the functions that the server calls when it checks them."""
    ranker = make_ranker(stage, manifest)
    found = score_request(ranker, engine, RankRequest.model_validate(manifest.example))
    return (found[manifest.default_exit] @ ranker.score_weights(None)).tolist()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toml", type=Path)
    parser.add_argument("--folder", type=Path, help="of the training; default: build/train/NAME")
    parser.add_argument("--root", type=Path, default=Path("models/bundles"))
    parser.add_argument("--version", type=int, help="default: one more than the newest")
    args = parser.parse_args()
    try:
        trainer, toml, folder = load_trainer(args.toml, args.folder)
        if not (folder / META_BLOCK).exists():
            raise ValueError(
                f"{folder} has no {META_BLOCK}: `python -m slatewise_train.meta.limaml {args.toml}` learns it"
            )
        learner, _ = load_learner(folder / META_BLOCK)
        print(
            export(
                trainer,
                learner,
                toml,
                args.root,
                args.version or max(versions(args.root / trainer.data.config.name), default=0) + 1,
            )
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
