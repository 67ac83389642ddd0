"""Panels of four kinds: graph, number, states over time, heat map.

Called by: `boards/`. Calls: grafana_foundation_sdk.
"""

from __future__ import annotations

from typing import TypeVar

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models.common import GraphTresholdsStyleMode, StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.promql import series

SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")  # as in provisioning/datasources

Panel = timeseries.Panel | stat.Panel | statetimeline.Panel | heatmap.Panel
P = TypeVar("P", timeseries.Panel, stat.Panel, statetimeline.Panel, heatmap.Panel)


def finish(panel: P, title: str, description: str, unit: str, queries: list[tuple[str, str]]) -> P:
    panel.title(title).description(description).unit(unit).datasource(SOURCE).height(8)
    for k, (legend, expr) in enumerate(queries):
        panel.with_target(
            prometheus.Dataquery().ref_id(chr(ord("A") + k)).expr(expr).legend_format(legend).range().datasource(SOURCE)
        )
    return panel


def limit(panel: timeseries.Panel, value: float) -> timeseries.Panel:
    """Draw a dashed red line at an objective or a limit."""
    steps = [Threshold(None, "green"), Threshold(value, "red")]
    panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    return panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: tuple[str, str],
    stacked: bool = False,
    line: float | None = None,
    width: int = 8,
    least: float | None = 0,
) -> timeseries.Panel:
    panel = finish(timeseries.Panel(), title, description, unit, list(queries)).span(width)
    if least is not None:
        panel.min(least)
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    if stacked:
        panel.fill_opacity(60).stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    return panel if line is None else limit(panel, line)


def number(
    title: str,
    description: str,
    unit: str,
    legend: str,
    expr: str,
    red_from: float | None = None,
    red_below: float | None = None,
) -> stat.Panel:
    steps = [Threshold(None, "green" if red_below is None else "red")]
    if red_from is not None:
        steps.append(Threshold(red_from, "red"))
    if red_below is not None:
        steps.append(Threshold(red_below, "green"))
    panel = finish(stat.Panel(), title, description, unit, [(legend, expr)]).span(4).height(4)
    return panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))


def states(
    title: str, description: str, legend: str, expr: str, names: dict[str, tuple[str, str]], width: int = 8
) -> statetimeline.Panel:
    mapping = ValueMap({value: ValueMappingResult(text=text, color=color) for value, (text, color) in names.items()})
    return finish(statetimeline.Panel(), title, description, "none", [(legend, expr)]).span(width).mappings([mapping])


def heat(title: str, description: str, unit: str, histogram: str, where: str = "", width: int = 8) -> heatmap.Panel:
    panel = finish(heatmap.Panel(), title, description, unit, []).span(width)
    expr = f"sum by (le) (increase({series(histogram + '_bucket', where)}[$__rate_interval]))"
    query = (
        prometheus.Dataquery()
        .ref_id("A")
        .expr(expr)
        .legend_format("{{le}}")
        .format(PromQueryFormat.HEATMAP)
        .range()
        .datasource(SOURCE)
    )
    return (
        panel.with_target(query)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(heatmap.HeatmapColorOptions().scheme("Blues"))
    )
