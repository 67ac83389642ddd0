"""The cells as Markdown tables.

Called by: `__main__.py`; `plot.py` draws the same series. Calls: `choice.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from loadtest.markdown import table
from loadtest.peers.choice import best_cells
from loadtest.peers.measurements import Cell, Entry

Series = list[Cell]  # one cell for each round
Value = Callable[[Cell], float]
KNOWN = ("returning", "growing")


class Cells:
    """The cells of the measurement."""

    def __init__(self, cells: Sequence[Cell], ours: Sequence[Entry], peers: Sequence[Entry]) -> None:
        self.cells = [cell for cell in cells if cell.phase == "measurement"]
        self.ours = ours
        self.peers = peers
        self.graphs = list(dict.fromkeys(entry.graph for entry in peers))

    def of(self, entry: Entry, connections: int, users: str = "distinct") -> Series:
        labels = (entry.name, entry.graph, connections, users)
        return sorted(
            (c for c in self.cells if (c.name, c.graph, c.connections, c.users) == labels), key=lambda c: c.round
        )

    def best(self, graph: str, connections: int, value: Value) -> tuple[Entry, Series]:
        """The peer with the highest median value, and its cells."""
        peers = [(entry, self.of(entry, connections)) for entry in self.peers if entry.graph == graph]
        return max(peers, key=lambda found: middle(found[1], value))


def middle(series: Series, value: Value) -> float:
    return median(map(value, series))


def throughput(cell: Cell) -> float:
    return cell.per_second


def p50(cell: Cell) -> float:
    return cell.p50_ms


def quickness(cell: Cell) -> float:
    return 1 / cell.p50_ms


def cpu(cell: Cell) -> float:
    return cell.cpu_ms


def frugality(cell: Cell) -> float:
    return 1 / cell.cpu_ms


def name_of(entry: Entry) -> str:
    return f"{entry.title}, {entry.graph}"


def spread(series: Series, value: Value) -> str:
    values = [value(cell) for cell in series]
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def side_by_side(cells: Cells) -> str:
    rows = []
    for entry in (*cells.ours, *cells.peers):
        rows.append(row(name_of(entry), "distinct", cells.of(entry, 4), cells.of(entry, 1)))
    for entry in cells.ours:
        rows += [row(name_of(entry), users, cells.of(entry, 4, users), []) for users in KNOWN]
    titles = ("server", "users", "workers x threads, 4 connections", "req/s", "CPU ms a request", "p50 ms", "p99 ms")
    return table((*titles, "resident MB", "workers x threads, 1 connection", "p50 ms"), rows)


def row(title: str, users: str, four: Series, one: Series) -> list[str]:
    columns = [title, users, four[0].setup or "default", spread(four, throughput), spread(four, cpu)]
    columns += [f"{middle(four, value):.1f}" for value in (p50, lambda c: c.p99_ms)]
    columns += [f"{middle(four, lambda c: c.resident_mb):.0f}"]
    columns += [one[0].setup or "default", spread(one, p50)] if one else ["", ""]
    return columns


@dataclass(frozen=True)
class Ratio:
    """A value of Slatewise over a value of the best peer, formed in each round."""

    title: str
    ours: Series
    value: Value
    peer: tuple[Entry, Series]
    peer_value: Value

    def row(self) -> list[str]:
        """Title, peer, median, least and greatest ratio."""
        entry, series = self.peer
        found = [self.value(a) / self.peer_value(b) for a, b in zip(self.ours, series, strict=True)]
        return [self.title, entry.title, f"{median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"]


def ratios_of(cells: Cells, entry: Entry) -> Iterator[Ratio]:
    four = cells.of(entry, 4)
    one = cells.of(entry, 1)
    for graph in cells.graphs:
        fastest = cells.best(graph, 4, throughput)
        most_frugal = cells.best(graph, 4, frugality)
        quickest = cells.best(graph, 1, quickness)
        yield Ratio(f"req/s at 4 connections, the peer on {graph}", four, throughput, fastest, throughput)
        yield Ratio(f"CPU a request at 4 connections, the peer on {graph}", four, cpu, most_frugal, cpu)
        for users in KNOWN:
            title = f"req/s at 4 connections, our users {users}, the peer on {graph}"
            yield Ratio(title, cells.of(entry, 4, users), throughput, fastest, throughput)
            title = f"CPU a request at 4 connections, our users {users}, the peer on {graph}"
            yield Ratio(title, cells.of(entry, 4, users), cpu, most_frugal, cpu)
        yield Ratio(f"p50 at 1 connection, the peer on {graph}", one, p50, quickest, p50)
        title = f"our p99 to the peer's p50 at 4 connections, the peer on {graph}"
        yield Ratio(title, four, lambda c: c.p99_ms, cells.best(graph, 4, quickness), p50)


def ratios(cells: Cells) -> str:
    """The median of each ratio over the rounds, and its least and greatest."""
    rows = [(entry.graph, *ratio.row()) for entry in cells.ours for ratio in ratios_of(cells, entry)]
    return table(("variant", "ours / the best peer's", "best peer", "ratio", "over the rounds"), rows)


def choices(cells: Sequence[Cell], peers: Sequence[Entry]) -> str:
    """The best short run of each set-up."""
    rows = []
    for entry in peers:
        one = best_cells(cells, entry, 1)
        for setup, four in best_cells(cells, entry, 4).items():
            values = (four.per_second, four.cpu_ms, one[setup].p50_ms)
            rows.append((name_of(entry), setup, *(f"{value:.1f}" for value in values)))
    titles = ("server", "workers x threads", "req/s, 4 connections", "CPU ms a request", "p50 ms, 1 connection")
    return table(titles, rows)


def cross_checked(cells: Sequence[Cell]) -> str:
    """The cell that both generators measured, and wrk's values over the closed loop's, turn by turn."""
    loop, wrk = ([cell for cell in cells if cell.phase == phase] for phase in ("closed loop", "wrk"))
    if not wrk:
        return "Cross-check with wrk: left out, because the machine has no wrk."
    values: tuple[Value, ...] = (throughput, p50, lambda c: c.p99_ms, cpu)
    rows = [
        ("closed loop", *(spread(loop, value) for value in values)),
        ("wrk", *(spread(wrk, value) for value in values)),
        (
            "wrk / closed loop",
            *(f"{median(value(b) / value(a) for a, b in zip(loop, wrk, strict=True)):.3f}" for value in values),
        ),
    ]
    return "Slatewise, fp32, distinct users, 4 connections, the same server with both generators:\n\n" + table(
        ("generator", "req/s", "p50 ms", "p99 ms", "CPU ms a request"), rows
    )
