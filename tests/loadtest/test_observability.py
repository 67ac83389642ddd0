"""The rules for a fast Prometheus."""

from __future__ import annotations

import re

from loadtest.observability.prometheus import faster


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
