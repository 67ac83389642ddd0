"""Markdown tables and plots of training, export, compression and personalization.

Called by: `training_log.py`, `trained.py`, `export.py`, `compress.py`, `compression/variants.py`, `search.py`,
`meta/personalization.py`, `demo/`. Calls: matplotlib.
"""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from slatewise.bundle.manifest import Variant
from slatewise.process import cpu_name
from slatewise_train.rankers.base import EXITS

Interval = Sequence[float]  # mean, low and high end of a 95 % interval


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


def interval_cell(value: Interval) -> str:
    return f"{value[0]:.4f} ({value[1]:.4f} to {value[2]:.4f})"


def difference_cell(value: Interval, digits: int = 4) -> str:
    mean, low, high = (f"{number:+.{digits}f}" for number in value)
    return f"{mean} ({low} to {high})"


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)


# Training


BASELINES_FILE = "baselines.json"  # beside log.csv: HR@10 and NDCG@10 of the baselines on the validation users


def plot_training(log: Path) -> None:
    """Plot a training's log.csv beside it, as log.png: the loss, and the quality on the validation users.

    Vertical lines are the last epoch and the best validated one, horizontal lines the baselines.
    """
    with log.open() as file:
        rows = list(csv.DictReader(file))
    levels = log.with_name(BASELINES_FILE)
    baselines = json.loads(levels.read_text()) if levels.exists() else {}
    figure = Figure(figsize=(15, 4))
    left, *panels = figure.subplots(1, 3)
    left.plot([int(row["epoch"]) for row in rows], [float(row["loss"]) for row in rows], marker=".")
    left.set(xlabel="epoch", ylabel="training loss", title="rises when the exits point and set join")
    for axis, (metric, title) in zip(panels, (("hr10", "HR@10"), ("ndcg10", "NDCG@10")), strict=True):
        for name in [name for name in (rows[0] if rows else {}) if name.endswith(metric)]:
            points = [(int(row["epoch"]), float(row[name])) for row in rows if row[name]]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name.removesuffix(f"_{metric}"))
                best = max(points, key=lambda point: point[1])[0]
                axis.axvline(best, color=axis.lines[-1].get_color(), linestyle=":", label=f"best, epoch {best}")
        for k, (name, level) in enumerate(baselines.items()):
            axis.axhline(level[metric], color=f"C{5 + k}", linestyle="--", label=name)
        if rows:
            axis.axvline(int(rows[-1]["epoch"]), color="0.5", label=f"stopped, epoch {rows[-1]['epoch']}")
            axis.legend(fontsize="small")
        axis.set(xlabel="epoch", ylabel=f"{title}, validation users, full catalogue", ylim=(0, None))
    save_figure(figure, log.with_suffix(".png"), dpi=110)


# Quality by exit (report.json of a bundle)


def report_text(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown: the verdict in the first line, then the tables and the checks of the data."""
    parts = [report["verdict"]["line"], sample_line(report["sample"]), quality_table(report)]
    if "update" in report:
        parts.append(report["update"]["line"])
    if "pruning" in report:
        parts.append(pruning_text(report["pruning"]))
    if "exploration" in report:
        moved = ", ".join(f"{value:g} (`{head}`)" for head, value in report["exploration"].items())
        parts.append(f"A draw of scale 1 moves a logit by a standard deviation of {moved}.")
    parts += [f"Not measured: {reason}." for reason in report["not_measured"].values()]
    if report["baselines"]:
        settings = "; ".join(f"{name}: {text}" for name, text in report["baselines"].items())
        parts.append(f"Settings of the baselines: {settings}.")
    parts.append("\n".join(["Checks of the data:", *(f"- {check['line']}" for check in report["leakage"].values())]))
    return "\n\n".join(part for part in parts if part) + "\n"


def sample_line(sample: Mapping[str, int]) -> str:
    """Return a sentence about the users whose next item was ranked; empty if there are none, which has its reason."""
    if not sample["users"]:
        return ""
    if sample["users"] == sample["of"]:
        return f"All {sample['of']:,} users with a test event; intervals hold 95 %; ties in the order of the catalogue."
    return (
        f"A sample of {sample['users']:,} of {sample['of']:,} users (seed {sample['seed']}; `--all-users` takes all); "
        "intervals hold 95 %; ties in the order of the catalogue."
    )


def quality_table(report: Mapping[str, Any]) -> str:
    """Return Markdown of leave-one-out, held-out slates, the exits `set` minus `point`, and diversity.

    A table without a result is left out.
    """
    leave_one_out = [
        [name, str(row["users"]), interval_cell(row["hr10"]), interval_cell(row["ndcg10"])]
        for name, row in report["leave_one_out"].items()
    ]
    differences = [[name, difference_cell(value)] for name, value in report["set_against_point"].items()]
    tables = []
    if leave_one_out:
        tables.append(markdown_table(["leave-one-out, full catalogue", "users", "HR@10", "NDCG@10"], leave_one_out))
    if report["slates"]:
        tables.append(slate_table(f"held-out slates, `{report['label']}`", report["slates"]))
    if report.get("choices"):
        tables.append(slate_table("held-out slates, taken among shown", report["choices"]))
    if differences:
        tables.append(markdown_table(["`set` minus `point`, paired", "difference"], differences))
    if diversity := report.get("diversity"):
        lists = [
            [name, interval_cell(row["ndcg10"]), interval_cell(row["distance"]), f"{row['coverage']:.1%}"]
            for name, row in diversity.items()
            if "distance" in row
        ]
        columns = ["the ten best of leave-one-out", "NDCG@10", "mean distance of two items", "share of the catalogue"]
        tables.append(markdown_table(columns, lists))
    return "\n\n".join("\n".join(table) for table in tables)


def slate_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of slates, as Markdown."""
    lines = []
    for name, row in rows.items():
        unknown = "not measurable" if name in EXITS else ""
        error = f"{row['calibration_error']:.4f}" if "calibration_error" in row else unknown
        cells = [interval_cell(row["ndcg10"]), interval_cell(row["auc_in_slate"]), f"{row['auc']:.4f}", error]
        lines.append([name, str(row["slates"]), *cells])
    return markdown_table([title, "slates", "NDCG@10", "AUC in the slate", "AUC", "calibration error"], lines)


def pruning_text(row: Mapping[str, Any]) -> str:
    """Return whether the prune of the TOML is published, and the shares that decide."""
    rule = " and ".join(f"{exit} {count:,}" for exit, count in row["prune"].items() if count is not None)
    if not row["users"]:
        return f"Pruning ({rule}) is NOT PUBLISHED: no user has a test event."
    verdict = "is published" if row["published"] else "is NOT PUBLISHED"
    title = f"Pruning ({rule}) {verdict}: the ten best stay the same for at least {row['least']:.0%} of the users?"
    lists = f"{row['users']:,} users, lists of {row['candidates']:,} candidates on average"
    lines = [
        [
            f"`{exit}`",
            interval_cell(share),
            interval_cell(row["same_items"][exit]),
            difference_cell(row["ndcg10"][exit]),
        ]
        for exit, share in row["unchanged"].items()
    ]
    columns = [lists, "same ten items and order", "same ten items", "NDCG@10, pruned minus unpruned"]
    return "\n".join([title, "", *markdown_table(columns, lines)])


def plot_quality(report: Mapping[str, Any], path: Path) -> None:
    """Plot HR@10 and NDCG@10 of each exit and baseline, with 95 % intervals."""
    panels = (
        ("leave_one_out", "hr10", "HR@10, leave-one-out"),
        ("leave_one_out", "ndcg10", "NDCG@10, leave-one-out"),
        ("slates", "ndcg10", "NDCG@10, held-out slates"),
    )
    figure = Figure(figsize=(13, 4))
    if verdict := report.get("verdict"):
        figure.suptitle(textwrap.fill(verdict["line"], 150), fontsize="small")
    for axis, (table, metric, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        rows = report[table]
        for k, (name, row) in enumerate(rows.items()):
            mean, low, high = row[metric]
            color = "tab:blue" if name in EXITS else "0.7"
            axis.barh(k, mean, xerr=[[mean - low], [high - mean]], color=color, capsize=3)
        axis.set(yticks=range(len(rows)), yticklabels=list(rows), title=title)
        axis.invert_yaxis()
    save_figure(figure, path, dpi=100)


# Variants of a bundle (variants.md, variants.png)


def ndcg_by_table(variant: Variant, exit: str) -> dict[str, Interval]:
    """Return NDCG@10 of an exit, by table (leave_one_out, slates); empty if quality was not measured."""
    return {table: row["ndcg10"] for table, row in variant.quality.get(exit, {}).items()}


VARIANT_COLUMNS = (
    "variant",
    "KB on disk",
    "MB resident",
    "encode ms, p50 / p99",
    "score ms, p50 / p99",
    "HR@10",
    "NDCG@10",
    "minus fp32",
    "NDCG@10 of slates",
    "minus fp32",
    "AUC in the slate",
    "Kendall tau",
    "top 10",
    "bound",
    "published",
)


def variants_table(
    variants: Mapping[str, Variant], exit: str, reasons: Mapping[str, str], forced: Collection[str] = ()
) -> str:
    """Return Markdown with one row per variant.

    reasons: variant -> the reason against its publication; forced: the variants that are published nevertheless.
    """

    def published(name: str) -> str:
        if name not in reasons:
            return "yes"
        return f"{'by name only' if name in forced else 'no'}: {reasons[name]}"

    rows = [[name, *variant_cells(variant, exit), published(name)] for name, variant in variants.items()]
    title = f"`{exit}`, {cpu_name()}, one thread; times of history 200, 200 candidates"
    return "\n".join([title, "", *markdown_table(VARIANT_COLUMNS, rows)])


def variant_cells(variant: Variant, exit: str) -> list[str]:
    """Return the cells of VARIANT_COLUMNS between the name and the last column; empty for unknown values."""
    quality = variant.quality.get(exit, {})
    next_item = quality.get("leave_one_out", {})
    slates = quality.get("slates", {})
    shapes = variant.latency_ms.get("rows", [])
    times = next((row for row in shapes if (row["history"], row["candidates"]) == (200, 200)), None)

    def latency(stage: str) -> str:
        return "" if times is None else f"{times[f'{stage}_p50']:.2f} / {times[f'{stage}_p99']:.2f}"

    def mean(row: Mapping[str, Interval], metric: str) -> str:
        return f"{row[metric][0]:.4f}" if metric in row else ""

    def minus_fp32(metric: str) -> str:
        return difference_cell(variant.difference[metric]) if metric in variant.difference else ""

    return [
        f"{variant.bytes / 1024:.0f}",
        "" if variant.resident_bytes is None else f"{variant.resident_bytes / 2**20:.1f}",
        latency("encode"),
        latency("score"),
        mean(next_item, "hr10"),
        mean(next_item, "ndcg10"),
        minus_fp32("leave_one_out_ndcg10"),
        mean(slates, "ndcg10"),
        minus_fp32("slate_ndcg10"),
        mean(slates, "auc_in_slate"),
        str(variant.agreement.get("kendall_tau", "")),
        str(variant.agreement.get("top10_overlap", "")),
        f"{variant.bound:.0e}",
    ]


def plot_variants(variants: Mapping[str, Variant], exit: str, path: Path) -> None:
    """Plot NDCG@10 against latency. The area of a mark is the size on disk.

    If a variant has no NDCG, all marks show Kendall's tau between the orders of the variant and of fp32.
    """
    figure = Figure(figsize=(8, 5))
    axis = figure.subplots()
    measured = all(ndcg_by_table(variant, exit) for variant in variants.values())
    for name, variant in variants.items():
        tau = variant.agreement.get("kendall_tau", 1.0)
        mean, low, high = next(iter(ndcg_by_table(variant, exit).values())) if measured else (tau, tau, tau)
        x = variant.milliseconds
        axis.errorbar(x, mean, yerr=[[mean - low], [high - mean]], color="0.8", capsize=2, zorder=0)
        axis.scatter(x, mean, s=variant.bytes / 4096, alpha=0.5)
        axis.annotate(name, (x, mean), xytext=(6, 6), textcoords="offset points")
    axis.set(
        xlabel="ms, encode + score, summed over the measured shapes, one thread",
        ylabel="NDCG@10" if measured else "Kendall's tau with fp32",
    )
    save_figure(figure, path, dpi=110)


# Personalization

ARM_METRICS = {"query_loss": "query loss", "next_ndcg10": "NDCG@10 of next item", "like_ndcg10": "NDCG@10 of `like`"}


def length_labels(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the label of each history length. The last length stands for itself and all longer ones."""
    *shorter, longest = report["lengths"]
    return {length: length for length in shorter} | {longest: f"{longest}+"}


def personalization_table(report: Mapping[str, Any]) -> str:
    """Return Markdown with one row per history length and kind of vector (arm).

    It has means, and paired differences from the default vector.
    """
    labels = length_labels(report)
    rows = []
    for length, found in report["lengths"].items():
        for name, metrics in found["arms"].items():
            cells = [labels[length], str(found["users"]), name]
            for metric in ARM_METRICS:
                row = metrics[metric]
                compared = "minus_default" in row
                cells.append(f"{row['mean']:.4f}")
                cells.append(f"{difference_cell(row['minus_default'], 5)}, p {row['p']:.4f}" if compared else "")
            rows.append(cells)
    columns = ["events", "users", "arm"]
    columns += [name for title in ARM_METRICS.values() for name in (title, "minus default")]
    return "\n".join(markdown_table(columns, rows))


def plot_personalization(report: Mapping[str, Any], path: Path) -> None:
    """Plot the difference from the default vector, by history length.

    The curves are the adapted vector and the vector that was fitted to the user's own events.
    """
    labels = list(length_labels(report).values())
    figure = Figure(figsize=(13, 3.6))
    for axis, (metric, title) in zip(figure.subplots(1, len(ARM_METRICS)), ARM_METRICS.items(), strict=True):
        for shift, name in ((-0.1, "adapted"), (0.1, "own vector")):
            rows = [lengths["arms"][name][metric]["minus_default"] for lengths in report["lengths"].values()]
            mean, low, high = np.array(rows).T
            x = np.arange(len(rows)) + shift
            axis.errorbar(x, mean, [mean - low, high - mean], marker="o", capsize=3, label=name)
        axis.axhline(0, color="0.7")
        axis.set(xticks=range(len(labels)), xticklabels=labels, xlabel="events of the user")
        axis.set(title=f"{title}, minus default")
        axis.legend()
    save_figure(figure, path, dpi=100)
