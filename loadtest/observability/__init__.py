"""Dashboards and alerts against a real Prometheus and injected faults, and the CPU time of the metrics."""
