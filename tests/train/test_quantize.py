"""int8 layers: exact results, and rows that do not depend on each other, as they would with a dynamic scale."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from loadtest.engine.dense_layers import FORMS, open_form
from slatewise.bundle.ranker import Ranker
from slatewise.inference.engine import Engine
from slatewise_train.compression.quantize import (
    FULL_BITS,
    SAFE_BITS,
    RecordingEngine,
    dense_nodes,
    input_scale,
    observe,
    quantize,
    quantize_weight,
)
from slatewise_train.evaluation import parity
from slatewise_train.graph_check import CONTRIB, INTEGER_SIDE
from tests.conftest import Tiny

RANGES = {"x": (-3.0, 5.0)}


def layer(inner: int, out: int, seed: int = 0, layers: int = 1) -> onnx.ModelProto:
    """Parallel dense layers that share the input x (N, in); each has its own output."""
    rng = np.random.default_rng(seed)
    nodes = []
    weights = []
    outputs = []
    for k in range(layers):
        nodes.append(helper.make_node("Gemm", ["x", f"w{k}", f"b{k}"], [f"y{k}"], name=f"gemm{k}"))
        weights += [(f"w{k}", rng.normal(size=(inner, out))), (f"b{k}", rng.normal(size=out))]
        outputs.append(helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, ["N", out]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", inner])]
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights]
    return helper.make_model(
        helper.make_graph(nodes, "layers", inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )


def run(graph: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


def slow(graph: onnx.ModelProto, x: np.ndarray, bits: int) -> np.ndarray:
    """The first layer in exact integers."""
    weight, bias = (numpy_helper.to_array(graph.graph.initializer[k]) for k in range(2))
    weights, scales = (value.astype(np.float64) for value in quantize_weight(weight, bits))
    scale, zero = input_scale(*RANGES["x"])
    codes = np.clip(np.rint(x / scale).astype(np.float64) + int(zero), 0, 255) - int(zero)
    return codes @ weights * float(scale) * scales + bias


@given(rows=st.integers(0, 40), inner=st.integers(32, 80), out=st.integers(32, 80), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_quantized_layer_equals_exact_integers(rows: int, inner: int, out: int, seed: int) -> None:
    """With 7 bits no product overflows on any processor, also for inputs beyond the measured range."""
    graph = layer(inner, out, seed)
    x = np.random.default_rng(seed).normal(0, 4, (rows, inner)).astype(np.float32)
    np.testing.assert_allclose(run(quantize(graph, RANGES), x), slow(graph, x, SAFE_BITS), atol=2e-3)


@pytest.mark.parametrize(
    "x", [np.full((3, 64), 5, np.float32), np.full((3, 64), -3, np.float32), np.tile(np.float32([5, -3]), (3, 32))]
)
def test_seven_bits_do_not_overflow_at_largest_products(x: np.ndarray) -> None:
    graph = layer(64, 32)
    weight = np.where(np.arange(64)[:, None] % 2 == np.arange(32) % 2, 1, -1).astype(np.float32)
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w0"))
    np.testing.assert_allclose(run(quantize(graph, RANGES), x), slow(graph, x, SAFE_BITS), rtol=1e-5, atol=2e-3)


@given(least=st.floats(-100, 0), largest=st.floats(0, 100), at=st.floats(0, 1))
def test_input_scale_error_is_at_most_half_a_step(least: float, largest: float, at: float) -> None:
    scale, zero = input_scale(least, largest)
    value = least + at * (largest - least)
    code = np.clip(np.rint(value / float(scale)) + int(zero), 0, 255)
    assert abs((code - int(zero)) * float(scale) - value) <= 1.01 * float(scale)
    assert (int(zero) - int(zero)) * float(scale) == 0.0, "0 is exact"


@pytest.mark.parametrize("bits", [SAFE_BITS, FULL_BITS])
def test_quantize_weight_error_is_at_most_half_a_step(bits: int) -> None:
    weight = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * np.logspace(
        -3, 3, 40, dtype=np.float32
    )
    weight[:, 7] = 0
    codes, scale = quantize_weight(weight, bits)
    assert codes.dtype == np.int8 and np.abs(codes).max() == 2 ** (bits - 1) - 1
    assert (np.abs(codes * scale - weight) <= 0.5001 * scale).all() and not codes[:, 7].any()


def test_layers_with_one_input_share_its_codes() -> None:
    graph = quantize(layer(48, 32, layers=3), RANGES)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("QuantizeLinear") == 1 and kinds.count("MatMulIntegerToFloat") == 3
    assert {w.data_type for w in graph.graph.initializer if w.name.startswith("w") and w.name.endswith("codes")} == {
        TensorProto.INT8
    }
    small = layer(48, INTEGER_SIDE - 1)
    assert not dense_nodes(small) and quantize(small, {}).graph == small.graph


def test_observe_returns_the_range_over_all_requests() -> None:
    values = [np.float32([[1, -2] + [0.5] * 46]), np.float32([[7] + [1] * 47])]
    assert observe(layer(48, 32), ({"x": x} for x in values)) == {"x": (-2.0, 7.0)}
    assert observe(layer(48, 32), [{"x": values[1]}]) == {"x": (0.0, 7.0)}, "0 is always in the range"


def dynamic(graph: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's dynamic quantization, with one scale for the whole tensor."""
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    weights = {w.name: numpy_helper.to_array(w) for w in graph.graph.initializer}
    for node in dense_nodes(result):
        x, weight, *bias = node.input
        codes, scale = quantize_weight(weights[weight])
        for name, value in ((f"{weight}.codes", codes), (f"{weight}.scale", scale)):
            if name not in {w.name for w in result.graph.initializer}:
                result.graph.initializer.append(numpy_helper.from_array(value, name))
        changed = helper.make_node(
            "DynamicQuantizeMatMul",
            [x, f"{weight}.codes", f"{weight}.scale", "", *bias],
            list(node.output),
            name=node.name,
            domain=CONTRIB,
        )
        node.CopyFrom(changed)
    result.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return result


def calibrated(ranker: Ranker, source: Path, folder: Path, make: Any) -> Engine:
    """The tiny ranker's engine with every graph rewritten by `make`, given the ranges of its inputs."""
    engine = ranker.engines["fp32"]
    watched = RecordingEngine(source, ranker.items, ranker.manifest.exits)
    requests = parity.Requests(watched, ranker.manifest, 0)
    for length, n in itertools.product((0, 1, 60, 128), (1, 50, 300)):
        watched.score(requests.history(length), requests.candidates(n), requests.meta(), "set")
    folder.mkdir(exist_ok=True)
    for name in engine.sessions:
        graph = onnx.load(source / f"{name}.onnx")
        onnx.save(
            make(graph, observe(graph, watched.feeds[name])) if name in watched.feeds else graph,
            folder / f"{name}.onnx",
        )
    return Engine(folder, ranker.items, ranker.manifest.exits)


@pytest.fixture(scope="module")
def engines(tiny: Tiny, ranker: Ranker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    source = tiny.folder / "variants/fp32"
    base = tmp_path_factory.mktemp("variants")
    made = {"static": quantize, "dynamic": lambda graph, _: dynamic(graph)}
    return {name: calibrated(ranker, source, base / name, make) for name, make in made.items()}


PROPERTIES = {
    "one pass": parity.one_pass,
    "chunks": parity.candidate_chunks,
    "extended": parity.extended,
    "padding": parity.padding,
    "permutation": parity.permutation,
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_static_int8_is_within_the_parity_bound_of_fp32(ranker: Ranker, engines: dict[str, Engine], name: str) -> None:
    assert PROPERTIES[name](parity.Requests(engines["static"], ranker.manifest, 1)) <= 1e-5


@pytest.mark.parametrize("name", ["one pass", "chunks", "extended", "padding"])
def test_dynamic_int8_lets_neighbours_change_a_score(ranker: Ranker, engines: dict[str, Engine], name: str) -> None:
    """The change is more than ten times the bound, so dynamic int8 is not offered as a variant."""
    assert PROPERTIES[name](parity.Requests(engines["dynamic"], ranker.manifest, 1)) > 1e-4


def test_static_int8_is_close_to_fp32(ranker: Ranker, engines: dict[str, Engine]) -> None:
    requests = parity.Requests(ranker.engines["fp32"], ranker.manifest, 3)
    for length, n in ((0, 20), (40, 200)):
        history = requests.history(length)
        candidates = requests.candidates(n)
        meta = requests.meta()
        exact, found = (
            engine.score(history, candidates, meta, "set") for engine in (ranker.engines["fp32"], engines["static"])
        )
        assert 0 < np.abs(found - exact).max() < 0.05


@pytest.mark.parametrize("name", FORMS)
def test_only_dynamic_quantization_depends_on_other_rows(name: str) -> None:
    """Every form that `loadtest.engine.dense_layers` measures is close to the dense layer."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 64**-0.5, (64, 32)).astype(np.float32)
    bias = rng.normal(size=32).astype(np.float32)
    x = rng.normal(size=(20, 64)).astype(np.float32).clip(-4, 4)
    session = open_form(FORMS[name], weight, bias)
    found, beside = (session.run(None, {"x": rows})[0] for rows in (x, np.concatenate([x[:-1], 10 * x[-1:]])))
    assert np.square(found - (x @ weight + bias)).mean() < 0.01 * np.square(found).mean()
    moved = np.abs(beside[:-1] - found[:-1]).max()
    assert moved > 0.01 if name.startswith("dynamic") else moved <= 1e-6
