"""A real Prometheus with the rules of deploy/prometheus, made faster, and the queries of the dashboards.

Called by: `faults.py`, `dashboards.py`. Calls: the program prometheus.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.network import free_port

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "prometheus"
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
FASTER = 60
MOST_STALE = 2_000  # milliseconds: the shortest window, two scrapes
UNITS = {"ms": 1e-3, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
RATE_INTERVAL = "8s"  # replaces $__rate_interval, for one scrape a second

Series = tuple[dict[str, str], list[tuple[float, float]]]  # labels, (time, value)


def faster(rules: str) -> str:
    """Divide all windows and waiting times in the rules by FASTER: 5m becomes 5s. Thresholds and names stay."""

    def shorten(match: re.Match[str]) -> str:
        milliseconds = int(match[2]) * UNITS[match[3]] * 1_000 // FASTER
        return f"{match[1]}{max(MOST_STALE, milliseconds)}ms"

    return re.sub(r"(\[|for: |interval: )(\d+)([smhd])\b", shorten, rules)


class Prometheus:
    """A Prometheus on loopback that scrapes the ports every second, ready inside the `with` block."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        self.port = free_port()
        config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        config["scrape_configs"] = [{"job_name": config["scrape_configs"][0]["job_name"], "static_configs": targets}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(faster((CONFIG / "rules.yml").read_text()))
        self.folder = folder

    def __enter__(self) -> Prometheus:
        flags = {
            "config.file": "prometheus.yml",
            "storage.tsdb.path": "data",
            "web.listen-address": f"127.0.0.1:{self.port}",
            "query.lookback-delta": "5s",
            "enable-feature": "exemplar-storage",
        }
        command = ["prometheus", *(f"--{name}={value}" for name, value in flags.items())]
        with (self.folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stderr=log)
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise RuntimeError("prometheus did not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def series(self, expr: str, begin: float, end: float) -> list[Series]:
        """The finite values of a query, one a second."""
        parameters = urllib.parse.urlencode({"query": expr, "start": begin, "end": end, "step": 1})
        url = f"http://127.0.0.1:{self.port}/api/v1/query_range?{parameters}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            found = json.load(answer)["data"]["result"]
        points = [(one["metric"], [(float(at), float(value)) for at, value in one["values"]]) for one in found]
        return [(labels, [(at, value) for at, value in values if math.isfinite(value)]) for labels, values in points]


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """(dashboard, panel) of all dashboards."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            yield path.stem, panel


def query(target: dict[str, Any]) -> str:
    """A panel's query with its variables replaced: all replicas, and the faster rate interval."""
    return str(target["expr"]).replace("$__rate_interval", RATE_INTERVAL).replace("$instance", ".*")


def alert_names() -> list[str]:
    return sorted(set(re.findall(r"alert: (\w+)", (CONFIG / "rules.yml").read_text())))


def version() -> str:
    return subprocess.run(["prometheus", "--version"], capture_output=True, text=True).stdout.split()[2]


def run_promtool() -> None:
    """Check the configuration and run the tests of the rules. Raises CalledProcessError if one fails."""
    tests = [path.name for path in sorted(CONFIG.glob("*_test.yml"))]
    for command in (["check", "config", "prometheus.yml"], ["check", "rules", "rules.yml"], ["test", "rules", *tests]):
        subprocess.run(["promtool", *command], cwd=CONFIG, check=True, stdout=sys.stderr)
