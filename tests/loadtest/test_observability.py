"""The rules for a fast Prometheus, the load of its check, and the log of the replicas that it reads."""

from __future__ import annotations

import re
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from loadtest.client import closed_loop, post
from loadtest.observability.faults import Scene, degraded_answers
from loadtest.observability.prometheus import ROOT, faster
from tests.support.redis_server import run_redis


def test_faster_divides_windows_and_keeps_names() -> None:
    rules = "record: job:x:ratio_rate5m\nexpr: rate(x[5m]) / rate(x[1h]) > 0.05\nfor: 15m\nexpr: min_over_time(y[1m])"
    shorter = faster(rules).splitlines()
    assert shorter == [
        "record: job:x:ratio_rate5m",
        "expr: rate(x[5000ms]) / rate(x[60000ms]) > 0.05",
        "for: 15000ms",
        "expr: min_over_time(y[2000ms])",
    ]
    assert not re.search(r"\[\d+[mhd]\]", faster("[3d] [6h] [30m]"))


def test_degraded_answers_are_found_in_the_log(tmp_path: Path) -> None:
    """Without Redis, a ranking of a user is degraded."""
    with ExitStack() as stack:
        scene = Scene(stack, tmp_path, ROOT / "models" / "bundles")
        scene.servers = [scene.serve(1)] * 2
        body = b'{"user": "u1", "candidates": {"item_ids": ["595"]}}'
        closed_loop(scene.ports[1], [post("/rerank", body, "u1")], 1)
        deadline = time.monotonic() + 30
        while (found := degraded_answers(scene)["store_error"]) != (1, 1) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found == (1, 1)


def test_load_explores_and_has_a_new_item(tmp_path: Path) -> None:
    """Two panels would show 0 without it."""
    names = ("slatewise_explored_total", "slatewise_adapted_candidates_total")
    with ExitStack() as stack:
        scene = Scene(stack, tmp_path, ROOT / "models" / "bundles")
        stack.enter_context(run_redis(tmp_path, scene.redis_port))
        scene.fill_redis()
        scene.servers = [scene.serve(0)] * 2
        scene.ports = [scene.ports[0]] * 2
        load = threading.Thread(target=scene.events)
        load.start()
        stack.callback(load.join)
        stack.callback(scene.stop.set)
        deadline = time.monotonic() + 30
        counted: list[float] = []
        while not all(counted) or len(counted) < 2:
            assert time.monotonic() < deadline, counted
            time.sleep(0.1)
            text = str(scene.servers[0].get("/metrics")[1])
            counted = [float(value) for name in names for value in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.M)]
