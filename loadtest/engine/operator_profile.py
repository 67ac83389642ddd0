"""Engine time by ONNX operator, and its distance from the processor's limit: python -m loadtest.engine.operator_profile

Runs the graphs in a variant's folder on shape W (256 events after the start token, 200 candidates) with one thread and
ONNX Runtime's profiler. The limit is the measured rate of one float32 GEMM of 256 x 128 x 512, the shape with most of
the work. The operations of the matrix products are computed from the shapes in the profile.

Called by: the command line, after `make reference-bundle`. Its numbers appear in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from loadtest.markdown import table
from slatewise.process import cpu_name

EVENTS = 256
CANDIDATES = 200
REPEATS = 200
GRAPHS = ("encode", "point", "set")


def session(model: str | bytes, profile: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feeds(inputs: list[Any]) -> dict[str, np.ndarray]:
    """Random inputs of shape W for a graph, by name -> array.

    The names of its dimensions are T events after P earlier ones, K keys, L events, N candidates.
    """
    rng = np.random.default_rng(0)
    sizes = {"B": 1, "T": EVENTS, "P": 1, "K": EVENTS + 1, "L": EVENTS, "N": CANDIDATES}
    lengths = {"length": EVENTS, "history_length": EVENTS + 1, "set_length": CANDIDATES}
    result = {}
    for value in inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in value.shape]
        if value.name in lengths:
            result[value.name] = np.full(shape, lengths[value.name])
        elif value.type == "tensor(int64)":
            result[value.name] = rng.integers(2, 5, shape)
        else:
            result[value.name] = rng.normal(size=shape).astype(np.float32)
    return result


def flop(event: dict[str, Any]) -> int:
    """Floating-point or integer operations of one matrix product, from its shapes; 0 for other operators."""
    kind = event["args"]["op_name"]
    (x, *others), (y, *_) = (
        [next(iter(tensor.values())) for tensor in event["args"][f"{way}_type_shape"]] for way in ("input", "output")
    )
    if kind in ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulIntegerToFloat"):
        return 2 * prod(y) * x[-1]
    if kind == "Attention":
        # Queries (B, N, ...) and keys (B, K, ...): scores, then values. Causal attention also computes the masked half.
        return 2 * (prod(x) + prod(y)) * others[0][1]
    return 0


def gemm_rate() -> float:
    """FLOP/s of one thread."""
    rows = EVENTS
    inner = 128
    columns = 512
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(inner, columns)).astype(np.float32), "w")
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width])
        for name, width in (("x", inner), ("y", columns))
    )
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "gemm", [x], [y], [weight])
    model = session(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11).SerializeToString()
    )
    given = {"x": np.ones((rows, inner), np.float32)}
    seconds = []
    for _ in range(2_000):
        begin = time.perf_counter()
        model.run(None, given)
        seconds.append(time.perf_counter() - begin)
    return 2 * rows * inner * columns / median(seconds)


def profile(graph: Path) -> tuple[dict[str, float], dict[str, int], int, float]:
    """Medians: (microseconds by operator, calls by operator, operations, microseconds of a run without profiler)."""
    plain = session(str(graph))
    given = feeds(plain.get_inputs())
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        plain.run(None, given)
        seconds.append(time.perf_counter() - begin)
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(str(graph), Path(folder) / "profile")
        for _ in range(REPEATS):
            profiled.run(None, given)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    nodes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["name"]].append(event)
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for found in nodes.values():
        kind = found[0]["args"]["op_name"]
        times[kind] += median(event["dur"] for event in found)
        calls[kind] += 1
    return times, calls, sum(flop(found[0]) for found in nodes.values()), median(seconds) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bundles/reference/1/variants/fp32"))
    args = parser.parse_args()
    profiles = {name: profile(args.folder / f"{name}.onnx") for name in GRAPHS}
    rate = gemm_rate()
    kinds = sorted(
        {kind for times, *_ in profiles.values() for kind in times},
        key=lambda kind: -sum(p[0].get(kind, 0) for p in profiles.values()),
    )
    rows = []
    for kind in kinds:
        cells = [f"{p[0][kind]:.0f} ({p[1][kind]})" if kind in p[0] else "" for p in profiles.values()]
        rows.append((kind, *cells, f"{sum(p[0].get(kind, 0) for p in profiles.values()):.0f}"))
    totals = {
        "sum with the profiler": lambda p: sum(p[0].values()),
        "a run": lambda p: p[3],
        "matrix products at the limit": lambda p: p[2] / rate * 1e6,
    }
    for title, total in totals.items():
        values = [total(p) for p in profiles.values()]
        rows.append((f"**{title}**", *(f"{value:.0f}" for value in values), f"{sum(values):.0f}"))
    print(f"{args.folder}, {cpu_name()}, one thread, medians of {REPEATS} runs; microseconds (calls)\n")
    print(table(("operator", *GRAPHS, "all"), rows))
    work = sum(p[2] for p in profiles.values())
    share = work / rate * 1e6 / sum(p[3] for p in profiles.values())
    print(f"\n{work / 1e9:.2f} GFLOP of matrix products; limit {rate / 1e9:.0f} GFLOP/s, reached {share:.0%}")
    times = {name: p[3] for name, p in profiles.items()}
    found = {"machine": cpu_name(), "gflop": work / 1e9, "gflops": rate / 1e9, "share": share, "us": times}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
