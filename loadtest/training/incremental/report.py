"""The table and the plot of the study of updates: results.md and incremental.png.

Called by: `__main__.py`. Calls: matplotlib, `evaluation/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from loadtest.markdown import table
from slatewise_train.evaluation.metrics import BOOTSTRAPS
from slatewise_train.evaluation.report import difference_cell, save_figure

TEXT = "results.md"
PLOT = "incremental.png"
COLOURS = {"stale": "0.6", "plain": "tab:orange", "free": "tab:red", "penalised": "tab:blue", "full": "tab:green"}
Row = Mapping[str, Any]


def by_day(rows: Sequence[Row]) -> dict[int, dict[str, Row]]:
    """Return the rows by day, ascending, and by ranker."""
    found: dict[int, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row["day"]):
        found.setdefault(row["day"], {})[row["arm"]] = row
    return found


def day_cells(arms: Mapping[str, Row]) -> list[object]:
    """Return the cells of a day; None for a ranker that is not measured yet."""
    new, full = arms.get("penalised"), arms.get("full")
    first = next(iter(arms.values()))
    quality = [f"{arms[arm]['ndcg10']:.4f}" if arm in arms else None for arm in COLOURS]
    share = cost = stable = None
    if new is not None:
        plain = arms.get("plain")
        stable = f"{new['overlap10']:.2f}" + ("" if plain is None else f" ({plain['overlap10']:.2f})")
        if full is not None:
            share = f"{new['ndcg10'] / full['ndcg10']:.1%}"
            if full["seconds"]:
                cost = f"{new['seconds']:.1f} of {full['seconds']:.0f} s, {new['seconds'] / full['seconds']:.1%}"
    date = first["date"] + (" (not counted)" if first["day"] == 1 else "")
    return [date, first["events"], first["cases"], *quality, share, cost, stable]


def interval_by_user(gaps: np.ndarray, users: np.ndarray) -> list[float]:
    """Return [mean, low, high] of cases (n,), with a 95 % bootstrap interval over users: cases of one are alike."""
    _, place = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(place, gaps), np.bincount(place)
    draws = np.random.default_rng(0).integers(0, len(sums), (BOOTSTRAPS, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return [round(float(value), 4) for value in (gaps.mean(), *np.quantile(means, [0.025, 0.975]))]


def differences(rows: Sequence[Row], users: Mapping[int, np.ndarray]) -> list[str]:
    """Return sentences about NDCG@10 of `penalised` minus that of the others, paired by case, without the first day.

    users: of the cases, by day.
    """
    days = {day: arms for day, arms in by_day(rows).items() if day > 1}  # the first one chose the settings
    lines = []
    for other in ("stale", "plain", "free", "full"):
        both = {day: arms for day, arms in days.items() if "penalised" in arms and other in arms}
        if both:
            gaps = {
                day: np.array(arms["penalised"]["gains"]) - np.array(arms[other]["gains"]) for day, arms in both.items()
            }
            each = [interval_by_user(gap, users[day]) for day, gap in gaps.items()]
            owners = np.concatenate([users[day] for day in gaps])
            cell = difference_cell(interval_by_user(np.concatenate(list(gaps.values())), owners))
            lines.append(
                f"- `penalised` minus `{other}`, {len(both)} days: {cell}; at least as good on "
                f"{sum(gap.mean() >= 0 for gap in gaps.values())}, the whole interval above 0 on "
                f"{sum(low > 0 for _, low, _ in each)}, and below 0 on {sum(high < 0 for _, _, high in each)}."
            )
    return lines


def write_report(out: Path, rows: Sequence[Row], users: Mapping[int, np.ndarray]) -> None:
    """Write results.md and incremental.png, and print the text. users: of the cases, by day."""
    days = by_day(rows)
    titles = ["day", "events", "cases", *COLOURS, "of full", "CPU time", "overlap of the ten best (plain)"]
    first = next((row for row in rows if row["arm"] == "penalised"), rows[0])
    settings = ", ".join(f"{name} {value}" for name, value in first["update"].items())
    text = "\n".join(
        [
            table(titles, [day_cells(arms) for arms in days.values()]),
            "",
            *differences(rows, users),
            "",
            f"NDCG@10 on the next day. Update: {settings}. Full: {first['epochs']} epochs. {first['cpu']}.",
        ]
    )
    (out / TEXT).write_text(text + "\n", encoding="utf-8")
    print(text)
    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    for arm, colour in COLOURS.items():
        points = [(arms[arm]["date"][5:], arms[arm]["ndcg10"]) for arms in days.values() if arm in arms]
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=arm)
    axes.set_xlabel("newest day that the ranker has learned from")
    axes.set_ylabel("NDCG@10 on the next day")
    axes.legend()
    save_figure(figure, out / PLOT, 100)
