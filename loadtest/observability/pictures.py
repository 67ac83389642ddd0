"""Pictures of the dashboards, drawn with matplotlib from the dashboards' own queries.

Called by: `dashboards.py`. Calls: matplotlib.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from loadtest.observability.faults import Observation
from loadtest.observability.prometheus import Series

Drawn = tuple[dict[str, Any], list[tuple[dict[str, Any], list[Series]]]]  # panel, (target, series)


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), target["legendFormat"]).strip()[:40]


def draw(path: Path, drawn: list[Drawn], seen: Observation) -> None:
    """Draw one dashboard, three panels in a row, with shaded and numbered faults."""
    rows = math.ceil(len(drawn) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(18, 2.9 * rows), squeeze=False)
    for axis, (panel, queries) in zip(axes.flat, drawn):
        draw_panel(axis, panel, queries, seen.begin)
        mark_faults(axis, seen)
        axis.set_xlim(0, seen.end - seen.begin)
        axis.tick_params(labelsize=6)
    for axis in axes.flat[len(drawn) :]:
        axis.axis("off")
    names = "   ".join(f"{k + 1} {fault.name}" for k, fault in enumerate(seen.faults))
    title = (
        f"Slatewise: {path.stem}. Drawn with matplotlib from the dashboard's own queries, not by Grafana; x in seconds."
    )
    figure.suptitle(f"{title}\nFaults: {names}", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=65)
    plt.close(figure)


def draw_panel(
    axis: Any, panel: dict[str, Any], queries: list[tuple[dict[str, Any], list[Series]]], begin: float
) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    axis.set_title(f"{panel['title']} [{defaults['unit']}]", fontsize=9)
    stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    lines = [(legend(target, labels), points) for target, series in queries for labels, points in series if points]
    if panel["type"] == "heatmap":
        draw_heat_map(axis, queries[0][1], begin)
    elif panel["type"] == "state-timeline":
        draw_states(axis, panel, lines, begin)
    elif stacked and lines:
        times = sorted({at for _, points in lines for at, _ in points})
        values = [[dict(points).get(at, 0.0) for at in times] for _, points in lines]
        axis.stackplot([at - begin for at in times], values, labels=[label for label, _ in lines], alpha=0.8)
    else:
        for label, points in lines:
            axis.plot([at - begin for at, _ in points], [value for _, value in points], label=label, linewidth=1)
    if panel["type"] not in ("heatmap", "state-timeline") and 1 < len(lines) <= 10:
        axis.legend(fontsize=6, loc="upper left")
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
    axis.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=6)


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
        axis.axvspan(begin, end, color="orange", alpha=0.15, linewidth=0)
        transform = axis.get_xaxis_transform()
        axis.text((begin + end) / 2, 0.93, str(k + 1), transform=transform, fontsize=6, ha="center")
