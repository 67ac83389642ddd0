"""Load tests and measurements of Slatewise. Start each as a module, in the repository's folder.

server/         throughput, latency and memory of one server, and of two behind a load balancer
engine/         the model alone: time by request size, by operator, by kind of layer
store/          meta-embeddings in Redis: updates under load, memory, look-up latency, network faults
chaos/          tests to the point of failure: faults, poison, crowds, a million requests
observability/  dashboards and alerts against a real Prometheus; the cost of the metrics
peers/          other servers with the same model
compare/        two commits: equal scores, and speed
"""

import os

# ONNX Runtime sends usage data unless this is set before its first session. Child processes inherit it, so it also
# holds for the peers' servers, which do not import slatewise first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
