"""Every Prometheus metric, its labels and buckets. Base units, no ids as labels; tests read differences."""

from __future__ import annotations

import time
from functools import cache
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram

from slatewise import VERSION

# A 50 ms service: fine below, and the objective on an edge (seconds).
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
SIZE_BUCKETS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)
SCORE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZES = (
    (100, "up to 100"),
    (500, "101 to 500"),
    (2_000, "501 to 2000"),
)  # events read and candidates: a closed list, for a label
LARGER = "over 2000"

M = TypeVar("M", Counter, Gauge, Histogram)
STAGES = ("parse", "features", "embed", "queue", "encode", "score", "serialize")

REQUESTS = Counter(
    "slatewise_requests_total",
    "Requests that ended, by status code; 499: the client went away.",
    ["endpoint", "ranker", "version", "variant", "code"],
)
DURATION = Histogram(
    "slatewise_request_duration_seconds",
    "Time from entering the application to the answer.",
    ["endpoint", "ranker", "variant"],
    buckets=BUCKETS,
)
DURATION_BY_SIZE = Histogram(
    "slatewise_ranking_duration_seconds",
    "Duration of the requests that the model ranked, by events read and candidates.",
    ["size"],
    buckets=BUCKETS,
)
STAGE = Histogram("slatewise_stage_duration_seconds", "Time of one stage of a request.", ["stage"], buckets=BUCKETS)
IN_FLIGHT = Gauge("slatewise_requests_in_flight", "Requests that have entered and not ended.")
IN_FLIGHT_LIMIT = Gauge("slatewise_requests_in_flight_limit", "Requests in flight above which new ones are refused.")
OUTSTANDING_TOKENS = Gauge(
    "slatewise_outstanding_tokens", "Events and candidates of the requests that are admitted and not answered."
)
OUTSTANDING_TOKENS_LIMIT = Gauge(
    "slatewise_outstanding_tokens_limit", "Events and candidates above which answers are the input order."
)
QUEUE_LENGTH = Gauge("slatewise_queue_length", "Quanta that wait for a thread.")
THREADS = Gauge("slatewise_threads", "Threads that run the model.")
MEMORY_LIMIT = Gauge(
    "slatewise_memory_limit_bytes", "The cgroup's memory limit, or the machine's memory where there is none."
)
DISCONNECTS = Counter("slatewise_client_disconnects_total", "Clients that went away before their answer.")
REJECTED = Counter(
    "slatewise_rejected_total", "Requests refused, by door: without a valid key, or for overload.", ["reason"]
)
DEGRADED = Counter(
    "slatewise_degraded_total", "Answers that were degraded, by reason; an answer may have several.", ["reason"]
)
DEADLINE_EXCEEDED = Counter("slatewise_deadline_exceeded_total", "Requests whose deadline passed.")
CANDIDATES = Histogram(
    "slatewise_candidates_per_request", "Candidates of a ranked request.", ["ranker"], buckets=SIZE_BUCKETS
)
HISTORY_LENGTH = Histogram("slatewise_history_length", "Events read for a ranked request.", buckets=SIZE_BUCKETS)
UNKNOWN_CANDIDATES = Counter(
    "slatewise_unknown_candidates_total", "Candidates whose id the ranker does not know.", ["ranker"]
)
EXITS = Counter("slatewise_exits_total", "Answers by exit.", ["ranker", "exit"])
BEST_SCORE = Histogram(
    "slatewise_best_score",
    "The highest score of an answer that the ranker's own head weights made.",
    ["ranker", "variant"],
    buckets=SCORE_BUCKETS,
)
HISTORY_CACHE = Counter("slatewise_history_cache_total", "Requests by what the history cache had for them.", ["result"])
HISTORY_CACHE_BYTES = Gauge("slatewise_history_cache_bytes", "Bytes of kept history state.")
HISTORY_CACHE_LIMIT = Gauge("slatewise_history_cache_limit_bytes", "Bound of the kept history state.")
HISTORY_REUSED = Counter("slatewise_history_events_reused_total", "Events whose kept state was used again.")
HISTORY_ENCODED = Counter("slatewise_history_events_encoded_total", "Events that were encoded.")
EMBEDDINGS = Counter("slatewise_embedding_lookups_total", "Meta-embedding look-ups by result.", ["result"])
EMBEDDING_AGE = Histogram(
    "slatewise_embedding_age_seconds",
    "Age of the meta-embeddings served.",
    buckets=(60, 300, 900, 3_600, 14_400, 86_400, 604_800, 2_592_000),
)
EMBEDDING_DURATION = Histogram(
    "slatewise_embedding_lookup_duration_seconds", "Time that a request's look-up took.", buckets=BUCKETS
)
EMBEDDING_CACHE_ENTRIES = Gauge("slatewise_embedding_cache_entries", "Users whose look-up is kept in process.")
GENERATION = Gauge(
    "slatewise_embedding_generation", "The newest live generation of meta-embeddings; 0: none.", ["ranker"]
)
GENERATION_AGE = Gauge(
    "slatewise_embedding_generation_age_seconds", "Age of the newest live generation of meta-embeddings.", ["ranker"]
)
CIRCUIT_STATE = Gauge(
    "slatewise_redis_circuit_state", "0: requests ask Redis; 1: Redis is being tried; 2: it is left alone."
)
REDIS_DURATION = Histogram(
    "slatewise_redis_command_duration_seconds", "Time of one Redis command.", ["command"], buckets=BUCKETS
)
REDIS_ERRORS = Counter("slatewise_redis_errors_total", "Redis commands that failed, by kind.", ["kind"])
LINES = Counter("slatewise_lines_total", "Lines for the log and the capture, written or dropped.", ["kind", "result"])
MODEL_INFO = Gauge("slatewise_model_info", "1 for each variant that is served.", ["ranker", "version", "variant"])
MODEL_LOAD = Gauge("slatewise_model_load_duration_seconds", "Time to load and warm up a ranker.", ["ranker"])
BUILD_INFO = Gauge("slatewise_build_info", "1, with the version of the service.", ["version"])

BUILD_INFO.labels(VERSION).set(1)
STAGES_BY_NAME = {stage: STAGE.labels(stage) for stage in STAGES}
for _reason in ("deadline", "overload", "exit", "variant", "store_error"):
    DEGRADED.labels(_reason)
for _reason in ("key", "in_flight", "tokens"):
    REJECTED.labels(_reason)
for _kind in ("log", "capture"):
    for _result in ("written", "dropped"):
        LINES.labels(_kind, _result)
for _result in ("hit", "extended", "miss", "none"):
    HISTORY_CACHE.labels(_result)
EMBEDDINGS_BY_RESULT = {
    result: EMBEDDINGS.labels(result)
    for result in ("hit_local", "hit_redis", "miss", "miss_local", "stale", "mismatched", "corrupt", "error")
}
DURATIONS = {size: DURATION_BY_SIZE.labels(size) for _, size in (*SIZES, (0, LARGER))}


@cache
def series(metric: M, *labels: str) -> M:
    """A metric's series: as `labels`, which takes the library longer than to count. All labels are closed lists, and so is what is kept."""
    return metric.labels(*labels)


def size_bucket(tokens: int) -> str:
    """The label `size` of a request with that many events and candidates."""
    return next((size for most, size in SIZES if tokens <= most), LARGER)


class Timings:
    """Seconds by stage, of one request. Every moment from the entry on belongs to a stage, so that the stages add up."""

    def __init__(self, entered: float) -> None:
        self.entered = self.marked = entered  # time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str, queued: float = 0.0) -> None:
        """The time since the last lap goes to a stage, but for what of it was spent waiting for a thread."""
        now = time.perf_counter()
        queued = min(queued, now - self.marked)
        if queued:
            self.add("queue", queued)
        self.add(stage, now - self.marked - queued)
        self.marked = now

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def observe(self) -> None:
        """Into the histograms, once, when the request ends."""
        for stage, seconds in self.seconds.items():
            STAGES_BY_NAME[stage].observe(seconds)
