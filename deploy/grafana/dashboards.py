"""The dashboards as code: python -m deploy.grafana.dashboards writes deploy/grafana/dashboards/*.json, which Grafana mounts.

Each query is a sum over replicas of rates, and a quantile one of the summed buckets; only what belongs to one replica (a circuit,
its memory) is shown by `instance`. Every panel has a unit and says what it means: tests/test_dashboards.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphTresholdsStyleMode, StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")  # as in provisioning/datasources
OBJECTIVE_SECONDS = 0.05
FAILED_OBJECTIVE = 0.001
SLOW_OBJECTIVE = 0.01  # as in deploy/prometheus/rules.yml

Panel = timeseries.Panel | stat.Panel | statetimeline.Panel | heatmap.Panel
P = TypeVar("P", timeseries.Panel, stat.Panel, statetimeline.Panel, heatmap.Panel)

# PromQL. `where` are matchers beside the dashboard's variable, `by` the labels that are kept.


def series(metric: str, where: str = "") -> str:
    return f'{metric}{{instance=~"$instance"{where and ", " + where}}}'


def rate(metric: str, by: str = "", where: str = "") -> str:
    return f"sum by ({by}) (rate({series(metric, where)}[$__rate_interval]))"


def quantile(q: float, histogram: str, by: str = "", where: str = "") -> str:
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', f'le, {by}' if by else 'le', where)})"


def quantiles(histogram: str, where: str = "", of: tuple[float, ...] = (0.5, 0.95, 0.99)) -> list[tuple[str, str]]:
    return [(f"p{q * 100:g}", quantile(q, histogram, where=where)) for q in of]


def share(part: str, whole: str) -> str:
    """Of two sums by the same labels; 0 where there was none of the part yet."""
    return f"({part} or 0 * {whole}) / {whole}"


# Panels.


def finish(panel: P, title: str, description: str, unit: str, queries: list[tuple[str, str]]) -> P:
    panel.title(title).description(description).unit(unit).datasource(SOURCE).height(8)
    for k, (legend, expr) in enumerate(queries):
        panel.with_target(
            prometheus.Dataquery().ref_id(chr(ord("A") + k)).expr(expr).legend_format(legend).range().datasource(SOURCE)
        )
    return panel


def limit(panel: timeseries.Panel, value: float) -> timeseries.Panel:
    """A dashed red line: the objective, or what is bounded."""
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
) -> timeseries.Panel:
    panel = finish(timeseries.Panel(), title, description, unit, list(queries)).span(width).min(0)
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
    width: int = 4,
) -> stat.Panel:
    steps = [Threshold(None, "green" if red_below is None else "red")]
    if red_from is not None:
        steps.append(Threshold(red_from, "red"))
    if red_below is not None:
        steps.append(Threshold(red_below, "green"))
    panel = finish(stat.Panel(), title, description, unit, [(legend, expr)]).span(width).height(4)
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


RANKED = 'variant!=""'  # the model was asked: refusals and input order are quick, and would flatter the latency
TOTAL = rate("slatewise_requests_total")
LOOKUPS = 'result!~"corrupt|mismatched"'  # one a request; those two stand beside the look-up's own result

OVERVIEW = [
    number("Replicas", "Replicas that answer Prometheus. Is it there?", "none", "up", 'sum(up{job="slatewise", instance=~"$instance"})', red_below=1),
    number(
        "Failed in the last hour",
        "Share of requests answered 429 or 5xx over all replicas, last hour; the objective is 0.1 %. Is it healthy?",
        "percentunit", "{{job}}", "job:slatewise_requests_failed:ratio_rate1h", red_from=FAILED_OBJECTIVE,
    ),
    number(
        "Slow in the last hour",
        "Share of requests ranked in more than 50 ms over all replicas, last hour; the objective is 1 %. Is it slow?",
        "percentunit", "{{job}}", "job:slatewise_requests_slow:ratio_rate1h", red_from=SLOW_OBJECTIVE,
    ),
    number("p99", "99 % of the ranked requests take at most this, now.", "s", "p99",
           quantile(0.99, "slatewise_request_duration_seconds", where=RANKED), red_from=OBJECTIVE_SECONDS),
    number(
        "Degraded",
        "Share of answers that are not what was asked for: a lower exit, the input order, or without the user's vector.",
        "percentunit", "degraded",
        share(rate("slatewise_degraded_total", where='reason=~"deadline|overload|variant|store_error"'), rate("slatewise_exits_total")), red_from=0.05,
    ),
    number("Firing alerts", "Alerts that fire now; docs/runbook.md has a paragraph on each.", "none", "firing",
           'count(ALERTS{alertstate="firing"}) or vector(0)', red_from=1),
    graph("Requests", "Requests that ended, by status code; 499: the client went away. What do we answer?", "reqps",
          ("{{code}}", rate("slatewise_requests_total", "code")), stacked=True),
    graph("Failed requests", "Share answered 429 or 5xx; the line is the objective. Are we failing, and since when?", "percentunit",
          ("failed", share(rate("slatewise_requests_total", where='code=~"429|5.."'), TOTAL)), line=FAILED_OBJECTIVE),
    graph("Latency", "Of the requests that the model ranked, from entering the application to the answer; the line is the objective of 50 ms.", "s",
          *quantiles("slatewise_request_duration_seconds", RANKED), line=OBJECTIVE_SECONDS),
    graph("Error budget", "How many times faster than allowed the month's budget burns, over the last hour; above 14.4 the alerts on it page.", "none",
          ("failed", f"job:slatewise_requests_failed:ratio_rate1h / {FAILED_OBJECTIVE}"),
          ("slow", f"job:slatewise_requests_slow:ratio_rate1h / {SLOW_OBJECTIVE}"), line=1),
    graph("Saturation", "Of the fullest replica: processor against threads, in flight and tokens against their limits, memory against its own.", "percentunit",
          ("processor", f"max(rate({series('process_cpu_seconds_total')}[$__rate_interval]) / {series('slatewise_threads')})"),
          ("in flight", f"max({series('slatewise_requests_in_flight')} / {series('slatewise_requests_in_flight_limit')})"),
          ("tokens", f"max({series('slatewise_outstanding_tokens')} / {series('slatewise_outstanding_tokens_limit')})"),
          ("memory", f"max({series('process_resident_memory_bytes')} / {series('slatewise_memory_limit_bytes')})"), line=0.9),
    graph("At work", "Requests that are in the service, and quanta that wait for a thread. Is work piling up?", "none",
          ("in flight", f"sum({series('slatewise_requests_in_flight')})"), ("queue", f"sum({series('slatewise_queue_length')})")),
    graph("Refused by door", "key: none valid. in_flight: before the body is read. tokens: after it, then in input order if allowed. Are we refusing?", "reqps",
          ("{{reason}}", rate("slatewise_rejected_total", "reason")), stacked=True),
    graph("Degraded by reason", "deadline, overload: less of the ladder (exit: a lower rung). store_error: without the user's vector. Are we degrading?",
          "reqps",
          ("{{reason}}", rate("slatewise_degraded_total", "reason"))),
    graph("Deadlines and clients", "Requests whose deadline passed, answered all the same or not, and clients that did not wait.", "reqps",
          ("deadline exceeded", rate("slatewise_deadline_exceeded_total")), ("client went away", rate("slatewise_client_disconnects_total"))),
    graph("Memory", "Resident memory of each replica, and its limit.", "bytes",
          ("{{instance}}", series("process_resident_memory_bytes")), ("limit of {{instance}}", series("slatewise_memory_limit_bytes")), width=12),
    states("Alerts", "Which alert was firing when.", "{{alertname}} {{instance}}", 'max by (alertname, instance) (ALERTS{alertstate="firing"})',
           {"1": ("firing", "red")}, width=12),
]  # fmt: skip

LATENCY = [
    graph("Mean by stage", "The mean request, stage upon stage: the top is its mean duration. Which stage is slow?", "s",
          ("{{stage}}", f"{rate('slatewise_stage_duration_seconds_sum', 'stage')} / "
                        f"ignoring (stage) group_left () {rate('slatewise_request_duration_seconds_count')}"),
          stacked=True, width=12),
    heat("Durations", "How many requests took how long; two bands are two kinds of request, often hits and misses of the history cache.", "s",
         "slatewise_request_duration_seconds", RANKED, width=12),
    graph("Latency", "Of the requests that the model ranked; the line is the objective.", "s", *quantiles("slatewise_request_duration_seconds", RANKED),
          line=OBJECTIVE_SECONDS),
    graph("p99 by stage", "A stage's slowest hundredth. queue: waiting for a thread.", "s",
          ("{{stage}}", quantile(0.99, "slatewise_stage_duration_seconds", "stage"))),
    graph("Waiting for a thread", "Share of the latency that is waiting. High: too few threads or replicas for the load.", "percentunit",
          ("waiting", rate("slatewise_stage_duration_seconds_sum", where='stage="queue"') + " / " + rate("slatewise_request_duration_seconds_sum"))),
    graph("p95 by variant", "Which variant is slow?", "s",
          ("{{ranker}} {{variant}}", quantile(0.95, "slatewise_request_duration_seconds", "ranker, variant", RANKED)),
          line=OBJECTIVE_SECONDS),
    graph("p95 by size", "By events read and candidates. Slow for large requests only: look at who sends them.", "s",
          ("{{size}}", quantile(0.95, "slatewise_ranking_duration_seconds", "size")), line=OBJECTIVE_SECONDS),
    graph("p95 by replica", "One line apart from the others is one machine's fault, not the model's.", "s",
          ("{{instance}}", quantile(0.95, "slatewise_request_duration_seconds", "instance", RANKED)), line=OBJECTIVE_SECONDS),
    graph("Requests by size", "What is asked, by events read and candidates.", "reqps", ("{{size}}", rate("slatewise_ranking_duration_seconds_count", "size")),
          stacked=True),
    graph("Candidates", "Candidates of a request.", "none", *quantiles("slatewise_candidates_per_request")),
    graph("Events", "Events read of a request's history.", "none", *quantiles("slatewise_history_length")),
]  # fmt: skip

STATE = [
    graph("History cache", "Requests by what was kept of their history; miss is a whole encoding, none has no user or no history. Is it the cache?", "reqps",
          ("{{result}}", rate("slatewise_history_cache_total", "result")), stacked=True),
    graph("Events reused", "Share of the events read whose kept state was used again: the encoding that was saved.", "percentunit",
          ("reused", f"{rate('slatewise_history_events_reused_total')} / "
                     f"({rate('slatewise_history_events_reused_total')} + {rate('slatewise_history_events_encoded_total')})")),
    graph("History cache bytes", "Kept history state and its bound; at the bound the least recently used go.", "bytes",
          ("{{instance}}", series("slatewise_history_cache_bytes")), ("bound of {{instance}}", series("slatewise_history_cache_limit_bytes"))),
    graph("Meta-embeddings by place", "hit_local: bundle or in process; stale: too old; miss: the user has none; error: no answer from Redis.", "reqps",
          ("{{result}}", rate("slatewise_embedding_lookups_total", "result", LOOKUPS)), stacked=True),
    graph("Meta-embeddings found", "Share of look-ups that found a vector.", "percentunit",
          ("found", share(rate("slatewise_embedding_lookups_total", where='result=~"hit_.*|stale"'),
                          rate("slatewise_embedding_lookups_total", where=LOOKUPS)))),
    graph("Values that cannot be used", "Of another size or generation (mismatched), or of no known form (corrupt). Above 0 somebody else writes there.", "ops",
          ("{{result}}", rate("slatewise_embedding_lookups_total", "result", 'result=~"corrupt|mismatched"'))),
    graph("Age of the generation", "Time since the newest live generation of meta-embeddings was published. Are vectors fresh?", "s",
          ("{{ranker}}", f"max by (ranker) ({series('slatewise_embedding_generation_age_seconds')})")),
    graph("Age of what is served", "Age of the vectors in answers.", "s", *quantiles("slatewise_embedding_age_seconds", of=(0.5, 0.95))),
    graph("Generation", "Newest live generation as each replica sees it; 0: none. Lines that stay apart: a replica does not reach Redis.", "none",
          ("{{ranker}} {{instance}}", series("slatewise_embedding_generation"))),
    graph("Redis round trips", "Time of a round trip, failed ones included: hmget for requests, get for the poll. Is it Redis?", "s",
          ("{{command}} p50", quantile(0.5, "slatewise_redis_command_duration_seconds", "command")),
          ("{{command}} p99", quantile(0.99, "slatewise_redis_command_duration_seconds", "command"))),
    graph("Look-ups", "Time of a request's look-up, waited for or not; at most SLATEWISE_REDIS_TIMEOUT_MS.", "s",
          *quantiles("slatewise_embedding_lookup_duration_seconds")),
    graph("Redis errors", "Round trips that failed, by the name of the error.", "ops", ("{{kind}}", rate("slatewise_redis_errors_total", "kind"))),
    states("Redis circuit", "Open: Redis did not answer in time, and requests are answered without it.", "{{instance}}",
           series("slatewise_redis_circuit_state"),
           {"0": ("closed", "green"), "1": ("tried", "orange"), "2": ("open", "red")}, width=12),
    graph("Users kept in process", "Users whose look-up is kept, those without a vector included.", "none",
          ("{{instance}}", series("slatewise_embedding_cache_entries")), width=6),
    graph("Log and capture", "Lines written, and dropped because nobody read them in time or the disk is full.", "ops",
          ("{{kind}} {{result}}", rate("slatewise_lines_total", "kind, result")), width=6),
]  # fmt: skip

MODELS = [
    graph("Versions", "Replicas that serve a variant of a version. Two versions of one ranker: a roll-out is under way.", "none",
          ("{{ranker}} {{version}} {{variant}}", f"sum by (ranker, version, variant) ({series('slatewise_model_info')})")),
    graph("Service", "Replicas by version of the service.", "none", ("{{version}}", f"sum by (version) ({series('slatewise_build_info')})")),
    graph("Load and warm-up", "Time from the start of loading until a ranker was warm.", "s",
          ("{{ranker}} {{instance}}", series("slatewise_model_load_duration_seconds"))),
    graph("Answers by variant", "Which variant answers? Empty is none: refused, invalid, or the input order.", "reqps",
          ("{{ranker}} {{version}} {{variant}}", rate("slatewise_requests_total", "ranker, version, variant")), stacked=True),
    graph("Answers by exit", "set is the whole ladder; lower rungs where they were asked for, or under a deadline or load.", "reqps",
          ("{{ranker}} {{exit}}", rate("slatewise_exits_total", "ranker, exit")), stacked=True),
    graph("Unknown items", "Share of candidates whose id the ranker does not know. Growing: the catalogue moves on, and the model does not.", "percentunit",
          ("{{ranker}}", share(rate("slatewise_unknown_candidates_total", "ranker"), rate("slatewise_candidates_per_request_sum", "ranker"))), line=0.1),
    graph("Best score", "Quantiles of the highest score of an answer. A step is a new model or another kind of request; a slope is drift.", "percentunit",
          *quantiles("slatewise_best_score", of=(0.1, 0.5, 0.9))),
    graph("Best score by variant", "Variants of one ranker should agree.", "percentunit",
          ("{{ranker}} {{variant}}", f"{rate('slatewise_best_score_sum', 'ranker, variant')} / {rate('slatewise_best_score_count', 'ranker, variant')}")),
    heat("Best scores", "How many answers had which highest score: drift is a band that moves.", "percentunit", "slatewise_best_score"),
]  # fmt: skip


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
