"""The cells as Markdown tables and a plot.

Called by: `__main__.py`. Calls: matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from loadtest.markdown import table
from loadtest.peers.contenders import PEERS
from loadtest.peers.environments import GRAPHS
from loadtest.peers.measurements import EXACT, Cell, Entry

Series = list[Cell]  # one cell for each round
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
        """The peer with the highest median value, and its cells."""
        peers = [(entry, self.of(entry, connections)) for entry in self.peers if entry.graph == graph]
        return max(peers, key=lambda found: middle(found[1], value))


def middle(series: Series, value: Callable[[Cell], float]) -> float:
    return median(map(value, series))


def throughput(cell: Cell) -> float:
    return cell.per_second


def quickness(cell: Cell) -> float:
    return 1 / cell.p50_ms


def p50(cell: Cell) -> float:
    return cell.p50_ms


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
    titles = ("server", "users", "workers x threads, 4 connections", "req/s", "p50 ms", "p99 ms", "CPU ms a request")
    return table((*titles, "resident MB", "workers x threads, 1 connection", "p50 ms"), rows)


def row(title: str, users: str, four: Series, one: Series) -> list[str]:
    columns = [title, users, four[0].setup or "default"]
    columns += [spread(four, value) for value in (throughput, lambda c: c.p50_ms, lambda c: c.p99_ms)]
    columns += [f"{middle(four, lambda c: c.cpu_ms):.1f}", f"{middle(four, lambda c: c.resident_mb):.0f}"]
    columns += [one[0].setup or "default", spread(one, lambda c: c.p50_ms)] if one else ["", ""]
    return columns


@dataclass(frozen=True)
class Ratio:
    """A value of Slatewise over a value of the best peer, formed in each round."""

    title: str
    ours: Series
    value: Callable[[Cell], float]
    peer: tuple[Entry, Series]
    peer_value: Callable[[Cell], float]

    def row(self) -> list[str]:
        """Title, peer, median, least and greatest ratio."""
        entry, series = self.peer
        found = [self.value(a) / self.peer_value(b) for a, b in zip(self.ours, series, strict=True)]
        return [self.title, entry.title, f"{median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"]


def ratios_of(cells: Cells, entry: Entry) -> Iterator[Ratio]:
    four = cells.of(entry, 4)
    one = cells.of(entry, 1)
    for graph in GRAPHS:
        fastest = cells.best(graph, 4, throughput)
        yield Ratio(f"req/s at 4 connections, the peer on {graph}", four, throughput, fastest, throughput)
    for users in ("returning", "growing"):
        title = f"req/s at 4 connections, our users {users}, the peer on straightforward"
        fastest = cells.best("straightforward", 4, throughput)
        yield Ratio(title, cells.of(entry, 4, users), throughput, fastest, throughput)
    for graph in GRAPHS:
        quickest = cells.best(graph, 1, quickness)
        yield Ratio(f"p50 at 1 connection, the peer on {graph}", one, p50, quickest, p50)
    for graph in GRAPHS:
        title = f"our p99 to the peer's p50 at 4 connections, the peer on {graph}"
        yield Ratio(title, four, lambda c: c.p99_ms, cells.best(graph, 4, quickness), p50)


def ratios(cells: Cells) -> str:
    """The median of each ratio over the rounds, and its least and greatest."""
    rows = [(entry.graph, *ratio.row()) for entry in cells.ours for ratio in ratios_of(cells, entry)]
    return table(("variant", "ours / the best peer's", "best peer", "ratio", "over the rounds"), rows)


def choices(cells: Sequence[Cell]) -> str:
    """The best short run of each set-up."""
    tried = [cell for cell in cells if cell.phase == "choice"]
    rows = []
    for name, graph, setup in dict.fromkeys((c.name, c.graph, c.setup) for c in tried):
        mine = [c for c in tried if (c.name, c.graph, c.setup) == (name, graph, setup)]
        four = max(c.per_second for c in mine if c.connections == 4)
        one = min(c.p50_ms for c in mine if c.connections == 1)
        rows.append((f"{PEERS[name].title}, {graph}", setup, f"{four:.1f}", f"{one:.1f}"))
    return table(("server", "workers x threads", "req/s, 4 connections", "p50 ms, 1 connection"), rows)


def plot(cells: Cells, path: Path) -> None:
    """Draw medians, with the least and the greatest value over the rounds as error bars."""
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
