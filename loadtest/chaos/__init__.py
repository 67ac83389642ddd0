"""Attacks and faults that take minutes: see docs/operating.md."""
