"""The cells as a plot.

Called by: `__main__.py`. Calls: matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from loadtest.peers.measurements import EXACT
from loadtest.peers.report import KNOWN, Cells, Series, Value, cpu, middle, name_of, p50, throughput

TITLE = EXACT.title


def plot(cells: Cells, path: Path) -> None:
    """Draw medians, with the least and the greatest value over the rounds as error bars."""
    bars = [
        (f"{name_of(entry)}, {users}", cells.of(entry, 4, users))
        for entry in reversed(cells.ours)
        for users in reversed(KNOWN)
    ]
    entries = [*cells.ours, *cells.peers]
    bars += [(name_of(entry), cells.of(entry, 4)) for entry in reversed(entries)]
    waits = [(name_of(entry), cells.of(entry, 1)) for entry in reversed(entries)]
    figure, axes = plt.subplots(1, 3, figsize=(18, 0.4 * len(bars) + 1.5), layout="constrained")
    draw(axes[0], bars, throughput, "requests a second, 4 connections")
    draw(axes[1], bars, cpu, "CPU ms a request, 4 connections")
    draw(axes[2], waits, p50, "p50 in ms, 1 connection, distinct users")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw(axes: plt.Axes, bars: Sequence[tuple[str, Series]], value: Value, title: str) -> None:
    middles = [middle(series, value) for _, series in bars]
    low = [m - min(map(value, series)) for m, (_, series) in zip(middles, bars, strict=True)]
    high = [max(map(value, series)) - m for m, (_, series) in zip(middles, bars, strict=True)]
    colours = ["tab:blue" if name.startswith(TITLE) else "tab:gray" for name, _ in bars]
    drawn = axes.barh([name for name, _ in bars], middles, xerr=(low, high), color=colours, ecolor="black", capsize=2)
    axes.bar_label(drawn, [f" {m:.1f}" for m in middles], label_type="center", color="white")
    axes.set_title(title)
