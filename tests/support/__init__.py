"""Helpers that tests and load tests share. They import slatewise at most, never `loadtest` or a test module."""
