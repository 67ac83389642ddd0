"""The service's objectives, as in deploy/prometheus/rules.yml."""

OBJECTIVE_SECONDS = 0.05  # 99 % of the ranked requests take at most so long
FAILED_OBJECTIVE = 0.001  # share of requests that may fail
SLOW_OBJECTIVE = 0.01  # share of ranked requests that may take longer
