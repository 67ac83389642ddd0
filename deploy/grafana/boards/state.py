"""History cache, meta-embeddings, Redis, events and stored histories."""

from __future__ import annotations

from deploy.grafana.panels import Panel, graph, states
from deploy.grafana.promql import LOOKUPS, quantile, quantiles, rate, series, share

STATE: list[Panel] = [
    graph(
        "History cache",
        "By cache result. miss: everything is encoded. none: no user or no history. Is it the cache?",
        "reqps",
        ("{{result}}", rate("slatewise_history_cache_total", "result")),
        stacked=True,
    ),
    graph(
        "Events reused",
        "Share of the events read whose state came from the cache, so they were not encoded again.",
        "percentunit",
        (
            "reused",
            f"{rate('slatewise_history_events_reused_total')} / "
            f"({rate('slatewise_history_events_reused_total')} + {rate('slatewise_history_events_encoded_total')})",
        ),
    ),
    graph(
        "History cache bytes",
        "Size of the cached histories and its limit. At the limit, the least recently used ones are evicted.",
        "bytes",
        ("{{instance}}", series("slatewise_history_cache_bytes")),
        ("limit of {{instance}}", series("slatewise_history_cache_limit_bytes")),
    ),
    graph(
        "Meta-embeddings by source",
        "hit_local: from the bundle or cached. stale: too old. miss: no vector. error: no answer from Redis.",
        "reqps",
        ("{{result}}", rate("slatewise_embedding_lookups_total", "result", LOOKUPS)),
        stacked=True,
    ),
    graph(
        "Meta-embeddings found",
        "Share of look-ups that found a vector.",
        "percentunit",
        (
            "found",
            share(
                rate("slatewise_embedding_lookups_total", where='result=~"hit_.*|stale"'),
                rate("slatewise_embedding_lookups_total", where=LOOKUPS),
            ),
        ),
    ),
    graph(
        "Invalid values",
        "mismatched: other size or generation. corrupt: unknown format. Above 0, another program writes there.",
        "ops",
        ("{{result}}", rate("slatewise_embedding_lookups_total", "result", 'result=~"corrupt|mismatched"')),
    ),
    graph(
        "Age of the generation",
        "Time since the newest live generation of meta-embeddings was published. Are vectors fresh?",
        "s",
        ("{{ranker}}", f"max by (ranker) ({series('slatewise_embedding_generation_age_seconds')})"),
    ),
    graph(
        "Age of served vectors",
        "Age of the meta-embeddings used in answers.",
        "s",
        *quantiles("slatewise_embedding_age_seconds", of=(0.5, 0.95)),
    ),
    graph(
        "Generation",
        "Newest live generation by replica; 0: no generation. If lines stay apart, a replica cannot reach Redis.",
        "none",
        ("{{ranker}} {{instance}}", series("slatewise_embedding_generation")),
    ),
    graph(
        "Redis round trips",
        "Duration of round trips, also of failed ones. hmget: requests. get: poll of generations. Is it Redis?",
        "s",
        ("{{command}} p50", quantile(0.5, "slatewise_redis_command_duration_seconds", "command")),
        ("{{command}} p99", quantile(0.99, "slatewise_redis_command_duration_seconds", "command")),
    ),
    graph(
        "Look-ups",
        "Duration of a request's look-up, at most SLATEWISE_REDIS_TIMEOUT_MS. Encoding may run at the same time.",
        "s",
        *quantiles("slatewise_embedding_lookup_duration_seconds"),
    ),
    graph(
        "Redis errors",
        "Failed round trips by name of the error.",
        "ops",
        ("{{kind}}", rate("slatewise_redis_errors_total", "kind")),
    ),
    states(
        "Redis circuit",
        "open: Redis did not answer in time, so requests are answered without it. half-open: it is being tried.",
        "{{instance}}",
        series("slatewise_redis_circuit_state"),
        {"0": ("closed", "green"), "1": ("half-open", "orange"), "2": ("open", "red")},
        width=12,
    ),
    graph(
        "Users cached in process",
        "Users with a cached look-up result, users without a vector included.",
        "none",
        ("{{instance}}", series("slatewise_embedding_cache_entries")),
        width=6,
    ),
    graph(
        "Log and capture",
        "Lines written, and lines dropped because the reader was too slow or the disk was full.",
        "ops",
        ("{{kind}} {{result}}", rate("slatewise_lines_total", "kind, result")),
        width=6,
    ),
    graph(
        "Events",
        "Events that were sent. failed, refused: answered 503 or 429, so the client must repeat them.",
        "ops",
        ("{{result}}", rate("slatewise_events_total", "result")),
        stacked=True,
    ),
    graph(
        "Events waiting",
        "Events that wait to be written, in the fullest replica. Growing: Redis is slower than the clients.",
        "none",
        ("waiting", f"max({series('slatewise_events_waiting')})"),
    ),
    graph(
        "Writes of events",
        "Time to write one batch to the histories and to the journal of the Parquet files.",
        "s",
        *quantiles("slatewise_events_write_duration_seconds"),
    ),
    graph(
        "Events in files",
        "Events for the Parquet files. dropped: the disk is full, and training will miss them.",
        "ops",
        ("{{result}}", rate("slatewise_events_tapped_total", "result")),
        stacked=True,
    ),
    graph(
        "Stored histories",
        "Reads of stored histories. miss: the user has none. error: no answer from Redis in time.",
        "ops",
        ("{{result}}", rate("slatewise_history_reads_total", "result")),
        stacked=True,
    ),
    graph(
        "Histories in process",
        "Size of the histories that a replica without Redis keeps; they end with it.",
        "bytes",
        ("{{instance}}", series("slatewise_embedded_histories_bytes")),
    ),
]
