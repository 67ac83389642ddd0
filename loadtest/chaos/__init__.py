"""Faults under load: each module is one test with `main()`, which prints Markdown and returns the exit code."""
