"""Pictures of the dashboards, drawn with matplotlib from the dashboards' own queries.

Called by: `dashboards.py`. Calls: matplotlib.
"""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from loadtest.observability.faults import Observation
from loadtest.observability.prometheus import Series

COLUMNS = 2
WIDTH, DPI = 14, 80  # 1,120 pixels: a page shows it at 0.8 of its size or so, with type of about 10 pixels
FONT = 11  # points
UNITS = {"none": "", "s": "", "reqps": "requests/s", "ops": "per second", "bytes": "", "percentunit": ""}
FORMATS = {
    "s": FuncFormatter(lambda value, _: f"{value:g} s" if value >= 1 or not value else f"{value * 1e3:g} ms"),
    "bytes": EngFormatter("B"),
    "percentunit": PercentFormatter(1.0, decimals=None),
}

Drawn = tuple[dict[str, Any], list[tuple[dict[str, Any], list[Series]]]]  # panel, (target, series)


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), target["legendFormat"]).strip()[:40]


def draw(path: Path, drawn: list[Drawn], seen: Observation) -> None:
    """Draw one dashboard, two panels in a row, with shaded and numbered faults."""
    rows = math.ceil(len(drawn) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(WIDTH, 2.6 * rows + 1), squeeze=False)
    for axis, (panel, queries) in zip(axes.flat, drawn):
        draw_panel(axis, panel, queries, seen.begin)
        mark_faults(axis, seen)
        axis.set_xlim(0, seen.end - seen.begin)
        axis.tick_params(labelsize=FONT)
    for axis in axes.flat[len(drawn) :]:
        axis.axis("off")
    names = "   ".join(f"{k + 1} {fault.name}" for k, fault in enumerate(seen.faults))
    title = f"Slatewise: {path.stem}. Drawn by matplotlib from the dashboard's own queries; x in seconds of the check."
    figure.suptitle("\n".join([title, *textwrap.wrap(f"Faults: {names}", 180)]), fontsize=FONT + 1)
    height = 2.6 * rows + 1  # inches
    figure.subplots_adjust(
        left=0.06, right=0.84, wspace=0.48, hspace=0.38, bottom=0.35 / height, top=1 - 1.3 / height
    )  # legends are on the right of each panel
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_panel(
    axis: Any, panel: dict[str, Any], queries: list[tuple[dict[str, Any], list[Series]]], begin: float
) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults["unit"]
    axis.set_title(panel["title"] + (f", {UNITS[unit]}" if UNITS[unit] else ""), fontsize=FONT + 1)
    if unit in FORMATS:
        axis.yaxis.set_major_formatter(FORMATS[unit])
    stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    lines = [(legend(target, labels), points) for target, series in queries for labels, points in series if points]
    if panel["type"] == "heatmap":
        draw_heat_map(axis, queries[0][1], begin)
    elif panel["type"] == "state-timeline":
        draw_states(axis, panel, lines, begin)
    elif stacked and lines:
        times = sorted({at for _, points in lines for at, _ in points})
        values = [[dict(points).get(at, 0.0) for at in times] for _, points in lines]
        axis.stackplot([at - begin for at in times], values, labels=[label for label, _ in lines])
    else:
        for label, points in lines:
            axis.plot([at - begin for at, _ in points], [value for _, value in points], label=label, linewidth=1.5)
    if defaults.get("min") == 0:
        axis.set_ylim(bottom=0)
    if panel["type"] not in ("heatmap", "state-timeline") and 1 < len(lines) <= 10:
        axis.legend(fontsize=FONT - 2, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # beside the curves
    for step in defaults.get("thresholds", {}).get("steps", [])[1:]:
        if panel["type"] == "timeseries":
            axis.axhline(step["value"], color="red", linestyle="--", linewidth=0.8)


def draw_states(axis: Any, panel: dict[str, Any], lines: list[Any], begin: float) -> None:
    """One row of squares for each line; red means an open circuit or a firing alert."""
    for row, (label, points) in enumerate(lines):
        colors = [
            "#2a2" if value == 0 and "Circuit" not in label and panel["title"] != "Alerts" else "#d33"
            for _, value in points
        ]
        axis.scatter([at - begin for at, _ in points], [row] * len(points), c=colors, s=6, marker="s")
    axis.set_yticks([])
    axis.set_ylim(-0.7, len(lines) - 0.3)
    size = FONT - 2 if len(lines) < 12 else FONT - 5
    for row, (label, _) in enumerate(lines):
        transform = axis.get_yaxis_transform()
        axis.text(1.02, row, label, transform=transform, fontsize=size, va="center")


def draw_heat_map(axis: Any, series: list[Series], begin: float) -> None:
    """Buckets are cumulative over `le`, so a cell is the difference of two."""
    edges = sorted((float(labels["le"]), dict(points)) for labels, points in series)
    times = sorted({at for _, points in edges for at in points})
    below = [0.0] * len(times)
    grid = []
    for _, points in edges:
        row = [points.get(at, 0.0) for at in times]
        grid.append([max(0.0, high - low) for high, low in zip(row, below)])
        below = row
    extent = (times[0] - begin, times[-1] - begin, 0, len(edges))
    axis.imshow(grid, aspect="auto", origin="lower", cmap="Blues", extent=extent)
    axis.set_yticks([k + 0.5 for k in range(0, len(edges), 3)], [f"{edge:g}" for edge, _ in edges[::3]])


def mark_faults(axis: Any, seen: Observation) -> None:
    for k, fault in enumerate(seen.faults):
        begin = fault.begin - seen.begin
        end = fault.end - seen.begin
        axis.axvspan(begin, end, color="#fdebd0", linewidth=0, zorder=0)  # behind the areas, whose colours stay
        transform = axis.get_xaxis_transform()
        axis.text((begin + end) / 2, 0.93, str(k + 1), transform=transform, fontsize=FONT - 2, ha="center")
