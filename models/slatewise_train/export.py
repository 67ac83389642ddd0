"""Export a trained ranker as a bundle: slatewise export models/movielens.toml

The command writes the graphs, fits the calibrations, and measures quality, parity and latency. It publishes the bundle
if every measured difference is within its bound and the ranker is not worse than a simple baseline. A meta block is
optional: without one (`slatewise limaml`) the ranker is exported without meta-embeddings.

The first line of the standard output is the verdict. Remarks on the tables go to the standard error.

Called by: the command line. Reads: the checkpoint of `train.py`, the meta block of `meta/limaml.py`.
Calls: `bundle_writer.py`, `evaluation/`, `demo/content.py`. The server loads `models/bundles/<name>/<version>/`.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slatewise.bundle.manifest import Manifest, versions
from slatewise.inference.engine import Engine, EngineError
from slatewise_train.bundle_writer import (
    FP32,
    BundleContent,
    check_parity,
    longest_call,
    measure_fp32,
    open_fp32,
    publish,
    staging,
    write_content,
    write_exploration,
    write_fp32,
    write_graphs,
    write_json,
)
from slatewise_train.config import Config
from slatewise_train.data import Data
from slatewise_train.demo.content import demo_data, example_request, example_requests, warmup_requests
from slatewise_train.evaluation.calibration import fit_calibrations, uncalibrated_heads
from slatewise_train.evaluation.exploration import Examples
from slatewise_train.evaluation.leakage import check_leakage
from slatewise_train.evaluation.offline import run_cases, tabulate
from slatewise_train.evaluation.pruning import measure_pruning
from slatewise_train.evaluation.report import plot_quality, report_text
from slatewise_train.evaluation.sampling import SAMPLED_USERS
from slatewise_train.evaluation.verdict import compare_tables, judge, training_warnings
from slatewise_train.incremental.parent import Parent, is_worse, manifest_row
from slatewise_train.loading import load_trainer
from slatewise_train.meta.fit_fields import fit_fields
from slatewise_train.meta.limaml import META_BLOCK, MetaLearner, label_heads, load_learner, save_learner
from slatewise_train.rankers import families
from slatewise_train.rankers.base import Calibrations, uncalibrated
from slatewise_train.train import Trainer

TABLES = ("leave_one_out", "slates")  # that decide on the default exit and on the verdict


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export`."""

    most_users: int | None = SAMPLED_USERS  # evaluated in each table; None: all users
    force: bool = False  # publish a ranker that is worse than a baseline
    training: Path | None = None  # folder of log.csv and log.png, for warnings and the picture of the bundle
    parent: Parent | None = None  # the version that an update comes from


def export(
    trainer: Trainer,
    learner: MetaLearner | None,
    config: Config,
    root: Path,
    version: int,
    options: ExportOptions = ExportOptions(),
) -> Path:
    """Publish a bundle and return its folder, `root/<name>/<version>`.

    learner: the meta block, or `None` for a ranker without meta-embeddings. Raises ValueError when the ranker lacks the
    default exit, a measured difference is above its bound, the version exists, weights or scores are not finite, or the
    ranker is worse than a baseline or than its parent and `force` is not set.
    """
    parent = options.parent
    data = trainer.data
    if not all(bool(value.isfinite().all()) for value in trainer.model.parameters()):
        raise ValueError("the training diverged, weights are not finite: train again with a smaller learning_rate")
    with contextlib.redirect_stdout(sys.stderr):  # the tables of `[demo]` have remarks too
        content = make_content(trainer, learner, config, None if parent is None else parent.space)
    check_default_exit(config, content.exits)
    meta = content.model.default_vector().numpy()
    with staging(root / content.ranker, version) as stage:
        manifest = write_content(stage, content, version)
        if learner is not None:
            save_learner(stage / META_BLOCK, learner, [head.kind for head in data.config.heads])
        try:
            calibrations = calibrate(stage, content, data, meta)
            manifest = write_fp32(stage, manifest, content, calibrations)
            outcome = run_cases(open_fp32(stage, manifest), data, meta, options.most_users)
        except EngineError as error:
            raise ValueError(f"{error}: if the training diverged, train again with a smaller learning_rate") from error
        report = tabulate(outcome)
        report["not_measured"] |= uncalibrated_heads(calibrations, list(content.heads))
        if config.export.explore:
            report["exploration"] = add_exploration(stage, manifest, content, calibrations, data)
        prune = None
        if config.export.prune is not None:
            engine = open_fp32(stage, manifest)
            row = measure_pruning(engine, manifest, data, meta, config.export.prune, options.most_users)
            report["pruning"] = row
            prune = config.export.prune if row["published"] else None
        default_exit = config.export.default_exit or best_exit(report, content.exits)
        log = (options.training or stage) / "log.csv"
        warnings = training_warnings(config, log, trainer.model, trainer.progress.joined)
        reasons = [report["not_measured"][table] for table in TABLES if table in report["not_measured"]]
        verdict = judge(compare_tables(outcome, default_exit), warnings, reasons)
        update = None
        if parent is not None:
            row = parent.compare(open_fp32(stage, manifest), meta, default_exit, options.most_users)
            report["update"], update = row, manifest_row(row)
        write_report(stage, {"verdict": verdict.model_dump()} | report, data)
        if verdict.grade == "worse" and not options.force:
            raise ValueError(f"{verdict.line}: `--force` exports it nevertheless")
        if parent is not None and is_worse(report["update"]) and not options.force:
            raise ValueError(f"not published, it is worse: {report['update']['line']} `--force` publishes it")
        if options.training is not None and (options.training / "log.png").exists():
            shutil.copyfile(options.training / "log.png", stage / "training.png")
        invariance = check_parity(stage, manifest, content, calibrations)
        manifest = manifest.model_copy(
            update={"default_exit": default_exit, "verdict": verdict, "prune": prune, "update": update}
        )
        variant = measure_fp32(stage, manifest, invariance, report)
        publish(stage, manifest.model_copy(update={"variants": {"fp32": variant}}))
    return root / content.ranker / str(version)


def check_default_exit(config: Config, exits: Sequence[str]) -> None:
    """Raise ValueError if the TOML names a default exit that the ranker lacks."""
    stated = config.export.default_exit
    if stated not in (None, *exits):
        raise ValueError(f'[export] default_exit = "{stated}": this ranker has the exits {", ".join(exits)}')


def make_content(
    trainer: Trainer, learner: MetaLearner | None, config: Config, space: str | None = None
) -> BundleContent:
    data = trainer.data
    model = trainer.model.eval()
    if config.export.fit_fields:
        model = fit_fields(model, data)
    if learner is None:
        model = model.without_meta()
    elif learner.precision is not None:
        heads = label_heads([head.kind for head in data.config.heads])
        model = model.without_meta().with_personal_heads(heads)
    vocabulary = data.catalogue.vocabulary
    rng = np.random.default_rng(0)
    shown = demo_data(data, model, learner, config)
    example = example_request(shown, data, rng)
    return BundleContent(
        ranker=config.data.name,
        trained_on=config.tables.trained_on,
        model=model,
        ids=vocabulary.items,
        actions=vocabulary.actions,
        features=list(config.data.numeric),
        fields=vocabulary.fields,
        text=config.data.text,
        heads={head.name: head.weight for head in config.data.heads},
        history_used=config.data.history_length,
        users=shown.users,
        vectors=shown.vectors,
        titles=shown.titles,
        example=example,
        warmup=warmup_requests(example, vocabulary.items, config.data.history_length, rng),
        history_actions=config.tables.history_actions,
        examples=example_requests(shown, data, example, rng),
        space=space,
    )


def calibrate(stage: Path, content: BundleContent, data: Data, meta: np.ndarray) -> Calibrations:
    """Fit calibrations on uncalibrated graphs, which are written below `stage` and removed again."""
    draft = stage / "draft"
    identity = uncalibrated(content.exits, len(content.heads))
    write_graphs(draft, families.graphs(content.model, identity, longest_call(content.history_used)).all())
    calibrations = fit_calibrations(Engine(draft, np.load(stage / "items.npy"), content.exits), data, meta)
    shutil.rmtree(draft)
    return calibrations


def add_exploration(
    stage: Path, manifest: Manifest, content: BundleContent, calibrations: Calibrations, data: Data
) -> dict[str, float]:
    """Fit and write the posterior of fp32. Returns the standard deviation of a logit under a draw, by head."""
    meta = content.model.default_vector().numpy()
    examples = Examples(open_fp32(stage, manifest), data, content.model, meta)
    posterior = examples.posterior()
    write_exploration(stage / FP32, content.model, calibrations, posterior)
    return examples.spread(posterior)


def write_report(stage: Path, report: dict[str, Any], data: Data) -> None:
    """Write report.json, report.md and report.png, and print the text. The first line is the verdict."""
    checks = {check.name: {"found": check.found, "line": check.line} for check in check_leakage(data)}
    report = report | {"leakage": checks, "bad_rows": data.bad_rows, "trained_until": trained_until(data)}
    write_json(stage / "report.json", report)
    text = report_text(report)
    (stage / "report.md").write_text(text, encoding="utf-8")
    plot_quality(report, stage / "report.png")
    print(text, flush=True)


def trained_until(data: Data) -> float | None:
    """Return the time of the newest event that training could use, from which `slatewise update` goes on."""
    if data.config.kind == "time":
        return data.config.test_from
    times = data.sequences.timestamps
    return None if np.isnan(times).all() else float(np.nanmax(times))


def best_exit(report: dict[str, Any], exits: list[str]) -> str:
    """Return the exit with the highest NDCG@10, summed over the report's tables.

    If two exits are equal, the cheaper one is returned.
    """
    tables = [report[name] for name in TABLES if report[name]]
    return max(exits, key=lambda exit: sum(table[exit]["ndcg10"][0] for table in tables))


def load_block(folder: Path, toml: Path) -> MetaLearner | None:
    """Load the meta block in a training's folder. Without this file, print a hint and return `None`."""
    if (folder / META_BLOCK).exists():
        learner, _ = load_learner(folder / META_BLOCK)
        return learner
    hint = f"{folder} has no {META_BLOCK} (`slatewise limaml {toml}` makes it): exported without meta-embeddings"
    print(hint, file=sys.stderr)  # the first line of the output is the verdict
    return None


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="slatewise export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("toml", type=Path)
    parser.add_argument("--folder", type=Path, help="the training's folder; default: build/train/NAME")
    parser.add_argument("--root", type=Path, default=Path("models/bundles"), help="default: %(default)s")
    parser.add_argument("--version", type=int, help="default: one more than the newest")
    sampled = f"evaluate all users; default: a sample of {SAMPLED_USERS:,} for each table"
    parser.add_argument("--all-users", action="store_true", help=sampled)
    parser.add_argument("--force", action="store_true", help="publish a ranker that is worse than a baseline")
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):
        trainer, config, folder = load_trainer(args.toml, args.folder)
    newest = max(versions(args.root / config.data.name), default=0)
    version = newest + 1 if args.version is None else args.version
    options = ExportOptions(None if args.all_users else SAMPLED_USERS, args.force, folder)
    print(export(trainer, load_block(folder, args.toml), config, args.root, version, options))
