"""The best set-up of each peer, from short runs.

Called by: `__main__.py`, `report.py`. Calls: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.peers.measurements import Cell, Entry


def best_cells(cells: Sequence[Cell], entry: Entry, connections: int) -> dict[str, Cell]:
    """The best of the short runs of each set-up, by set-up: the others met more noise of the machine.

    With one connection the least p50 is best, with more the most requests a second.
    """
    found: dict[str, Cell] = {}
    for cell in cells:
        if (cell.phase, cell.name, cell.graph, cell.connections) != ("choice", entry.name, entry.graph, connections):
            continue
        assert cell.setup is not None  # only peers have set-ups
        if cell.setup not in found or merit(cell) > merit(found[cell.setup]):
            found[cell.setup] = cell
    return found


def merit(cell: Cell) -> float:
    return cell.per_second if cell.connections > 1 else -cell.p50_ms


def best_setup(cells: Sequence[Cell], entry: Entry, connections: int) -> str:
    found = best_cells(cells, entry, connections)
    return max(found, key=lambda setup: merit(found[setup]))
