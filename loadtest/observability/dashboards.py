"""The dashboards and alerts against a real Prometheus: python -m loadtest.observability.dashboards

Starts two replicas of the demo, a Redis and a light load, and injects faults one after the other. Prometheus scrapes
the replicas with the rules of deploy/prometheus, all durations divided by 60. Afterwards, every query of every panel
must have returned data, and the alerts of a fault must have fired during it and cleared. Writes docs/dashboards/: a
dated report, and pictures of the panels. Alerts on hours and on sizes are tested by promtool alone.

Called by: `make dashboards-check`. Calls: `faults.py`, `prometheus.py`, `pictures.py`. Needs prometheus and promtool in
the PATH (apt-get install prometheus).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from loadtest.markdown import table
from loadtest.observability.faults import PER_SECOND, RAISED, Observation, Scene, observe
from loadtest.observability.pictures import Drawn, draw
from loadtest.observability.prometheus import ROOT, Prometheus, alert_names, panels, query, run_promtool, version
from loadtest.server_process import exit_on_sigterm
from slatewise.process import cpu_name

FOLDER = ROOT / "docs" / "dashboards"
QUESTIONS = {
    "Is it healthy?": ("overview", "Failed requests"),
    "Is it slow?": ("overview", "Latency"),
    "Which stage?": ("latency", "Mean by stage"),
    "Which variant?": ("latency", "p95 by variant"),
    "Is it the cache?": ("state", "History cache"),
    "Is it Redis?": ("state", "Redis circuit"),
    "Are vectors fresh?": ("state", "Age of the generation"),
    "Are requests refused?": ("overview", "Refused by reason"),
    "Are answers degraded?": ("overview", "Degraded by reason"),
    "Since when?": ("overview", "Alerts"),
}


@dataclass(frozen=True)
class Findings:
    """All panels with their data, the firing times of each alert, the queries without data, and the failed checks."""

    boards: dict[str, list[Drawn]]
    firing: dict[str, list[float]]
    empty: list[str]
    failed: list[str]

    @property
    def panel_count(self) -> int:
        return sum(map(len, self.boards.values()))

    @property
    def query_count(self) -> int:
        return sum(len(queries) for drawn in self.boards.values() for _, queries in drawn)


def collect(prometheus: Prometheus, seen: Observation) -> Findings:
    boards: dict[str, list[Drawn]] = {}
    empty = []
    for board, panel in panels():
        found = [(target, prometheus.series(query(target), seen.begin, seen.end)) for target in panel["targets"]]
        boards.setdefault(board, []).append((panel, found))
        without_data = (target for target, series in found if not any(points for _, points in series))
        empty += [f"{board}: {panel['title']}: {query(target)}" for target in without_data]
    firing: dict[str, list[float]] = {name: [] for name in alert_names()}
    for labels, points in prometheus.series('ALERTS{alertstate="firing"}', seen.begin, seen.end):
        firing[labels["alertname"]] += [at for at, _ in points]
    firing = {name: sorted(times) for name, times in firing.items()}
    ages = prometheus.series("max(slatewise_embedding_generation_age_seconds)", seen.begin, seen.end)[0][1]
    return Findings(boards, firing, empty, failed_checks(seen, firing, ages))


def failed_checks(seen: Observation, firing: dict[str, list[float]], ages: list[tuple[float, float]]) -> list[str]:
    """Each check that failed, in words. `ages`: the age of the newest generation over time."""
    failed = [
        f"{name} did not fire during: {fault.name}"
        for fault in seen.faults
        for name in RAISED[fault.name]
        if not any(fault.begin <= at <= fault.end + 8 for at in firing[name])
    ]
    first = seen.faults[0].begin
    failed += [f"{name} fired before any fault" for name, times in firing.items() if any(at < first for at in times)]
    raised = set.union(*RAISED.values())
    failed += [f"{name} did not clear" for name in raised if firing[name] and firing[name][-1] > seen.end - 3]
    unequal = {reason: pair for reason, pair in seen.degraded.items() if pair[0] != pair[1]}
    failed += [f"log and metrics differ: {reason} {pair}" for reason, pair in unequal.items()]
    refilled = next(fault.end for fault in seen.faults if fault.name == "Redis back, and empty")
    if min(age for at, age in ages if refilled <= at <= refilled + 8) > 8:
        failed.append("the age of a generation was not reset after Redis was emptied")
    return failed


def report(seen: Observation, found: Findings) -> str:
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    setting = (
        f"{today}, `make dashboards-check`, {cpu_name()}; Prometheus {version()}; two replicas of the demo (version "
        f"{seen.bundle}), {PER_SECOND} requests a second to each, and the faults. One scrape a second; the durations "
        "in the rules divided by 60 (5 minutes are 5 seconds), so an alert on minutes can fire and clear in the run."
    )
    counts = f"{found.panel_count} panels with {found.query_count} queries, {len(found.empty)} without data"
    problems = [*(f"- no data: `{one}`" for one in found.empty), *(f"- {one}" for one in found.failed)]
    faults = []
    for k, fault in enumerate(seen.faults, 1):
        times = (f"{at - seen.begin:.0f}" for at in (fault.begin, fault.end))
        faults.append((k, fault.name, *times, ", ".join(sorted(RAISED[fault.name]))))
    alerts = [
        (name, f"{times[0] - seen.begin:.0f}", f"{times[-1] - seen.begin:.0f}", f"{len(times)} samples")
        if times
        else (name, "", "", "not here: by promtool alone")
        for name, times in found.firing.items()
    ]
    questions = [
        (question, f"{board.capitalize()} > {title}", f"[{board}.png]({board}.png)")
        for question, (board, title) in QUESTIONS.items()
    ]
    parts = [
        "# The dashboards and alerts under injected faults",
        setting,
        f"**{counts}; {len(found.failed)} failed checks.**",
        *(["\n".join(problems)] if problems else []),
        table(("", "fault", "from s", "to s", "alerts it must raise"), faults),
        table(("alert", "fired from s", "until s", ""), alerts),
        "Under overload the store's circuit opens too: this process is late, not Redis (the runbook says how to tell "
        "them apart). The slow burn rates look back over hours (here minutes), so they still fire at the end of the "
        "run; the promtool tests show that they clear.",
        "## Which panel answers",
        table(("question", "panel", "picture"), questions),
        "\n\n".join(f"![{board}]({board}.png)" for board in found.boards),
        "## Log and metrics",
        "Degraded answers of the second replica by reason: lines in its log, and `slatewise_degraded_total`.",
        table(("reason", "log", "metric"), [(reason, *pair) for reason, pair in seen.degraded.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def evaluate(prometheus: Prometheus, seen: Observation) -> None:
    """Check, draw and write the report. Ends the process with status 1 if a check failed."""
    found = collect(prometheus, seen)
    FOLDER.mkdir(exist_ok=True)
    for board, drawn in found.boards.items():
        draw(FOLDER / f"{board}.png", drawn, seen)
    (FOLDER / "report.md").write_text(report(seen, found))
    for line in [*(f"no data: {one}" for one in found.empty), *found.failed]:
        print(line, file=sys.stderr)
    counts = {"panels": found.panel_count, "queries": found.query_count}
    print(json.dumps(counts | {"empty": len(found.empty), "failed": len(found.failed)}))
    if found.empty or found.failed:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.observability.dashboards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundles", type=Path, default=ROOT / "models" / "bundles")
    args = parser.parse_args()
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        raise SystemExit("prometheus and promtool are needed: apt-get install prometheus")
    exit_on_sigterm()
    run_promtool()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        observe(Scene(stack, Path(folder), args.bundles), evaluate)


if __name__ == "__main__":
    main()
