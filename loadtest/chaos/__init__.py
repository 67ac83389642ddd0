"""Tests to the point of failure, each a module with `main`: `make chaos` runs all of them and writes docs/chaos.md.

A module prints Markdown. A row `| R22 | criterion | number | pass |` in it goes to the table of the report, and its
exit code is 0 if all its rows pass. The numbers R1 to R32 are those of the table in docs/chaos.md.
"""
