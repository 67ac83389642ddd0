"""Compress a bundle: slatewise compress models/bundles/movielens models/movielens.toml

The command publishes a new version of a bundle that has more variants. To make a variant, it takes the bundle's own
weights, optionally trains a smaller model to imitate fp32 (`--epochs`), fits the calibrations, and compares the result
with fp32 on the same held-out cases. If a parity measure of a variant exceeds the bound, the command stops with an
error. A variant is published if it passes the quality gate and no other variant is as good, as fast and as small. The
report lists all variants, published or not.

The TOML names the data. Without it, no variant is trained or compared: the command uses the calibrations of fp32 and
measures only size and latency.

You can stop the command at any time. The same command continues with the variant that was not finished.

Called by: the command line. Calls: `compression/`, `bundle_writer.py`, `config.py`, `evaluation/`, `loading.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from slatewise.bundle.item_tables import INT8, PACKED
from slatewise.bundle.manifest import Variant, bundle_folder, read_manifest, versions
from slatewise.inference.item_table import read_item_table
from slatewise.settings import listed
from slatewise_train.bundle_writer import publish, staging, write_json
from slatewise_train.compression.bases import Base, Options, low_rank_kinds, make_bases
from slatewise_train.compression.distill import LOSSES, DistillConfig
from slatewise_train.compression.item_quantization import middle_max
from slatewise_train.compression.low_rank import METHODS
from slatewise_train.compression.quantize import FULL_BITS, SAFE_BITS
from slatewise_train.compression.source import Source
from slatewise_train.compression.variants import Recipe, measure_or_resume, rejections, remeasure_fp32
from slatewise_train.config import read_config
from slatewise_train.evaluation.latency import measure_latency
from slatewise_train.evaluation.report import plot_variants, variants_table
from slatewise_train.evaluation.sampling import SAMPLED_USERS
from slatewise_train.graph_check import INTEGER_SIDE, TABLES
from slatewise_train.incremental.grow import vocabulary_of
from slatewise_train.loading import load_for_training, training_folder


def variant_names(shares: Sequence[float]) -> list[str]:
    """Return the names of all variants that are made with these shares, unless others are chosen."""
    low_rank = [name for kind in low_rank_kinds(shares) for name in (kind, f"{kind}-int8")]
    return ["int8", "int8-tables8", "int8-tables4", *low_rank, "student", "student-int8", "student-int8-tables8"]


def compress(source: Source, root: Path, names: list[str], options: Options, forced: Collection[str] = ()) -> Path:
    """Publish the next version, with fp32 and the named variants, and return its folder.

    forced: names of variants that are published also if they fail the gate or are dominated. Raises ValueError when a
    variant misses its bound.
    """
    manifest = source.manifest
    version = max(versions(root / manifest.ranker), default=manifest.version) + 1
    with staging(root / manifest.ranker, version) as stage:
        copy_source(source, stage)
        bases = make_bases(source, {Recipe.named(name).base for name in names}, options)
        write_tables(source, stage, {Recipe.named(name).table for name in names}, bases)
        variants = measure_variants(source, stage, names, options, bases)
        reasons = rejections(variants, manifest.default_exit)
        published = {name: variant for name, variant in variants.items() if name in forced or name not in reasons}
        remove_unpublished(stage, variants, published)
        write_report(stage, variants, manifest.default_exit, reasons, bases)
        fastest = min((name for name in published if name not in reasons), key=lambda name: variants[name].milliseconds)
        changes = {
            "version": version,
            "created": datetime.now(UTC).replace(microsecond=0),
            "variants": published,
            "default_variant": fastest,
        }
        publish(stage, manifest.model_copy(update=changes))
    return root / manifest.ranker / str(version)


def write_tables(source: Source, stage: Path, tables: Collection[str], bases: dict[str, Base]) -> None:
    """Write the item tables of variants."""
    if INT8 in tables:
        np.save(stage / INT8, middle_max(source.items))
    for base in bases.values():
        if base.codes is not None:
            np.save(stage / PACKED, base.codes)


def copy_source(source: Source, stage: Path) -> None:
    """Copy the source bundle with the variant fp32 only, and without the item tables of others."""
    shutil.copytree(source.folder, stage, dirs_exist_ok=True)
    for name in source.manifest.variants.keys() - {"fp32"}:
        shutil.rmtree(stage / "variants" / name)
    for table in TABLES.values():
        (stage / table).unlink(missing_ok=True)


def measure_variants(
    source: Source, stage: Path, names: list[str], options: Options, bases: dict[str, Base]
) -> dict[str, Variant]:
    """Measure fp32 and the named variants, whose graphs are written below `stage`.

    Latency is measured last, with all variants taking turns.
    """
    variants = {"fp32": remeasure_fp32(source, stage)}
    for name in names:
        variants[name] = measure_or_resume(source, stage, name, options, bases[Recipe.named(name).base])
    shutil.rmtree(stage / "draft", ignore_errors=True)
    engines = {
        name: source.engine(stage / "variants" / name, read_item_table(stage / variant.items))
        for name, variant in variants.items()
    }
    latency = measure_latency(engines, source.manifest)
    return {name: variant.model_copy(update={"latency_ms": latency[name]}) for name, variant in variants.items()}


def remove_unpublished(stage: Path, variants: dict[str, Variant], published: dict[str, Variant]) -> None:
    for name in variants.keys() - published.keys():
        shutil.rmtree(stage / "variants" / name)
    for table in {*TABLES.values()} - {variant.items for variant in published.values()}:
        (stage / table).unlink(missing_ok=True)


def write_report(
    stage: Path, variants: dict[str, Variant], exit: str, reasons: dict[str, str], bases: dict[str, Base]
) -> None:
    """Add all variants and the ranks of the low-rank forms to report.json; write variants.md and variants.png."""
    folders = {name for name in variants if (stage / "variants" / name).exists()}
    table = variants_table(variants, exit, reasons, folders & reasons.keys())
    print(table)
    (stage / "variants.md").write_text(table + "\n")
    plot_variants(variants, exit, stage / "variants.png")
    report = json.loads((stage / "report.json").read_text()) if (stage / "report.json").exists() else {}
    report["variants"] = {
        name: variant.model_dump(exclude={"golden_scores"})
        | {"published": name in folders, "reason": reasons.get(name)}
        for name, variant in variants.items()
    }
    report["ranks"] = {kind: base.ranks for kind, base in sorted(bases.items()) if base.ranks}
    write_json(stage / "report.json", report)


def read_shape(text: str) -> dict[str, int]:
    """Parse "blocks=1,key_size=16". Raises ValueError for other text."""
    try:
        return {name: int(value) for name, _, value in (part.partition("=") for part in text.split(",") if part)}
    except ValueError:
        raise ValueError(f"{text!r} is no shape: blocks=1,feed_forward=2,...") from None


def read_shares(text: str) -> tuple[float, ...]:
    """Parse "0.75,0.5,0.25". Raises ValueError for numbers that are no shares, or not in descending order."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--share {text}: no number, or numbers with a comma between them") from None
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"--share {text}: a share is above 0 and at most 1")
    if any(later >= share for share, later in itertools.pairwise(shares)):
        raise ValueError(f"--share {text}: several shares descend, the largest one first")
    if odd := [share for share in shares[1:] if round(share, 2) != share]:
        raise ValueError(f"--share {text}: {odd[0]:g} is no whole percentage, which the names of its variants have")
    return shares


def check_names(names: Iterable[str], shares: Sequence[float]) -> None:
    """Raise ValueError for a name that is no variant's, or that has another share than those."""
    kinds = low_rank_kinds(shares)
    for name in names:
        base = Recipe.named(name).base
        if base.startswith("lowrank") and base not in kinds:
            raise ValueError(f"{name}: --share has no such share; its low-rank forms are {', '.join(kinds)}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slatewise compress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "default: %(default)s"
    bundle = "the bundle to compress: <root>/<ranker>/<version>, or a ranker's newest bundle <root>/<ranker>"
    parser.add_argument("bundle", type=Path, help=bundle)
    parser.add_argument("toml", type=Path, nargs="?", help="TOML of its training")
    parser.add_argument("--folder", type=Path, help="the training's folder; default: build/train/NAME")
    variants = f"default: {','.join(variant_names(Options.shares))}, and those of more shares"
    parser.add_argument("--variants", help=variants)
    epochs = f"epochs that low-rank models, students and the table of tables4 are trained; {default}"
    parser.add_argument("--epochs", type=int, default=0, help=epochs)
    loss = f"of these epochs: the distance from fp32's scores, or the loss of the training; {default}"
    parser.add_argument("--loss", choices=LOSSES, default="teacher", help=loss)
    rate = f"learning rate of these epochs; {default}"
    parser.add_argument("--learning-rate", type=float, default=DistillConfig.learning_rate, help=rate)
    parser.add_argument("--method", choices=METHODS, default="afm", help=f"of low rank; {default}")
    parser.add_argument("--layers", default="", help="that low rank factors, as up,down; default: all dense layers")
    share = (
        "share of these layers' cost that the low-rank form may have, or several, as 0.75,0.5,0.25: one set of weights "
        f"whose smaller ranks are the variants lowrank-50 and lowrank-25; {default}"
    )
    parser.add_argument("--share", default="0.5", help=share)
    parser.add_argument("--budget", choices=("size", "time"), default="size", help=f"cost of a layer; {default}")
    least = f"lowest rank of a layer; with {INTEGER_SIDE}, int8 multiplies all of them as integers; {default}"
    parser.add_argument("--least-rank", type=int, default=1, help=least)
    student = "shape of the student, as blocks=1,feed_forward=2,key_size=32; default: half of each"
    parser.add_argument("--student", default="", help=student)
    bits = f"bits of int8 weights; {FULL_BITS} need a processor with VNNI; {default}"
    parser.add_argument("--bits", type=int, choices=(SAFE_BITS, FULL_BITS), default=SAFE_BITS, help=bits)
    forced = "variants to publish for requests that name them, also if they fail the gate or are dominated; alone: all"
    parser.add_argument("--force", nargs="?", default="", metavar="VARIANTS", help=forced)
    sampled = f"evaluate all users; default: the same sample of {SAMPLED_USERS:,} for each variant"
    parser.add_argument("--all-users", action="store_true", help=sampled)
    return parser


def main(argv: Sequence[str]) -> None:
    args = make_parser().parse_args(argv)
    folder = bundle_folder(args.bundle.absolute())  # absolute: the root folder of "." is not its parent
    shares = read_shares(args.share)
    names = variant_names(shares) if args.variants is None else list(dict.fromkeys(listed(args.variants)))
    forced = names if args.force is None else listed(args.force)
    check_names([*names, *forced], shares)
    if args.least_rank < 1:
        raise ValueError(f"--least-rank {args.least_rank}: a rank is at least 1")
    options = Options(
        method=args.method,
        layers=tuple(listed(args.layers)),
        shares=shares,
        budget=args.budget,
        least_rank=args.least_rank,
        shape=read_shape(args.student),
        distill=DistillConfig(epochs=args.epochs, loss=args.loss, learning_rate=args.learning_rate)
        if args.epochs
        else None,
        bits=args.bits,
    )
    source = open_source(folder, args.toml, args.folder, None if args.all_users else SAMPLED_USERS)
    print(compress(source, folder.parents[1], names, options, forced))


def open_source(folder: Path, toml: Path | None, training: Path | None, most_users: int | None) -> Source:
    """Open the bundle in a folder, together with the data of a TOML if one is given.

    training: folder of the training, whose search may have found values; default: build/train/NAME. most_users: see
    `Source`.
    """
    if toml is None:
        return Source(folder, None)
    config = read_config(toml)
    known = vocabulary_of(folder, read_manifest(folder))  # an update has its new items behind the older ones
    data, config = load_for_training(config, training_folder(config, training), known)
    return Source(folder, data, config.train, most_users)
