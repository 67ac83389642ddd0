"""The dashboards as code: python -m deploy.grafana.dashboards writes deploy/grafana/dashboards/*.json for Grafana.

A query sums rates over the replicas; a quantile is computed from summed buckets. Only the state of one replica (its
circuit, its memory) is shown by `instance`. Every panel has a unit and a description (tests/deploy/test_dashboards.py).

Called by: the command line; `loadtest/observability` runs the queries. Calls: `boards/`.
"""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DashboardLinkType, VariableRefresh

from deploy.grafana.boards.latency import LATENCY
from deploy.grafana.boards.models import MODELS
from deploy.grafana.boards.overview import OVERVIEW
from deploy.grafana.boards.state import STATE
from deploy.grafana.panels import SOURCE, Panel

FOLDER = Path(__file__).parent / "dashboards"


def build(name: str, title: str, panels: list[Panel]) -> dashboard.Dashboard:
    instance = (
        dashboard.QueryVariable("instance")
        .label("replica")
        .datasource(SOURCE)
        .query("label_values(slatewise_build_info, instance)")
    )
    instance.multi(True).include_all(True).all_value(".*").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    board = dashboard.Dashboard(f"Slatewise: {title}").uid(f"slatewise-{name}").tags(["slatewise"]).readonly()
    board.time("now-30m", "now").refresh("10s").tooltip(DashboardCursorSync.CROSSHAIR).with_variable(instance)
    board.link(
        dashboard.DashboardLink("Slatewise")
        .type(DashboardLinkType.DASHBOARDS)
        .tags(["slatewise"])
        .keep_time(True)
        .include_vars(True)
    )
    for k, panel in enumerate(panels):
        board.with_panel(panel.id(k + 1))
    return board


DASHBOARDS = {
    name: build(name, title, panels).build()
    for name, title, panels in (
        ("overview", "Overview", OVERVIEW),
        ("latency", "Latency", LATENCY),
        ("state", "State", STATE),
        ("models", "Models", MODELS),
    )
}


def text(name: str) -> str:
    return json.dumps(DASHBOARDS[name], cls=JSONEncoder, indent=1) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(text(name))
