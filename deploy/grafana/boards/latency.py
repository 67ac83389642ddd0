"""Which stage, variant, size or replica is slow?"""

from __future__ import annotations

from deploy.grafana.objectives import OBJECTIVE_SECONDS
from deploy.grafana.panels import Panel, graph, heat
from deploy.grafana.promql import RANKED, quantile, quantiles, rate, share

LATENCY: list[Panel] = [
    graph(
        "Mean by stage",
        "Mean time of each stage, stacked: the top is the mean duration of a request. Which stage is slow?",
        "s",
        (
            "{{stage}}",
            f"{rate('slatewise_stage_duration_seconds_sum', 'stage')} / "
            f"ignoring (stage) group_left () {rate('slatewise_request_duration_seconds_count')}",
        ),
        stacked=True,
        width=12,
    ),
    heat(
        "Durations",
        "Requests by duration. Two bands are two kinds of request, often hits and misses of the history cache.",
        "s",
        "slatewise_request_duration_seconds",
        RANKED,
        width=12,
    ),
    graph(
        "Latency",
        "Time in the application of requests ranked by the model; the line is the objective.",
        "s",
        *quantiles("slatewise_request_duration_seconds", RANKED),
        line=OBJECTIVE_SECONDS,
    ),
    graph(
        "p99 by stage",
        "99th percentile of each stage. queue: waiting for a thread.",
        "s",
        ("{{stage}}", quantile(0.99, "slatewise_stage_duration_seconds", "stage")),
    ),
    graph(
        "Waiting for a thread",
        "Share of the latency spent in the queue. High: too few threads or replicas for the load.",
        "percentunit",
        (
            "waiting",
            rate("slatewise_stage_duration_seconds_sum", where='stage="queue"')
            + " / "
            + rate("slatewise_request_duration_seconds_sum"),
        ),
    ),
    graph(
        "p95 by variant",
        "Which variant is slow?",
        "s",
        ("{{ranker}} {{variant}}", quantile(0.95, "slatewise_request_duration_seconds", "ranker, variant", RANKED)),
        line=OBJECTIVE_SECONDS,
    ),
    graph(
        "p95 by size",
        "By events read and candidates. If only large requests are slow, find the client that sends them.",
        "s",
        ("{{size}}", quantile(0.95, "slatewise_ranking_duration_seconds", "size")),
        line=OBJECTIVE_SECONDS,
    ),
    graph(
        "p95 by replica",
        "If one line differs from the others, the fault is in that machine, not in the model.",
        "s",
        ("{{instance}}", quantile(0.95, "slatewise_request_duration_seconds", "instance", RANKED)),
        line=OBJECTIVE_SECONDS,
    ),
    graph(
        "Requests by size",
        "Requests by events read and candidates.",
        "reqps",
        ("{{size}}", rate("slatewise_ranking_duration_seconds_count", "size")),
        stacked=True,
    ),
    graph(
        "Requests by endpoint",
        "Finished requests by route.",
        "reqps",
        ("{{endpoint}}", rate("slatewise_requests_total", "endpoint")),
        stacked=True,
    ),
    graph(
        "Failed by endpoint",
        "Share of the requests of each route that the service failed (429, 500, 503, and 504 by its own deadline).",
        "percentunit",
        (
            "{{endpoint}}",
            share(
                rate("slatewise_requests_failed_total", "endpoint"),
                rate("slatewise_requests_total", "endpoint"),
            ),
        ),
    ),
    graph(
        "p95 by endpoint",
        "95th percentile of each route, refusals included.",
        "s",
        ("{{endpoint}}", quantile(0.95, "slatewise_request_duration_seconds", "endpoint")),
    ),
    graph("Candidates", "Number of candidates in a request.", "none", *quantiles("slatewise_candidates_per_request")),
    graph("Events", "Number of history events read for a request.", "none", *quantiles("slatewise_history_length")),
]
