"""The report on the cells: Markdown tables and plots.

Called by: `__main__.py`. Calls: matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from loadtest.markdown import table
from loadtest.server.soak import Sample, after_first_third, slope
from loadtest.workload import W

Row = dict[str, Any]
STAGES = ("parse", "features", "embed", "queue", "encode", "score", "serialize")
QUANTILES = ("p50_ms", "p95_ms", "p99_ms")


def name(row: Row) -> str:
    """Label of a cell within its group."""
    users = "" if row["users"] == "new" else f"{row['users']}, "
    loop = f"open, {row['load']:.0%}" if row["loop"] == "open" else f"{row['connections']} conn."
    concurrent = f", with {row['concurrent']}" if row.get("concurrent") else ""
    return f"{users}{row['history']} + {row['candidates']}, {loop}{concurrent}"


def table_of(columns: dict[str, Callable[[Row], Any]], rows: Iterable[Row]) -> str:
    """A Markdown table of the rows; `columns` maps a title to the function that reads the cell."""
    return table(list(columns), ([text(cell(row)) for cell in columns.values()] for row in rows))


def text(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {number}" for key, number in sorted(value.items()))
    return value


def key(*path: str) -> Callable[[Row], Any]:
    """A function that reads the value below `path` of a row, or None."""

    def look_up(row: Row) -> Any:
        value: Any = row
        for step in path:
            value = (value or {}).get(step)
        return value

    return look_up


CELL = {"users": key("users"), "history": key("history"), "candidates": key("candidates")}
TIMES = {quantile.replace("_", " "): key(quantile) for quantile in QUANTILES}
CELLS = (
    {"group": key("group")}
    | CELL
    | {
        "loop": lambda row: (
            f"open, {row['load']:.0%}: {row['offered_per_second']}/s"
            if row["loop"] == "open"
            else f"closed, {row['connections']}"
        )
    }
    | {"requests": key("requests"), "requests/s": key("per_second")}
    | TIMES
    | {
        "CPU ms": key("cpu_ms"),
        "others' cores": key("other_cores"),
        "resident MB": key("resident_mb"),
        "statuses": key("statuses"),
        "degraded": key("degraded_share"),
    }
    | {"exits": key("exits"), "history cache": key("cache")}
)
MIXED = (
    CELL
    | {
        "connections": key("connections"),
        "concurrent": key("concurrent"),
        "requests/s": key("per_second"),
        "ratio to the rate alone": key("rate_share"),
    }
    | {"requests": key("requests")}
    | TIMES
)
BREAKDOWN = (
    {"group": key("group"), "cell": name}
    | {stage: key("stage_medians_ms", stage) for stage in (*STAGES[:-1], "total")}
    | {"mean of serialize": key("stage_means_ms", "serialize"), "stages / request": key("stages_share")}
)


def write(folder: Path, about: list[str], rows: list[Row]) -> None:
    """Write report.md and a plot for each kind of rows that is present."""
    plots = [
        path.name
        for plot in (plot_sizes, plot_users, plot_open, plot_mixed, plot_stages)
        if (path := plot(rows, folder))
    ]
    mixed = [row for row in rows if row["group"] == "mixed"]
    parts = ["# Load test", "\n".join(f"- {line}" for line in about)]
    parts += [
        "## Cells\n\nLatency at the client; in the open loop it counts from a request's arrival time. Others' cores: "
        "cores that processes other than server and client kept busy. If it is well above 0, they disturbed the cell.",
        table_of(CELLS, rows),
    ]
    if mixed:
        parts += [
            "## Cheap and expensive requests at once\n\nThe rate of each stream, and its ratio to the rate alone.",
            table_of(MIXED, mixed),
        ]
    parts += [
        "## Stages\n\nMilliseconds: medians of `timings_ms` in the answers. `serialize` is not in them, so it is a "
        "mean from `/metrics`. The last column is the sum of the stage histograms over the sum of whole requests.",
        table_of(BREAKDOWN, rows),
        *(f"![{plot}]({plot})" for plot in plots),
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def number(value: float, _: object = None) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def log_times(axis: Any) -> None:
    """Set a log axis of milliseconds with plain numbers at 1, 2, 5, 10, ..."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(number))
    axis.yaxis.set_minor_formatter(NullFormatter())


def plot_sizes(rows: list[Row], folder: Path) -> Path | None:
    """Latency by length of history and by number of candidates."""
    cold = [row for row in rows if row["group"] in ("w", "neighbours")]
    if len({(row["history"], row["candidates"]) for row in cold}) < 2:
        return None
    figure, axes = plt.subplots(1, 2, layout="constrained", figsize=(11, 4.4), sharey=True)
    for axis, size, other, unit in zip(
        axes, ("history", "candidates"), ("candidates", "history"), ("events", "candidates")
    ):
        line = sorted((row for row in cold if row[other] == getattr(W, other)), key=lambda row: row[size])
        for color, connections in zip(("tab:blue", "tab:orange"), sorted({row["connections"] for row in line})):
            chosen = [row for row in line if row["connections"] == connections]
            for style, quantile in (("o-", "p50_ms"), ("^:", "p99_ms")):
                label = f"{quantile[:3]}, {connections} connection{'s' * (connections > 1)}"
                axis.plot(
                    [row[size] for row in chosen], [row[quantile] for row in chosen], style, color=color, label=label
                )
        log_times(axis)
        axis.set(xscale="log", xlabel=f"{size} ({unit})" if unit != size else size, ylabel="latency, ms")
        axis.set_title(
            f"every user new, {getattr(W, other)} {'candidates' if other == 'candidates' else 'events of history'}"
        )
        axis.set_xticks(sorted({row[size] for row in line}))
        axis.xaxis.set_major_formatter(FuncFormatter(number))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
        axis.legend()
        axis.label_outer()
    return save(figure, folder / "sizes.png")


def plot_users(rows: list[Row], folder: Path) -> Path | None:
    """Latency of shape W by kind of user: new, returning, growing, sliding."""
    chosen = [row for row in rows if row["group"] in ("w", "returning")]
    if not any(row["group"] == "returning" for row in chosen):
        return None
    kinds = list(dict.fromkeys(row["users"] for row in chosen))
    both = sorted({row["connections"] for row in chosen})
    figure, axes = plt.subplots(1, len(both), layout="constrained", figsize=(11, 4.2), sharey=True, squeeze=False)
    for axis, connections in zip(axes[0], both):
        bars(axis, kinds, {row["users"]: row for row in chosen if row["connections"] == connections}, QUANTILES)
        axis.set(
            title=f"{W.history} events, {W.candidates} candidates, {connections} connection{'s' * (connections > 1)}",
            ylabel="latency, ms",
        )
        axis.legend()
        axis.label_outer()
    return save(figure, folder / "users.png")


def bars(axis: Any, names: list[str], rows: dict[str, Row], values: Iterable[str]) -> None:
    """Draw grouped bars with their numbers: one group for each name, one bar for each value."""
    columns = list(values)
    width = 0.8 / len(columns)
    for k, column in enumerate(columns):
        drawn = axis.bar(
            [x + (k - (len(columns) - 1) / 2) * width for x in range(len(names))],
            [rows[one][column] if one in rows else 0 for one in names],
            width,
            label=column.removesuffix("_ms"),
        )
        axis.bar_label(drawn, fmt=number, fontsize=7)
    axis.set_xticks(range(len(names)), [one.replace(" with ", "\nwith ") for one in names])
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.12)


def plot_open(rows: list[Row], folder: Path) -> Path | None:
    chosen = [row for row in rows if row["group"] == "open"]
    if not chosen:
        return None
    figure, axis = plt.subplots(layout="constrained", figsize=(7.5, 4.2))
    named = {
        f"{row['load']:.0%}\n{row['offered_per_second']}/s"
        if row["loop"] == "open"
        else f"closed loop\n{row['per_second']}/s": row
        for row in chosen
    }
    bars(axis, list(named), named, QUANTILES)
    log_times(axis)
    axis.set(ylabel="latency from arrival time, ms", title="W in the open loop, by share of the closed loop's rate")
    axis.set_ylim(bottom=1)
    axis.legend()
    return save(figure, folder / "open.png")


def plot_mixed(rows: list[Row], folder: Path) -> Path | None:
    chosen = [row for row in rows if row["group"] == "mixed"]
    if not chosen:
        return None
    cheap_size = min(row["candidates"] for row in chosen)
    figure, (left, right) = plt.subplots(1, 2, layout="constrained", figsize=(11, 4.2))
    cheap = {
        f"with\n{row['concurrent']}" if row["concurrent"] else "alone": row
        for row in chosen
        if row["candidates"] == cheap_size
    }
    bars(left, list(cheap), cheap, QUANTILES)
    log_times(left)
    left.set(
        ylabel="latency, ms",
        title=f"the cheap requests ({cheap_size} candidates, {next(iter(cheap.values()))['connections']} connections)",
    )
    left.set_ylim(bottom=1)
    left.legend()
    concurrent = [row for row in chosen if row["concurrent"]]
    drawn = right.barh(
        [f"{row['connections']} x {row['candidates']}\nwith {row['concurrent']}" for row in concurrent],
        [row["rate_share"] for row in concurrent],
    )
    right.bar_label(drawn, fmt="%.2f", fontsize=8, padding=3)
    right.set(xlim=(0, 1.1), xlabel="ratio to the requests/s alone", title="rate, relative to the rate alone")
    right.invert_yaxis()
    right.grid(axis="x", alpha=0.3)
    return save(figure, folder / "mixed.png")


def plot_stages(rows: list[Row], folder: Path) -> Path | None:
    """Mean request time by stage, at one connection, so queueing hardly counts."""
    chosen = [row for row in rows if row["group"] in ("w", "neighbours", "returning") and row["connections"] == 1]
    if not chosen:
        return None
    figure, (left, right) = plt.subplots(
        1, 2, layout="constrained", figsize=(12, 1.8 + 0.36 * len(chosen)), sharey=True
    )
    whole = [row["stage_means_ms"]["request"] for row in chosen]
    ends = [0.0] * len(chosen)
    for k, stage in enumerate((*STAGES, "outside the stages")):
        widths = [row["stage_means_ms"].get(stage, max(0.0, time - end)) for row, time, end in zip(chosen, whole, ends)]
        color = f"C{k}" if k < len(STAGES) else "0.8"
        left.barh(range(len(chosen)), widths, left=ends, label=stage, color=color)
        right.barh(
            range(len(chosen)),
            [100 * w / t for w, t in zip(widths, whole)],
            left=[100 * e / t for e, t in zip(ends, whole)],
            color=color,
        )
        ends = [end + width for end, width in zip(ends, widths)]
    left.set_yticks(range(len(chosen)), [f"{row['users']}: {row['history']} + {row['candidates']}" for row in chosen])
    left.set(xlabel="mean milliseconds a request", title="users: history + candidates, one connection")
    right.set(xlabel="% of the request's time", title="the same as shares", xlim=(0, 100))
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    figure.legend(ncols=len(STAGES) + 1, loc="outside lower center")
    return save(figure, folder / "stages.png")


def plot_soak(row: Row, samples: list[Sample], path: Path) -> None:
    figure, axis = plt.subplots(layout="constrained", figsize=(9, 4.2))
    axis.plot([t / 60 for t, _ in samples], [mb for _, mb in samples])
    rest = after_first_third(samples)
    middle = sum(t for t, _ in rest) / len(rest), sum(mb for _, mb in rest) / len(rest)
    ends = [rest[0][0], rest[-1][0]]
    fit = [middle[1] + slope(rest) / 3_600 * (t - middle[0]) for t in ends]
    axis.plot([t / 60 for t in ends], fit, "--", label=f"after the first third: {slope(rest):+.1f} MB an hour")
    axis.set(
        xlabel="minutes",
        ylabel="resident, MB",
        title=f"random sizes, {row['requests']} requests; the largest {row['largest_mb']:.0f} MB",
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    save(figure, path)
