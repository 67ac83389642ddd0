"""Is the service healthy, and since when is it not?"""

from __future__ import annotations

from deploy.grafana.objectives import FAILED_OBJECTIVE, OBJECTIVE_SECONDS, SLOW_OBJECTIVE
from deploy.grafana.panels import Panel, graph, number, states
from deploy.grafana.promql import RANKED, quantile, quantiles, rate, series, share

DEGRADED = 'reason=~"deadline|overload|store_error"'

OVERVIEW: list[Panel] = [
    number(
        "Replicas",
        "Replicas that answer Prometheus. Is the service up?",
        "none",
        "up",
        'sum(up{job="slatewise", instance=~"$instance"})',
        red_below=1,
    ),
    number(
        "Failed in the last hour",
        "Share of requests that the service failed, all replicas, last hour; the objective is 0.1 %. Is it healthy?",
        "percentunit",
        "{{job}}",
        "job:slatewise_requests_failed:ratio_rate1h",
        red_from=FAILED_OBJECTIVE,
    ),
    number(
        "Slow in the last hour",
        "Share of requests ranked in more than 50 ms over all replicas, last hour; the objective is 1 %. Is it slow?",
        "percentunit",
        "{{job}}",
        "job:slatewise_requests_slow:ratio_rate1h",
        red_from=SLOW_OBJECTIVE,
    ),
    number(
        "p99",
        "99 % of the ranked requests take at most this, now.",
        "s",
        "p99",
        quantile(0.99, "slatewise_request_duration_seconds", where=RANKED),
        red_from=OBJECTIVE_SECONDS,
    ),
    number(
        "Degraded",
        "Share of rankings with the commonest of the reasons deadline, overload and store_error.",
        "percentunit",
        "degraded",
        share(  # the largest reason, not their sum: an answer may have several
            f"max({rate('slatewise_degraded_total', 'reason', DEGRADED)})",
            rate("slatewise_history_cache_total"),  # one for each ranking
        ),
        red_from=0.05,
    ),
    number(
        "Firing alerts",
        "Alerts that fire now. docs/runbook.md has a paragraph on each.",
        "none",
        "firing",
        'count(ALERTS{alertstate="firing"}) or vector(0)',
        red_from=1,
    ),
    graph(
        "Requests",
        "Finished requests by status code. 499: the client disconnected. How are requests answered?",
        "reqps",
        ("{{code}}", rate("slatewise_requests_total", "code")),
        stacked=True,
    ),
    graph(
        "Failed requests",
        "Share of requests that the service failed; the line is the objective. Are requests failing?",
        "percentunit",
        ("failed", share(rate("slatewise_requests_failed_total"), rate("slatewise_requests_total"))),
        line=FAILED_OBJECTIVE,
    ),
    graph(
        "Latency",
        "Time in the application of requests ranked by the model; the line is the objective of 50 ms.",
        "s",
        *quantiles("slatewise_request_duration_seconds", RANKED),
        line=OBJECTIVE_SECONDS,
    ),
    graph(
        "Error budget",
        "Burn rate of the month's error budget over the last hour. 1 spends it exactly; above 14.4 an alert pages.",
        "none",
        ("failed", f"job:slatewise_requests_failed:ratio_rate1h / {FAILED_OBJECTIVE}"),
        ("slow", f"job:slatewise_requests_slow:ratio_rate1h / {SLOW_OBJECTIVE}"),
        line=1,
    ),
    graph(
        "Budget left",
        "Share of the error budget of the last 30 days that is left; below 0 the objective is missed.",
        "percentunit",
        ("failed", f"1 - job:slatewise_requests_failed:ratio_rate30d / {FAILED_OBJECTIVE}"),
        ("slow", f"1 - job:slatewise_requests_slow:ratio_rate30d / {SLOW_OBJECTIVE}"),
        line=0,
        least=None,
    ),
    graph(
        "Saturation",
        "Use of the fullest replica, relative to its limits: threads, requests in flight, wait, memory, open files.",
        "percentunit",
        (
            "processor",
            f"max(rate({series('process_cpu_seconds_total')}[$__rate_interval]) / {series('slatewise_threads')})",
        ),
        (
            "in flight",
            f"max({series('slatewise_requests_in_flight')} / {series('slatewise_requests_in_flight_limit')})",
        ),
        ("wait", f"max({series('slatewise_queue_seconds')} / {series('slatewise_queue_limit_seconds')})"),
        ("memory", f"max({series('process_resident_memory_bytes')} / {series('slatewise_memory_limit_bytes')})"),
        ("open files", f"max({series('process_open_fds')} / {series('process_max_fds')})"),
        line=0.9,
    ),
    graph(
        "Work in progress",
        "Requests in flight, and chunks of work that wait for a thread. Does work pile up?",
        "none",
        ("in flight", f"sum({series('slatewise_requests_in_flight')})"),
        ("queue", f"sum({series('slatewise_queue_length')})"),
    ),
    graph(
        "Refused by reason",
        "key: wrong. key_in_flight, key_rate: above its limit. Others: too much load. Are requests refused?",
        "reqps",
        ("{{reason}}", rate("slatewise_rejected_total", "reason")),
        stacked=True,
    ),
    graph(
        "Degraded by reason",
        "deadline, overload: stopped early. exit: a cheaper exit. store_error: no vector. Are answers degraded?",
        "reqps",
        ("{{reason}}", rate("slatewise_degraded_total", "reason")),
    ),
    graph(
        "Deadlines and clients",
        "Requests whose deadline passed, answered or not, and clients that disconnected.",
        "reqps",
        ("deadline exceeded", rate("slatewise_deadline_exceeded_total")),
        ("client disconnected", rate("slatewise_client_disconnects_total")),
    ),
    graph(
        "Uptime",
        "Time since each replica was started. Teeth of a saw: it crashes, or memory runs out.",
        "s",
        ("{{instance}}", f"time() - {series('process_start_time_seconds')}"),
    ),
    graph(
        "Open files",
        "Files and connections of each replica. Growing without load: a leak. Saturation compares them with the limit.",
        "none",
        ("{{instance}}", series("process_open_fds")),
    ),
    graph(
        "Memory",
        "Resident memory of each replica, and its limit.",
        "bytes",
        ("{{instance}}", series("process_resident_memory_bytes")),
        ("limit of {{instance}}", series("slatewise_memory_limit_bytes")),
        width=12,
    ),
    states(
        "Alerts",
        "Times at which each alert was firing.",
        "{{alertname}} {{instance}}",
        'max by (alertname, instance) (ALERTS{alertstate="firing"})',
        {"1": ("firing", "red")},
        width=12,
    ),
]
