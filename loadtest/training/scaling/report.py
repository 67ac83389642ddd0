"""The plot and the tables of the scaling study: results.md and scaling.png.

Called by: `study.py`. Calls: matplotlib, `runs.py`, `evaluation/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from loadtest.training.scaling.flops import CANDIDATES
from loadtest.training.scaling.runs import DEEP, Row
from slatewise_train.evaluation.metrics import BOOTSTRAPS, gains, interval
from slatewise_train.evaluation.report import Interval, difference_cell, markdown_table, save_figure

TEXT = "results.md"
PLOT = "scaling.png"
LEAST_SIZES = 3  # for a slope
EXITS = ("dot", "point")
ALL = "all"


def fit(flops: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Return the slope of least squares for each row of (n, runs), per decade of FLOPs; NaN if all FLOPs are equal."""
    x = np.log10(flops)
    x = x - x.mean(axis=1, keepdims=True)
    spread = (x**2).sum(axis=1)
    spread[spread < 1e-9] = np.nan
    slopes: np.ndarray = (x * quality).sum(axis=1) / spread
    return slopes


def slope(flops: np.ndarray, quality: np.ndarray) -> Interval | None:
    """Return the slope of quality (runs,) per decade of FLOPs (runs,), and its 95 % bootstrap interval over the runs.

    None with fewer than three different FLOPs: a line through two points has no interval.
    """
    if len(np.unique(flops)) < LEAST_SIZES:
        return None
    draws = np.random.default_rng(0).integers(0, len(flops), (BOOTSTRAPS, len(flops)))
    ends = np.nanquantile(fit(flops[draws], quality[draws]), [0.025, 0.975])
    found = (fit(flops[None], quality[None])[0], *ends)
    return [round(float(value), 6) + 0.0 for value in found]  # without the sign of a zero


def values(rows: Sequence[Row], exit: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the FLOPs of a request and NDCG@10 of runs: (runs,) each."""
    return np.array([row["flops"][exit] for row in rows], float), np.array([row["ndcg10"][exit] for row in rows])


def plain(rows: Sequence[Row]) -> list[Row]:
    """Return the runs with gates and with all features."""
    return [row for row in rows if row["gates"] and row["features"]]


def by_history(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the plain runs by length of history, ascending, and all of them together."""
    found = {str(n): [row for row in plain(rows) if row["history"] == n] for n in sorted({r["history"] for r in rows})}
    return found | {ALL: plain(rows)}


def slope_text(found: Interval | None) -> str:
    if found is None:
        return f"not measured: fewer than {LEAST_SIZES} sizes"
    return difference_cell(found)


def slopes_table(rows: Sequence[Row]) -> list[str]:
    cells = []
    for exit in EXITS:
        for name, some in by_history(rows).items():
            found = slope(*values(some, exit))
            sign = "" if found is None else "above 0" if found[1] > 0 else "below 0" if found[2] < 0 else "holds 0"
            cells.append([exit, name, str(len(some)), slope_text(found), sign])
    return markdown_table(["exit", "history", "runs", "NDCG@10 per decade of FLOPs", "interval"], cells)


def runs_table(rows: Sequence[Row]) -> list[str]:
    """Return a line for each size, history and kind of run. NDCG@10: the mean of the seeds, and that of each."""
    groups: dict[tuple[int, int, int, bool, bool], list[Row]] = {}
    for row in rows:
        key = (row["history"], row["flops"]["point"], row["width"], row["gates"], row["features"])
        groups.setdefault(key, []).append(row)
    cells = []
    for _, some in sorted(groups.items()):
        first = some[0]
        line = [f"{first['width']} x {first['blocks']}", str(first["history"])]
        line += ["yes" if first[name] else "no" for name in ("gates", "features")]
        line += [f"{first['parameters']:,}", *(f"{first['flops'][exit] / 1e6:,.1f}" for exit in EXITS)]
        for exit in EXITS:
            found = values(some, exit)[1]
            line.append(f"{found.mean():.4f} ({', '.join(f'{value:.4f}' for value in found)})")
        cells.append(line)
    names = ["width x blocks", "history", "gates", "features", "weights", "MFLOPs dot", "point", "NDCG@10 dot", "point"]
    return markdown_table(names, cells)


def paired(rows: Sequence[Row], without: str) -> list[tuple[Row, Row]]:
    """Return runs and the runs of the same size, history and seed without gates or without features."""

    def key(row: Row) -> tuple[int, ...]:
        return row["width"], row["blocks"], row["history"], row["seed"]

    whole = {key(row): row for row in plain(rows)}
    return [(whole[key(row)], row) for row in rows if not row[without] and key(row) in whole]


def difference(pairs: Sequence[tuple[Row, Row]], exit: str) -> Interval:
    """Return [mean, low, high] of the difference of NDCG@10, first minus second, paired by validation user.

    The gains of a user are the mean over the seeds. So the interval is that of other users, not of other seeds.
    """
    each = [gains(np.array(a["ranks"][exit])) - gains(np.array(b["ranks"][exit])) for a, b in pairs]
    return interval(np.mean(each, axis=0))


def comparisons_table(rows: Sequence[Row]) -> list[str]:
    cells = []
    names = {"gates": f"gated - ungated, {DEEP} blocks", "features": "all features - none"}
    for without, name in names.items():
        if not (pairs := paired(rows, without)):
            continue
        for exit in EXITS:
            seeds = ", ".join(f"{a['ndcg10'][exit] - b['ndcg10'][exit]:+.4f}" for a, b in pairs)
            ratio = pairs[0][0]["flops"][exit] / pairs[0][1]["flops"][exit]
            cells.append([name, exit, difference_cell(difference(pairs, exit)), seeds, f"{ratio:.2f}"])
    columns = ["comparison", "exit", "difference of NDCG@10", "by seed", "ratio of FLOPs"]
    return markdown_table(columns, cells) if cells else []


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot NDCG@10 against FLOPs by exit: a colour for each history, black without gates or without features."""
    figure = Figure(figsize=(13, 5.5))
    groups = by_history(rows)
    colours = {name: f"C{k}" for k, name in enumerate(groups)} | {ALL: "0.6"}
    for axis, exit in zip(figure.subplots(1, 2, sharey=True), EXITS, strict=True):
        for name, some in groups.items():
            flops, quality = values(some, exit)
            found = slope(flops, quality)
            label = "all histories" if name == ALL else f"history {name}"
            label += f": {slope_text(found)}" if found else ""
            if found is not None:
                ends = np.array([flops.min(), flops.max()])
                level = quality.mean() + found[0] * (np.log10(ends) - np.log10(flops).mean())
                axis.plot(ends, level, color=colours[name], linestyle=":" if name == ALL else "-", label=label)
            if name != ALL:
                axis.plot(flops, quality, "o", color=colours[name], label=None if found else label)
        for without, marker in (("gates", "x"), ("features", "s")):
            some = [row for row in rows if not row[without]]
            if some:
                axis.plot(*values(some, exit), linestyle="", marker=marker, color="k", label=f"without {without}")
        axis.set(xscale="log", xlabel=f"FLOPs of a request, {CANDIDATES} candidates, history not cached")
        axis.set(title=f"exit {exit}; slopes per decade with 95 % intervals over runs")
        axis.set(ylabel="NDCG@10, validation users, full catalogue")
        axis.legend(fontsize="small")
    save_figure(figure, path, dpi=110)


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Write the plot and the Markdown of the finished runs; nothing without plain runs."""
    if not plain(rows):
        return
    plot(rows, folder / PLOT)
    epochs = sorted({row["epochs"] for row in rows})
    devices = sorted({row["device"] for row in rows})
    users = len(rows[0]["ranks"]["dot"])
    text = [
        f"{len(rows)} runs of {' to '.join(map(str, epochs[:: max(1, len(epochs) - 1)]))} epochs, "
        f"{users:,} validation users, full catalogue; {'; '.join(devices)}; "
        f"{sum(row['seconds'] for row in rows) / 3600:.1f} hours.",
        "",
        f"FLOPs of a request with a history of that many events, not cached, and {CANDIDATES} candidates. Slopes have "
        "95 % bootstrap intervals over runs, differences have them over users.",
        "",
        *slopes_table(rows),
        "",
        *runs_table(rows),
        "",
        *comparisons_table(rows),
        "",
        f"![NDCG@10 against FLOPs]({PLOT})",
    ]
    (folder / TEXT).write_text("\n".join(text) + "\n", encoding="utf-8")
