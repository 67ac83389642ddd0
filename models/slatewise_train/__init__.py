"""Train, export and compress rankers. This package is the offline half; `slatewise` is the server."""

import slatewise  # noqa: F401  # turns the telemetry of ONNX Runtime off before a module here imports it
