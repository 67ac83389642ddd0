"""Which versions and variants serve, do their scores drift, and what is new or explored?"""

from __future__ import annotations

from deploy.grafana.panels import Panel, graph, heat
from deploy.grafana.promql import quantiles, rate, series, share

MODELS: list[Panel] = [
    graph(
        "Versions",
        "Replicas that serve a variant of a version. Two versions of one ranker: a roll-out is in progress.",
        "none",
        ("{{ranker}} {{version}} {{variant}}", f"sum by (ranker, version, variant) ({series('slatewise_model_info')})"),
    ),
    graph(
        "Service",
        "Replicas by version of the service.",
        "none",
        ("{{version}}", f"sum by (version) ({series('slatewise_build_info')})"),
    ),
    graph(
        "Load and warm-up",
        "Time from the start of loading to the end of the warm-up.",
        "s",
        ("{{ranker}} {{instance}}", series("slatewise_model_load_duration_seconds")),
    ),
    graph(
        "Answers by variant",
        "Which variant answers? Empty: refused, invalid, or in input order.",
        "reqps",
        ("{{ranker}} {{version}} {{variant}}", rate("slatewise_requests_total", "ranker, version, variant")),
        stacked=True,
    ),
    graph(
        "Answers by exit",
        "set is the whole cascade. Cheaper exits: on request, or under a deadline or load.",
        "reqps",
        ("{{ranker}} {{exit}}", rate("slatewise_exits_total", "ranker, exit")),
        stacked=True,
    ),
    graph(
        "Unknown items",
        "Share of candidates with an unknown id. Growing: the catalogue changes and the model does not. Retrain it.",
        "percentunit",
        (
            "{{ranker}}",
            share(
                rate("slatewise_unknown_candidates_total", "ranker"),
                rate("slatewise_candidates_per_request_sum", "ranker"),
            ),
        ),
        line=0.1,
    ),
    graph(
        "Adapted items",
        "Share of the unknown candidates with a vector adapted to their first events. Falling: the refresh is late.",
        "percentunit",
        (
            "{{ranker}}",
            share(
                rate("slatewise_adapted_candidates_total", "ranker"),
                rate("slatewise_unknown_candidates_total", "ranker"),
            ),
        ),
    ),
    graph(
        "Explored answers",
        "Share of the answers whose scores are drawn. Does the share of requests with explore arrive?",
        "percentunit",
        ("{{ranker}}", share(rate("slatewise_explored_total", "ranker"), rate("slatewise_exits_total", "ranker"))),
    ),
    graph(
        "Best score",
        "Quantiles of the highest score of an answer. A step: a new model or other requests. A slope: drift.",
        "percentunit",
        *quantiles("slatewise_best_score", of=(0.1, 0.5, 0.9)),
    ),
    graph(
        "Best score by variant",
        "Variants of one ranker should agree.",
        "percentunit",
        (
            "{{ranker}} {{variant}}",
            rate("slatewise_best_score_sum", "ranker, variant")
            + " / "
            + rate("slatewise_best_score_count", "ranker, variant"),
        ),
    ),
    heat(
        "Best scores",
        "Number of answers by highest score. A band that moves is drift.",
        "percentunit",
        "slatewise_best_score",
    ),
]
