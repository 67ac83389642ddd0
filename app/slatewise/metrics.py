"""All Prometheus metrics with their labels and buckets. Units are base units (seconds, bytes); no label holds an id.

Called by: `main.py`, `http/`, `ranking/` and `store/`. Calls: `schemas.py` for the closed lists of label values.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar, get_args

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from slatewise import VERSION
from slatewise.schemas import CacheResult, DegradedReason
from slatewise.version_schemas import LoadOutcome, ShadowResult, StopReason

# Seconds. Fine below the objective of 50 ms, which is an edge of a bucket.
BUCKETS = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
)
RATIO_BUCKETS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
SIZE_BUCKETS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)
SCORE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZES = (
    (100, "up to 100"),
    (500, "101 to 500"),
    (2_000, "501 to 2000"),
)  # largest number of events and candidates, label
LARGER = "over 2000"

M = TypeVar("M", Counter, Gauge, Histogram)
STAGES = ("parse", "features", "embed", "queue", "encode", "score", "serialize")

FILES_READ = Counter(
    "slatewise_files_read_total",
    "Readings of files that changed while the server ran, by `kind` of file and `result`.",
    ["kind", "result"],
)
FILES_STALE = Gauge(
    "slatewise_files_stale", "1: the newest files of this `kind` cannot be used, and older ones are in use.", ["kind"]
)
REQUESTS = Counter(
    "slatewise_requests_total",
    "Requests that ended, by status code; 499: the client disconnected.",
    ["endpoint", "ranker", "version", "variant", "code"],
)
FAILED = Counter(
    "slatewise_requests_failed_total",
    "Requests that the service failed, by status: 429, 500, 503, and 504 if the client set no deadline.",
    ["endpoint", "code"],
)
FAILURES = ("429", "500", "503", "504")
DURATION = Histogram(
    "slatewise_request_duration_seconds",
    "Time from entering the application to the response.",
    ["endpoint", "ranker", "variant"],
    buckets=BUCKETS,
)
DURATION_BY_SIZE = Histogram(
    "slatewise_ranking_duration_seconds",
    "Duration of the requests that the model ranked, by number of events read plus candidates.",
    ["size"],
    buckets=BUCKETS,
)
STAGE = Histogram("slatewise_stage_duration_seconds", "Time of one stage of a request.", ["stage"], buckets=BUCKETS)
IN_FLIGHT = Gauge("slatewise_requests_in_flight", "Requests that are being processed.")
IN_FLIGHT_LIMIT = Gauge(
    "slatewise_requests_in_flight_limit", "Number of requests in flight above which new ones are refused."
)
QUEUE = Gauge("slatewise_queue_seconds", "Predicted time until the work of the admitted requests is done.")
QUEUE_LIMIT = Gauge(
    "slatewise_queue_limit_seconds", "Predicted wait for other requests above which the response is the input order."
)
PREDICTION = Histogram(
    "slatewise_work_ratio",
    "Time in the model over the time that was predicted, by request that was ranked in full.",
    buckets=RATIO_BUCKETS,
)
DEAD_SECONDS = Counter(
    "slatewise_dead_inference_seconds_total", "Time in the model that went into requests that had ended meanwhile."
)
LOOP_LAG = Histogram(
    "slatewise_event_loop_lag_seconds",
    "Time by which the event loop was late for a timer of its own, twenty times a second.",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0),
)
QUEUE_LENGTH = Gauge("slatewise_queue_length", "Chunks of work that wait for a thread.")
THREADS = Gauge("slatewise_threads", "Threads that run the model.")
MEMORY_LIMIT = Gauge(
    "slatewise_memory_limit_bytes", "Memory limit of the cgroup, or the memory of the machine if there is no limit."
)
CONNECTIONS = Gauge("slatewise_connections", "Open connections.")
CONNECTIONS_LIMIT = Gauge("slatewise_connections_limit", "Number of connections above which new ones are refused.")
CONNECTIONS_CLOSED = Counter(
    "slatewise_connections_closed_total", "Connections that the server closed on its own, by reason.", ["reason"]
)
DISCONNECTS = Counter("slatewise_client_disconnects_total", "Clients that disconnected before the response.")
REJECTED = Counter(
    "slatewise_rejected_total",
    "Requests refused for a missing or wrong key, for the limits of a key, or for overload, by reason.",
    ["reason"],
)
KEY_REQUESTS = Counter(
    "slatewise_key_requests_total",
    "Requests of the keys with a name, by `key` (the name) and `result`: admitted, or the limit that refused them.",
    ["key", "result"],
)
DEGRADED = Counter(
    "slatewise_degraded_total", "Degraded responses, by reason; a response may have several reasons.", ["reason"]
)
DEADLINE_EXCEEDED = Counter("slatewise_deadline_exceeded_total", "Requests whose deadline passed.")
CANDIDATES = Histogram(
    "slatewise_candidates_per_request", "Candidates of a ranked request.", ["ranker"], buckets=SIZE_BUCKETS
)
HISTORY_LENGTH = Histogram("slatewise_history_length", "Events read for a ranked request.", buckets=SIZE_BUCKETS)
UNKNOWN_CANDIDATES = Counter(
    "slatewise_unknown_candidates_total", "Candidates whose id the ranker does not know.", ["ranker"]
)
ADAPTED_CANDIDATES = Counter(
    "slatewise_adapted_candidates_total",
    "Unknown candidates with a vector of their own, adapted to the item's first events.",
    ["ranker"],
)
UNKNOWN_ACTIONS = Counter(
    "slatewise_unknown_actions_total", "Events read whose action the ranker does not know.", ["ranker"]
)
UNKNOWN_VALUES = Counter(
    "slatewise_unknown_values_total",
    "Values in the fields of unknown candidates that the ranker does not know.",
    ["ranker", "field"],
)
EXITS = Counter("slatewise_exits_total", "Responses by exit.", ["ranker", "exit"])
EXPLORED = Counter("slatewise_explored_total", "Responses whose scores are drawn.", ["ranker"])
BEST_SCORE = Histogram(
    "slatewise_best_score",
    "Highest score of a response that used the head weights of the manifest and did not explore.",
    ["ranker", "variant"],
    buckets=SCORE_BUCKETS,
)
HISTORY_CACHE = Counter("slatewise_history_cache_total", "Requests by result of the history cache.", ["result"])
HISTORY_CACHE_BYTES = Gauge("slatewise_history_cache_bytes", "Bytes of the cached history states.")
HISTORY_CACHE_LIMIT = Gauge("slatewise_history_cache_limit_bytes", "Maximum bytes of the cached history states.")
HISTORY_REUSED = Counter("slatewise_history_events_reused_total", "Events whose cached state was reused.")
HISTORY_ENCODED = Counter("slatewise_history_events_encoded_total", "Events that were encoded.")
EMBEDDINGS = Counter("slatewise_embedding_lookups_total", "Meta-embedding look-ups by result.", ["result"])
EMBEDDING_AGE = Histogram(
    "slatewise_embedding_age_seconds",
    "Age of the meta-embeddings served.",
    buckets=(60, 300, 900, 3_600, 14_400, 86_400, 604_800, 2_592_000),
)
EMBEDDING_DURATION = Histogram(
    "slatewise_embedding_lookup_duration_seconds", "Time of the look-up of one request.", buckets=BUCKETS
)
EMBEDDING_CACHE_ENTRIES = Gauge("slatewise_embedding_cache_entries", "Users whose look-up is cached in process.")
GENERATION = Gauge(
    "slatewise_embedding_generation",
    "Newest live generation of meta-embeddings; 0 if there is no generation.",
    ["ranker"],
)
GENERATION_AGE = Gauge(
    "slatewise_embedding_generation_age_seconds", "Age of the newest live generation of meta-embeddings.", ["ranker"]
)
CIRCUIT_STATE = Gauge(
    "slatewise_redis_circuit_state",
    "0, closed: requests use Redis; 1, half open: a probe is running; 2, open: requests do not use Redis.",
)
REDIS_DURATION = Histogram(
    "slatewise_redis_command_duration_seconds", "Time of one Redis command.", ["command"], buckets=BUCKETS
)
REDIS_ERRORS = Counter("slatewise_redis_errors_total", "Redis commands that failed, by kind.", ["kind"])
EVENTS = Counter("slatewise_events_total", "Events that were sent, by result.", ["result"])
EVENTS_WAITING = Gauge("slatewise_events_waiting", "Events that wait to be written.")
EVENTS_WRITE_DURATION = Histogram(
    "slatewise_events_write_duration_seconds", "Time to write one batch of events.", buckets=BUCKETS
)
EVENTS_TAPPED = Counter("slatewise_events_tapped_total", "Events for the Parquet files, by result.", ["result"])
HISTORY_READS = Counter("slatewise_history_reads_total", "Reads of stored histories by result.", ["result"])
HISTORIES_USERS = Gauge("slatewise_embedded_histories_users", "Users with a history in this process.")
HISTORIES_BYTES = Gauge("slatewise_embedded_histories_bytes", "Bytes of the histories in this process.")
LINES = Counter(
    "slatewise_lines_total",
    "Lines of the request log, the capture and the server's own log, written or dropped.",
    ["kind", "result"],
)
MODEL_INFO = Gauge("slatewise_model_info", "1 for each variant that is served.", ["ranker", "version", "variant"])
MODEL_LOAD = Gauge("slatewise_model_load_duration_seconds", "Time to load and warm up a ranker.", ["ranker"])
MODEL_RELOADS = Counter(
    "slatewise_model_reloads_total",
    "Versions that were loaded while the server served, by outcome; `waiting`: files or vectors were not there yet.",
    ["outcome"],
)
MODEL_LAST_SUCCESS = Gauge(
    "slatewise_model_last_success_timestamp_seconds", "Time at which a version was last loaded.", ["ranker"]
)
CANARY_SHARE = Gauge("slatewise_canary_share", "Share of the users whose requests the candidate answers.", ["ranker"])
CANARY_STOPS = Counter("slatewise_canary_stops_total", "Canaries stopped by their rule.", ["ranker", "reason"])
SHADOW_REQUESTS = Counter(
    "slatewise_shadow_requests_total", "Requests for both versions, by result of the comparison.", ["ranker", "result"]
)
SHADOW_OVERLAP = Histogram(
    "slatewise_shadow_topk_overlap_ratio",
    "Share of the first ten results that both versions have.",
    ["ranker"],
    buckets=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
SHADOW_TAU = Histogram(
    "slatewise_shadow_kendall_tau",
    "Kendall's tau-b of the scores of both versions.",
    ["ranker"],
    buckets=(-0.5, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
)
SHADOW_SHIFT = Histogram(
    "slatewise_shadow_score_shift",
    "Mean score of the candidate version minus that of the served one, by request.",
    ["ranker"],
    buckets=(-0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
)
SHADOW_LATENCY = Histogram(
    "slatewise_shadow_latency_ratio",
    "Time in the model of the candidate version over that of the served one, by request.",
    ["ranker"],
    buckets=RATIO_BUCKETS,
)
BUILD_INFO = Gauge("slatewise_build_info", "1, with the version of the service.", ["version"])

# A fifth of all series; Prometheus has the time of the first sample.
disable_created_metrics()  # type: ignore[no-untyped-call]

BUILD_INFO.labels(VERSION).set(1)
STAGES_BY_NAME = {stage: STAGE.labels(stage) for stage in STAGES}
# Create each series at start: rate() does not see the first increase of a new series.
for _reason in get_args(DegradedReason):
    DEGRADED.labels(_reason)
for _reason in ("key", "key_tries", "key_in_flight", "key_rate", "in_flight", "event_loop", "queue"):
    REJECTED.labels(_reason)
for _reason in (
    "address",
    "evicted",
    "full",
    "header_size",
    "header_timeout",
    "headers",
    "idle",
    "not_http",
    "write_timeout",
):
    CONNECTIONS_CLOSED.labels(_reason)
for _kind in ("log", "capture", "server"):
    for _result in ("written", "dropped"):
        LINES.labels(_kind, _result)
for _outcome in get_args(LoadOutcome):
    MODEL_RELOADS.labels(_outcome)
for _result in get_args(CacheResult):
    HISTORY_CACHE.labels(_result)
EMBEDDINGS_BY_RESULT = {
    result: EMBEDDINGS.labels(result)
    for result in ("hit_local", "hit_redis", "miss", "miss_local", "stale", "mismatched", "corrupt", "error")
}
EVENTS_BY_RESULT = {
    result: EVENTS.labels(result) for result in ("accepted", "duplicate", "dropped", "refused", "failed")
}
for _result in ("written", "dropped"):
    EVENTS_TAPPED.labels(_result)
HISTORY_READS_BY_RESULT = {result: HISTORY_READS.labels(result) for result in ("hit", "miss", "corrupt", "error")}
DURATIONS = {size: DURATION_BY_SIZE.labels(size) for _, size in (*SIZES, (0, LARGER))}


def show_versions(ranker: str) -> None:
    """Create the series of a ranker whose versions may change."""
    CANARY_SHARE.labels(ranker).set(0)
    for reason in get_args(StopReason):
        CANARY_STOPS.labels(ranker, reason)
    for result in get_args(ShadowResult):
        SHADOW_REQUESTS.labels(ranker, result)


def show_endpoint(endpoint: str) -> None:
    """Create the series of a route that an alert reads."""
    for code in FAILURES:
        FAILED.labels(endpoint, code)


def show_key(name: str) -> None:
    """Create the series of a key that has a name."""
    if name:
        for result in ("admitted", "in_flight", "rate"):
            KEY_REQUESTS.labels(name, result)


@cache
def series(metric: M, *labels: str) -> M:
    """Return `metric.labels(*labels)`, cached because `labels` takes longer than counting.

    The cache is bounded because every label has a closed list of values.
    """
    return metric.labels(*labels)


def size_bucket(tokens: int) -> str:
    """Return the value of the label `size` for a number of events plus candidates."""
    return next((size for most, size in SIZES if tokens <= most), LARGER)
