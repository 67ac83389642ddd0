"""Cells to Markdown tables and a plot.

Before: `measurements.py`. After: report.md, report.png.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from loadtest.peers.contenders import PEERS
from loadtest.peers.environments import GRAPHS
from loadtest.peers.measurements import EXACT, Cell, Entry

Series = list[Cell]  # one cell a round
TITLE = EXACT.title


class Cells:
    def __init__(self, cells: Sequence[Cell], ours: Sequence[Entry], peers: Sequence[Entry]) -> None:
        self.cells = [cell for cell in cells if cell.phase == "measurement"]
        self.ours = ours
        self.peers = peers

    def of(self, entry: Entry, connections: int, users: str = "distinct") -> Series:
        labels = (entry.name, entry.graph, connections, users)
        return sorted(
            (c for c in self.cells if (c.name, c.graph, c.connections, c.users) == labels), key=lambda c: c.round
        )

    def best(self, graph: str, connections: int, value: Callable[[Cell], float]) -> tuple[Entry, Series]:
        """The peer whose median value is highest."""
        peers = [(entry, self.of(entry, connections)) for entry in self.peers if entry.graph == graph]
        return max(peers, key=lambda found: middle(found[1], value))


def middle(series: Series, value: Callable[[Cell], float]) -> float:
    return median(map(value, series))


def throughput(cell: Cell) -> float:
    return cell.per_second


def quickness(cell: Cell) -> float:
    return 1 / cell.p50_ms


def name_of(entry: Entry) -> str:
    return f"{entry.title}, {entry.graph}"


def spread(series: Series, value: Callable[[Cell], float]) -> str:
    values = [value(cell) for cell in series]
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def side_by_side(cells: Cells) -> str:
    rows = []
    for entry in (*cells.ours, *cells.peers):
        four = cells.of(entry, 4)
        one = cells.of(entry, 1)
        rows.append(row(name_of(entry), "distinct", four, one))
    for entry in cells.ours:
        for users in ("returning", "growing"):
            rows.append(row(name_of(entry), users, cells.of(entry, 4, users), []))
    names = [
        "server",
        "users",
        "workers x threads, 4 connections",
        "req/s",
        "p50 ms",
        "p99 ms",
        "CPU ms a request",
        "resident MB",
    ]
    names += ["workers x threads, 1 connection", "p50 ms"]
    return "\n".join([f"| {' | '.join(names)} |", "| --- " * len(names) + "|", *rows])


def row(title: str, users: str, four: Series, one: Series) -> str:
    columns = [
        title,
        users,
        four[0].setup or "default",
        spread(four, throughput),
        spread(four, lambda c: c.p50_ms),
        spread(four, lambda c: c.p99_ms),
    ]
    columns += [f"{middle(four, lambda c: c.cpu_ms):.1f}", f"{middle(four, lambda c: c.resident_mb):.0f}"]
    columns += [one[0].setup or "default", spread(one, lambda c: c.p50_ms)] if one else ["", ""]
    return f"| {' | '.join(columns)} |"


def ratios(cells: Cells) -> str:
    """Each is formed round by round; the median over the rounds, and the least and the greatest."""
    rows = []

    def add(
        entry: Entry,
        title: str,
        ours: Series,
        value: Callable[[Cell], float],
        best: tuple[Entry, Series],
        its: Callable[[Cell], float],
    ) -> None:
        found = [value(a) / its(b) for a, b in zip(ours, best[1], strict=True)]
        rows.append(
            f"| {entry.graph} | {title} | {best[0].title} | {median(found):.2f} | {min(found):.2f} to {max(found):.2f} |"
        )

    for entry in cells.ours:
        ours4 = cells.of(entry, 4)
        ours1 = cells.of(entry, 1)
        for graph in GRAPHS:
            add(
                entry,
                f"req/s at 4 connections, the peer on {graph}",
                ours4,
                throughput,
                cells.best(graph, 4, throughput),
                throughput,
            )
        for users in ("returning", "growing"):
            best = cells.best("straightforward", 4, throughput)
            known = cells.of(entry, 4, users)
            add(
                entry,
                f"req/s at 4 connections, our users {users}, the peer on straightforward",
                known,
                throughput,
                best,
                throughput,
            )
        for graph in GRAPHS:
            add(
                entry,
                f"p50 at 1 connection, the peer on {graph}",
                ours1,
                lambda c: c.p50_ms,
                cells.best(graph, 1, quickness),
                lambda c: c.p50_ms,
            )
        for graph in GRAPHS:
            best = cells.best(graph, 4, quickness)
            add(
                entry,
                f"our p99 to the peer's p50 at 4 connections, the peer on {graph}",
                ours4,
                lambda c: c.p99_ms,
                best,
                lambda c: c.p50_ms,
            )
    return "\n".join(
        [
            "| variant | ours / the best peer's | best peer | ratio | over the rounds |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def choices(cells: Sequence[Cell]) -> str:
    """What each set-up did in its short runs: the best of them."""
    tried = [cell for cell in cells if cell.phase == "choice"]
    rows = []
    for name, graph, setup in dict.fromkeys((c.name, c.graph, c.setup) for c in tried):
        mine = [c for c in tried if (c.name, c.graph, c.setup) == (name, graph, setup)]
        four = max(c.per_second for c in mine if c.connections == 4)
        one = min(c.p50_ms for c in mine if c.connections == 1)
        rows.append(f"| {PEERS[name].title}, {graph} | {setup} | {four:.1f} | {one:.1f} |")
    return "\n".join(
        [
            "| server | workers x threads | req/s, 4 connections | p50 ms, 1 connection |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def plot(cells: Cells, path: Path) -> None:
    """Medians, with the least and the greatest over the rounds."""
    bars = [
        (f"{name_of(entry)}, {users}", cells.of(entry, 4, users))
        for entry in reversed(cells.ours)
        for users in ("growing", "returning")
    ]
    entries = [*cells.ours, *cells.peers]
    bars += [(name_of(entry), cells.of(entry, 4)) for entry in reversed(entries)]
    waits = [(name_of(entry), cells.of(entry, 1)) for entry in reversed(entries)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.4 * len(bars) + 1.5), layout="constrained")
    draw(left, bars, throughput, "requests a second, 4 connections")
    draw(right, waits, lambda c: c.p50_ms, "p50 in ms, 1 connection, distinct users")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(axes: plt.Axes, bars: Sequence[tuple[str, Series]], value: Callable[[Cell], float], title: str) -> None:
    middles = [middle(series, value) for _, series in bars]
    low = [m - min(map(value, series)) for m, (_, series) in zip(middles, bars, strict=True)]
    high = [max(map(value, series)) - m for m, (_, series) in zip(middles, bars, strict=True)]
    colours = ["tab:blue" if name.startswith(TITLE) else "tab:gray" for name, _ in bars]
    drawn = axes.barh([name for name, _ in bars], middles, xerr=(low, high), color=colours, ecolor="black", capsize=2)
    axes.bar_label(drawn, [f" {m:.1f}" for m in middles], label_type="center", color="white")
    axes.set_title(title)
