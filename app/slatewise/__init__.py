"""Slatewise, a ranking service: the serving package."""

import os

VERSION = "0.1.0"  # read by pyproject.toml

# ONNX Runtime reads this on import. Without it, it looks up a collector's host and writes a device id below HOME.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
