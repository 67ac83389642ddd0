"""Two commits of Slatewise side by side: equal answers, latency and CPU time."""
