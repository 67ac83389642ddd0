"""The dashboards and alerts against a real Prometheus: python -m loadtest.dashboards (make dashboards-check)

Two replicas of the demo and a Redis are served, a light load is kept up, and faults are made, one after the other. Prometheus scrapes
them with the rules of deploy/prometheus, every duration in them a sixtieth. Then every query of every panel must have given data, and
the alerts that a fault is to raise must have fired during it and cleared. Writes docs/dashboards/: a dated report, and pictures of the
panels drawn with matplotlib from the same queries. Alerts on hours and on sizes are tested by promtool alone.

Needs prometheus and promtool in the PATH (apt-get install prometheus).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from loadtest.client import closed_loop, lasting, open_loop, post
from loadtest.server import Server, free_port
from loadtest.traffic import visits
from loadtest.workload import Shape, Workload
from slatewise.process import cpu_name
from slatewise.store.client import connect
from slatewise.store.generations import Generations
from slatewise.store.push import push, read
from tests.conftest import run_redis

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
FASTER = 60
UNITS = {"ms": 1e-3, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
RATE_INTERVAL = "8s"  # in place of $__rate_interval: a scrape a second
PER_SECOND = 10  # of each replica
SETTINGS = {
    "THREADS": "1", "DRAIN_SECONDS": "0", "EMBEDDING_CACHE_S": "2", "MAX_IN_FLIGHT": "24", "MAX_OUTSTANDING_TOKENS": "6000", "SLOW_MS": "100",
}  # fmt: skip
# Fault -> the alerts that it must raise.
RAISED = {
    "Redis killed": {"StoreCircuitOpen"},
    "Redis back, and empty": {"NoMetaEmbeddings"},
    "foreign values in Redis": {"MetaEmbeddingsCorrupt"},
    "overload": {"AvailabilityBurnFast", "LatencyBurnFast", "AnswersUnranked"},
    "deadlines that cannot be met": {"AnswersUnranked"},
    "items that nobody knows": {"UnknownItems"},
    "one replica killed": {"ReplicaDown"},
    "both replicas killed": {"NoReplica", "ReplicaDown"},
}
QUESTIONS = {
    "Is it healthy?": ("overview", "Failed requests"),
    "Is it slow?": ("overview", "Latency"),
    "Which stage?": ("latency", "Mean by stage"),
    "Which variant?": ("latency", "p95 by variant"),
    "Is it the cache?": ("state", "History cache"),
    "Is it Redis?": ("state", "Redis circuit"),
    "Are vectors fresh?": ("state", "Age of the generation"),
    "Are we refusing?": ("overview", "Refused by door"),
    "Are we degrading?": ("overview", "Degraded by reason"),
    "Since when?": ("overview", "Alerts"),
}
Series = tuple[dict[str, str], list[tuple[float, float]]]


def faster(rules: str) -> str:
    """The rules with windows and waits a sixtieth as long: 5m becomes 5s. Thresholds and names stay."""

    def shorten(match: re.Match[str]) -> str:
        return f"{match[1]}{max(2_000, int(match[2]) * UNITS[match[3]] * 1_000 // FASTER)}ms"

    return re.sub(r"(\[|for: )(\d+)([smhd])\b", shorten, rules)


class Prometheus:
    """A real one, on loopback, that scrapes these ports every second."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        self.port = free_port()
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        config["scrape_configs"] = [{"job_name": config["scrape_configs"][0]["job_name"], "static_configs": targets}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(faster((PROMETHEUS / "rules.yml").read_text()))
        flags = {
            "config.file": "prometheus.yml",
            "storage.tsdb.path": "data",
            "web.listen-address": f"127.0.0.1:{self.port}",
            "query.lookback-delta": "5s",
        }
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                ["prometheus", *(f"--{name}={value}" for name, value in flags.items())], cwd=folder, stderr=log
            )

    def __enter__(self) -> Prometheus:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("prometheus did not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def series(self, expr: str, begin: float, end: float) -> list[Series]:
        parameters = urllib.parse.urlencode({"query": expr, "start": begin, "end": end, "step": 1})
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}/api/v1/query_range?{parameters}", timeout=60
        ) as answer:
            found = json.load(answer)["data"]["result"]
        points = [(one["metric"], [(float(at), float(value)) for at, value in one["values"]]) for one in found]
        return [(labels, [(at, value) for at, value in values if math.isfinite(value)]) for labels, values in points]


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            yield path.stem, panel


def query(target: dict[str, Any]) -> str:
    return str(target["expr"]).replace("$__rate_interval", RATE_INTERVAL).replace("$instance", ".*")


class Scene:
    """What is served, what asks, and when which fault was made."""

    def __init__(self, stack: ExitStack, folder: Path, bundles: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.workload = Workload(bundles)
        self.bundles = bundles
        self.redis_port = free_port()
        self.ports = [free_port(), free_port()]
        self.servers: list[Server] = []
        self.faults: list[tuple[str, float, float]] = []
        self.stop = threading.Event()

    def serve(self, k: int) -> Server:
        settings = {"BUNDLES": str(self.bundles), "REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0"} | SETTINGS
        command = ["sh", "-c", f"exec {sys.executable} -m slatewise.main >> {self.folder}/replica-{k}.jsonl"]
        return self.stack.enter_context(Server(settings, command, self.ports[k]))

    def fill(self) -> None:
        ranker, space, users, vectors = read(self.workload.folder)
        with connect(f"redis://127.0.0.1:{self.redis_port}/0") as client:
            push(Generations(client, ranker, space, 0), users, vectors)

    def spoil(self) -> None:
        """Somebody else's values in every user's hash."""
        with connect(f"redis://127.0.0.1:{self.redis_port}/0") as client:
            for key in client.scan_iter("slatewise:*:emb:*"):
                for name in client.hkeys(key):
                    client.hset(key, name, b"not a vector")

    def keep_asking(self, k: int) -> None:
        """A light load, whatever happens to the server."""
        requests = visits(Workload(self.bundles, seed=k))
        while not self.stop.is_set():
            try:
                open_loop(self.ports[k], lasting(2, requests), PER_SECOND, 8)
            except OSError:
                time.sleep(0.3)

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        print(name, file=sys.stderr)
        begin = time.time()
        yield
        self.faults.append((name, begin, time.time()))

    def ask(self, seconds: float, connections: int, shape: Shape, **members: Any) -> Counter[int]:
        """A closed loop on both replicas; the statuses."""
        statuses: Counter[int] = Counter()

        def run(port: int) -> None:
            bodies = [post("/rerank", body) for body in self.workload.distinct(shape, 40, **members)]
            statuses.update(
                closed_loop(port, lasting(seconds, (bodies[k % 40] for k in range(10**6))), connections).statuses
            )

        threads = [threading.Thread(target=run, args=(port,)) for port in self.ports]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statuses


def play(scene: Scene) -> None:
    """The faults, one after the other, with calm between them."""
    asking = [threading.Thread(target=scene.keep_asking, args=(k,), daemon=True) for k in range(2)]
    redis = scene.stack.enter_context(ExitStack())
    redis.enter_context(run_redis(scene.folder, scene.redis_port))
    scene.fill()
    scene.servers = [scene.serve(k) for k in range(2)]
    with Prometheus(scene.folder, scene.ports) as prometheus:
        for thread in asking:
            thread.start()
        time.sleep(12)  # until Prometheus has found both, and what it said before has cleared
        begin = time.time()
        time.sleep(20)
        with scene.fault("Redis killed"):
            redis.close()
            time.sleep(15)
        with scene.fault("Redis back, and empty"):
            redis.enter_context(run_redis(scene.folder, scene.redis_port))
            time.sleep(14)
            scene.fill()
        time.sleep(10)
        with scene.fault("foreign values in Redis"):
            scene.spoil()
            time.sleep(12)
            scene.fill()
        time.sleep(15)
        with scene.fault("overload"):
            scene.ask(7, 40, Shape(200, 200))
            scene.ask(7, 20, Shape(200, 200), allow_degraded=False)
        time.sleep(15)
        with scene.fault("deadlines that cannot be met"):
            scene.ask(6, 4, Shape(200, 500), deadline_ms=4)
            scene.ask(3, 4, Shape(200, 500), deadline_ms=1)
            scene.ask(6, 4, Shape(200, 500), deadline_ms=1)
        time.sleep(10)
        with scene.fault("items that nobody knows"):
            known = scene.workload.ids
            scene.workload.ids = [f"new-{k}" for k in range(1_000)]
            scene.ask(25, 1, Shape(5, 100), deadline_ms=1_000)
            scene.workload.ids = known
        time.sleep(10)
        with scene.fault("one replica killed"):
            scene.servers[0].process.kill()
            time.sleep(10)
            scene.servers[0] = scene.serve(0)
        time.sleep(10)
        with scene.fault("both replicas killed"):
            logged = log_against_metrics(scene)
            for server in scene.servers:
                server.process.kill()
            time.sleep(10)
            scene.servers = [scene.serve(k) for k in range(2)]
        time.sleep(45)  # until the windows of the burn rates are clean
        end = time.time()
        scene.stop.set()
        report(scene, prometheus, begin, end, logged)


def log_against_metrics(scene: Scene) -> dict[str, tuple[int, int]]:
    """Of the replica that was never killed: degraded answers by reason, in the log and in the metrics."""
    text = str(scene.servers[1].get("/metrics")[1])
    counted = {
        reason: int(float(value))
        for reason, value in re.findall(r'slatewise_degraded_total\{reason="(\w+)"\} (\S+)', text)
    }
    dropped = re.search(r'slatewise_lines_total\{kind="log",result="dropped"\} (\S+)', text)
    assert dropped and float(dropped[1]) == 0, "lines were dropped"
    lines = [json.loads(line) for line in (scene.folder / "replica-1.jsonl").read_text().splitlines()]
    logged = Counter(reason for line in lines for reason in line["reasons"])
    return {reason: (logged[reason], value) for reason, value in counted.items()}


def report(scene: Scene, prometheus: Prometheus, begin: float, end: float, logged: dict[str, tuple[int, int]]) -> None:
    """Holds what was seen against what must be, draws and writes it. Ends the process where something is missing."""
    empty = []
    drawn = []
    for board, panel in panels():
        found = [(target, prometheus.series(query(target), begin, end)) for target in panel["targets"]]
        drawn.append((board, panel, found))
        empty += [
            f"{board}: {panel['title']}: {query(target)}"
            for target, series in found
            if not any(points for _, points in series)
        ]
    firing = {
        name: sorted(
            at
            for labels, points in prometheus.series('ALERTS{alertstate="firing"}', begin, end)
            if labels["alertname"] == name
            for at, _ in points
        )
        for name in sorted(set(re.findall(r"alert: (\w+)", (PROMETHEUS / "rules.yml").read_text())))
    }
    wrong = [
        f"{name} did not fire during: {fault}"
        for fault, a, b in scene.faults
        for name in RAISED[fault]
        if not any(a <= t <= b + 8 for t in firing[name])
    ]
    wrong += [
        f"{name} fired before any fault" for name in firing if any(at < scene.faults[0][1] for at in firing[name])
    ]
    wrong += [
        f"{name} did not clear" for name in set.union(*RAISED.values()) if firing[name] and firing[name][-1] > end - 3
    ]
    wrong += [f"log and metrics differ: {reason} {pair}" for reason, pair in logged.items() if pair[0] != pair[1]]
    ages = prometheus.series("max(slatewise_embedding_generation_age_seconds)", begin, end)[0][1]
    refilled = next(b for fault, _, b in scene.faults if fault == "Redis back, and empty")
    wrong += (
        ["the age of a generation did not begin anew in an emptied Redis"]
        if min(age for at, age in ages if refilled <= at <= refilled + 8) > 8
        else []
    )
    folder = ROOT / "docs" / "dashboards"
    folder.mkdir(exist_ok=True)
    for board in dict.fromkeys(board for board, _, _ in drawn):
        draw(
            folder / f"{board}.png",
            [(panel, found) for name, panel, found in drawn if name == board],
            scene.faults,
            begin,
            end,
        )
    write(folder / "report.md", scene, drawn, firing, begin, logged, empty, wrong)
    for line in [*(f"no data: {query}" for query in empty), *wrong]:
        print(line, file=sys.stderr)
    print(
        json.dumps(
            {
                "panels": len(drawn),
                "queries": sum(len(f) for _, _, f in drawn),
                "empty": len(empty),
                "wrong": len(wrong),
            }
        )
    )
    if empty or wrong:
        raise SystemExit(1)


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), target["legendFormat"]).strip()[:40]


def draw(
    path: Path,
    found: list[tuple[dict[str, Any], list[tuple[dict[str, Any], list[Series]]]]],
    faults: list[tuple[str, float, float]],
    begin: float,
    end: float,
) -> None:
    """A picture of one dashboard: each panel from its own queries, the faults shaded and numbered."""
    rows = math.ceil(len(found) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(18, 2.9 * rows), squeeze=False)
    for axis, (panel, queries) in zip(axes.flat, found):
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axis.set_title(f"{panel['title']} [{unit}]", fontsize=9)
        stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal"
        lines = [(legend(target, labels), points) for target, series in queries for labels, points in series if points]
        if panel["type"] == "heatmap":
            draw_heat(axis, queries[0][1], begin)
        elif panel["type"] == "state-timeline":
            for row, (label, points) in enumerate(lines):
                colors = [
                    "#2a2" if value == 0 and "Circuit" not in label and panel["title"] != "Alerts" else "#d33"
                    for _, value in points
                ]
                axis.scatter([at - begin for at, _ in points], [row] * len(points), c=colors, s=6, marker="s")
            axis.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=6)
        elif stacked and lines:
            times = sorted({at for _, points in lines for at, _ in points})
            values = [[dict(points).get(at, 0.0) for at in times] for _, points in lines]
            axis.stackplot([at - begin for at in times], values, labels=[label for label, _ in lines], alpha=0.8)
        else:
            for label, points in lines:
                axis.plot([at - begin for at, _ in points], [value for _, value in points], label=label, linewidth=1)
        if panel["type"] not in ("heatmap", "state-timeline") and 1 < len(lines) <= 10:
            axis.legend(fontsize=6, loc="upper left")
        for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])[1:]:
            if panel["type"] == "timeseries":
                axis.axhline(step["value"], color="red", linestyle="--", linewidth=0.8)
        for k, (_, a, b) in enumerate(faults):
            axis.axvspan(a - begin, b - begin, color="orange", alpha=0.15, linewidth=0)
            axis.text(
                (a + b) / 2 - begin, 0.93, str(k + 1), transform=axis.get_xaxis_transform(), fontsize=6, ha="center"
            )
        axis.set_xlim(0, end - begin)
        axis.tick_params(labelsize=6)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    names = "   ".join(f"{k + 1} {name}" for k, (name, _, _) in enumerate(faults))
    figure.suptitle(
        f"Slatewise: {path.stem}. Drawn with matplotlib from the dashboard's own queries, not by Grafana; x in seconds.\nFaults: {names}",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=65)
    plt.close(figure)


def draw_heat(axis: Any, series: list[Series], begin: float) -> None:
    """Buckets are cumulative over `le`; a cell is the difference of two."""
    edges = sorted((float(labels["le"]), dict(points)) for labels, points in series)
    times = sorted({at for _, points in edges for at in points})
    below = [0.0] * len(times)
    grid = []
    for _, points in edges:
        row = [points.get(at, 0.0) for at in times]
        grid.append([max(0.0, high - low) for high, low in zip(row, below)])
        below = row
    axis.imshow(
        grid, aspect="auto", origin="lower", cmap="Blues", extent=(times[0] - begin, times[-1] - begin, 0, len(edges))
    )
    axis.set_yticks([k + 0.5 for k in range(0, len(edges), 3)], [f"{edge:g}" for edge, _ in edges[::3]])


def write(path: Path, scene: Scene, drawn: list[Any], firing: dict[str, list[float]], begin: float, logged: dict[str, tuple[int, int]],
          empty: list[str], wrong: list[str]) -> None:  # fmt: skip
    version = subprocess.run(["prometheus", "--version"], capture_output=True, text=True).stdout.split()[2]
    lines = [
        "# The dashboards and alerts, against faults made on purpose", "",
        f"{datetime.now(UTC):%Y-%m-%d}, `make dashboards-check`, {cpu_name()}; Prometheus {version}; two replicas of the demo "
        f"(version {scene.workload.folder.name}), {PER_SECOND} requests a second each beside the faults. Scraped every second, the rules' "
        "durations a sixtieth (5 minutes are 5 seconds), so that an alert on minutes can be seen to fire and to clear.", "",
        f"**{len(drawn)} panels with {sum(len(found) for _, _, found in drawn)} queries, {len(empty)} without data; "
        f"{len(wrong)} things not as they should be.**", "",
        *(f"- no data: `{one}`" for one in empty), *(f"- {one}" for one in wrong), "",
        "| | fault | from s | to s | alerts it must raise |", "| --- | --- | --- | --- | --- |",
        *(f"| {k + 1} | {name} | {a - begin:.0f} | {b - begin:.0f} | {', '.join(sorted(RAISED[name]))} |" for k, (name, a, b) in enumerate(scene.faults)), "",
        "| alert | fired from s | until s | |", "| --- | --- | --- | --- |",
        *(f"| {name} | {times[0] - begin:.0f} | {times[-1] - begin:.0f} | {len(times)} samples |" if times else f"| {name} | | | not here: by promtool alone |"
          for name, times in firing.items()), "",
        "Under an overload the store's circuit opens too: it is this process that is late, not Redis (the runbook says how to tell). "
        "The slow burn rates look back over hours (here minutes), so they are still on when this ends; promtool sees them clear.", "",
        "## Which panel answers", "", "| question | panel | picture |", "| --- | --- | --- |",
        *(f"| {question} | {board.capitalize()} > {title} | [{board}.png]({board}.png) |" for question, (board, title) in QUESTIONS.items()), "",
        *(f"![{board}]({board}.png)\n" for board in dict.fromkeys(board for board, _, _ in drawn)),
        "## Log and metrics", "", "Degraded answers of the replica that was not killed, by reason: lines in its log, and `slatewise_degraded_total`.", "",
        "| reason | log | metric |", "| --- | --- | --- |", *(f"| {reason} | {a} | {b} |" for reason, (a, b) in logged.items()),
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.dashboards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundles", type=Path, default=ROOT / "models" / "bundles")
    args = parser.parse_args()
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        raise SystemExit("prometheus and promtool are needed: apt-get install prometheus")
    tests = [path.name for path in sorted(PROMETHEUS.glob("*_test.yml"))]
    for command in (["check", "config", "prometheus.yml"], ["check", "rules", "rules.yml"], ["test", "rules", *tests]):
        subprocess.run(["promtool", *command], cwd=PROMETHEUS, check=True, stdout=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        play(Scene(stack, Path(folder), args.bundles))


if __name__ == "__main__":
    main()
