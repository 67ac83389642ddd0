"""Training, export and compression of rankers: the half that runs offline."""

import slatewise  # noqa: F401  # turns the telemetry of ONNX Runtime off before a module here imports it
