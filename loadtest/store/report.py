"""The measurements of the store as Markdown tables.

Called by: `__main__.py`. Calls: `loadtest/markdown.py`.
"""

from __future__ import annotations

from typing import Any

from loadtest.markdown import table
from loadtest.store.faults import FAULT_RATE, FAULT_SECONDS
from loadtest.store.lookups import BUDGET


def numbers(values: list[float] | tuple[float, ...], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def updates_table(served: dict[str, Any]) -> str:
    pushes = [served["pushed_alone"], *served["pushed_while_served"]]
    titles = (f"{served['rate']} requests a second, pushed, switched, rolled back, pushed", "")
    rows = [
        ("requests, failed", f"{served['requests']:,}, {served['failed']}"),
        ("answers with another version than their vector's", served["mixed"]),
        ("old generation still served after a switch, s", numbers(served["old_served_s"], 2)),
        ("rolled-back generation still served, s", f"{served['rolled_back_served_s']:.2f}"),
        ("a push alone, and two under load, s", numbers([each["seconds"] for each in pushes], 1)),
        ("request p50, p99, longest, ms", numbers(served["latency_ms"], 1)),
        ("statuses", dict(served["statuses"])),
    ]
    return table(titles, rows)


def memory_table(memory: dict[str, Any]) -> str:
    titles = ("bytes a user", "vector", "value", "in Redis, 1 generation", "2", "3")
    rows = [
        (dtype, row["vector"], f"{row['value']:.0f}", *(f"{row[f'live_{live}']:.0f}" for live in (1, 2, 3)))
        for dtype, row in memory.items()
    ]
    note = "Compact: hash-max-ziplist-value (or -listpack-value) 256 instead of Redis' default of 64."
    return f"{note}\n\n{table(titles, rows)}"


def lookups_table(lookups: dict[int, Any]) -> str:
    titles = ("concurrent look-ups", "p50 ms", "p99 ms", "longest ms", "statuses")
    rows = [
        (concurrent, *(f"{ms:.2f}" for ms in row["ms"]), dict(row["statuses"])) for concurrent, row in lookups.items()
    ]
    return table(titles, rows)


def faults_table(faults: dict[str, Any]) -> str:
    titles = ("fault", "p50 ms", "p99 ms", "added p99 ms", "circuit opened s", "closed s", "statuses")
    plain = faults["none"]["ms"][1]
    rows = []
    for name, row in faults.items():
        p50, p99, _ = row["ms"]
        times = ("" if row[key] is None else f"{row[key]:.2f}" for key in ("opened_s", "closed_s"))
        rows.append((name, f"{p50:.2f}", f"{p99:.2f}", f"{p99 - plain:.2f}", *times, dict(row["statuses"])))
    note = f"{FAULT_RATE} look-ups a second for {FAULT_SECONDS} s, time budget {BUDGET * 1e3:g} ms."
    return f"{note}\n\n{table(titles, rows)}"


def report(result: dict[str, Any]) -> str:
    parts = [
        f"{result['machine']}; {result['users']:,} users, {result['dim']} dimensions",
        updates_table(result["serve"]),
        memory_table(result["memory"]),
        lookups_table(result["look_ups"]),
        faults_table(result["faults"]),
    ]
    return "\n\n".join(parts)
