"""ONNX forms of a dense layer, one thread: python -m loadtest.engine.dense_layers [--rows 200] [--repeats 300]

For each form and shape: median microseconds (the forms run in turn), the error against float64 relative to the output's
standard deviation, and the change of a row's result if another row of the tensor becomes ten times as large. With a
form that changes, other candidates of a request would influence a candidate's score.

Called by: the command line, tests/train/test_quantize.py. Its numbers appear in docs/compression.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from loadtest.markdown import table
from slatewise.process import cpu_name
from slatewise_train.compression.quantize import CONTRIB, FULL_BITS, SAFE_BITS, input_scale, quantize, quantize_weight

SHAPES = ((128, 128), (128, 512), (512, 128))
SPREAD = 4.0  # standard deviations covered by a constant scale
BLOCK = 32  # of MatMulNBits

Form = Callable[[np.ndarray, np.ndarray], onnx.ModelProto]  # weight (in, out), bias (out,)


def model(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], inner: int, out: int) -> onnx.ModelProto:
    shapes = {"x": inner, "y": out}
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", shapes[name]])] for name in "xy")
    weights = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(
        helper.make_graph(nodes, "layer", inputs, outputs, weights), opset_imports=opsets, ir_version=10
    )


def node(kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: int) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes)


def float32(weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    return model([node("Gemm", ["x", "w", "b"], ["y"])], {"w": weight, "b": bias}, *weight.shape)


def constant_scale(bits: int) -> Form:
    return lambda weight, bias: quantize(float32(weight, bias), {"x": (-SPREAD, SPREAD)}, bits)


def signed(weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """Constant scale, int8 times int8."""
    codes, scale = quantize_weight(weight, FULL_BITS)
    constants = {"w": codes, "w_scale": scale, "b": bias, "x_scale": np.float32(SPREAD / 127), "x_zero": np.int8(0)}
    nodes = [node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["c"])]
    nodes.append(node("MatMulIntegerToFloat", ["c", "w", "x_scale", "w_scale", "x_zero", "", "b"], ["y"], CONTRIB))
    return model(nodes, constants, *weight.shape)


def row_scale(weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """One scale for each row, from standard operators."""
    codes, scale = quantize_weight(weight, SAFE_BITS)
    constants = {
        "w": codes,
        "w_scale": scale,
        "b": bias,
        "most": np.float32(127),
        "zero": np.uint8(128),
        "middle": np.float32(128),
        "tiny": np.float32(1e-9),
    }
    constants["last"] = np.array([-1])
    nodes = [
        node("Abs", ["x"], ["a"]),
        node("ReduceMax", ["a", "last"], ["m"], keepdims=1),
        node("Add", ["m", "tiny"], ["n"]),
        node("Div", ["n", "most"], ["s"]),
        node("Div", ["x", "s"], ["d"]),
        node("Round", ["d"], ["r"]),
        node("Add", ["r", "middle"], ["u"]),
        node("Cast", ["u"], ["c"], to=TensorProto.UINT8),
        node("MatMulInteger", ["c", "w", "zero"], ["i"]),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "s"], ["g"]),
        node("Mul", ["g", "w_scale"], ["h"]),
        node("Add", ["h", "b"], ["y"]),
    ]
    return model(nodes, constants, *weight.shape)


def quantized_output(weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """QDQ with a quantized output, which ONNX Runtime fuses into one QLinearMatMul."""
    codes, scale = quantize_weight(weight, SAFE_BITS)
    x_scale, x_zero = input_scale(-SPREAD, SPREAD)
    spread = SPREAD * float(np.linalg.norm(weight, axis=0).max())
    y_scale, y_zero = input_scale(-spread, spread)
    constants = {"w": codes, "w_scale": scale, "w_zero": np.zeros(len(scale), np.int8), "b": bias}
    constants |= {
        "x_scale": np.array(x_scale),
        "x_zero": np.array(x_zero),
        "y_scale": np.array(y_scale),
        "y_zero": np.array(y_zero),
    }
    nodes = [
        node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["c"]),
        node("DequantizeLinear", ["c", "x_scale", "x_zero"], ["d"]),
        node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["v"], axis=1),
        node("MatMul", ["d", "v"], ["p"]),
        node("QuantizeLinear", ["p", "y_scale", "y_zero"], ["q"]),
        node("DequantizeLinear", ["q", "y_scale", "y_zero"], ["r"]),
        node("Add", ["r", "b"], ["y"]),
    ]
    return model(nodes, constants, *weight.shape)


def blocks(bits: int) -> Form:
    """Weights in blocks of 32, each with a scale (`MatMulNBits`); int8 products."""

    def form(weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
        inner, out = weight.shape
        most = 2 ** (bits - 1)
        cut = weight.T.reshape(out, inner // BLOCK, BLOCK)
        scale = np.abs(cut).max(axis=2, keepdims=True) / (most - 1)
        codes = (np.rint(cut / scale) + most).astype(np.uint8)
        packed = codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4
        constants = {"w": packed, "w_scale": scale[..., 0].astype(np.float32), "b": bias}
        attributes = {"K": inner, "N": out, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        return model(
            [node("MatMulNBits", ["x", "w", "w_scale", "", "", "b"], ["y"], CONTRIB, **attributes)],
            constants,
            inner,
            out,
        )

    return form


def tensor_scale(weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """ONNX Runtime's dynamic quantization: one scale for the whole tensor."""
    codes, scale = quantize_weight(weight, SAFE_BITS)
    return model(
        [node("DynamicQuantizeMatMul", ["x", "w", "w_scale", "", "b"], ["y"], CONTRIB)],
        {"w": codes, "w_scale": scale, "b": bias},
        *weight.shape,
    )


FORMS: dict[str, Form] = {
    "float32 `Gemm`": float32,
    "constant scale, uint8 x int8 of 7 bits": constant_scale(SAFE_BITS),
    "the same, 8 bits": constant_scale(FULL_BITS),
    "constant scale, int8 x int8": signed,
    "a scale for each row, standard operators": row_scale,
    "QDQ with a quantized output": quantized_output,
    "`MatMulNBits`, 8 bits": blocks(8),
    "`MatMulNBits`, 4 bits": blocks(4),
    "dynamic, one scale for the tensor": tensor_scale,
}


def open_form(form: Form, weight: np.ndarray, bias: np.ndarray) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(form(weight, bias).SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=300)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    cells = {name: list[str]() for name in FORMS}
    for inner, out in SHAPES:
        weight = rng.normal(0, inner**-0.5, (inner, out)).astype(np.float32)
        bias = rng.normal(size=out).astype(np.float32)
        x = rng.normal(size=(args.rows, inner)).astype(np.float32).clip(-SPREAD, SPREAD)
        other = np.concatenate([x[:-1], 10 * x[-1:]])
        exact = x.astype(np.float64) @ weight + bias
        sessions = {name: open_form(form, weight, bias) for name, form in FORMS.items()}
        seconds = {name: list[float]() for name in FORMS}
        for _ in range(args.repeats):
            for name, session in sessions.items():
                begin = time.perf_counter()
                session.run(None, {"x": x})
                seconds[name].append(time.perf_counter() - begin)
        for name, session in sessions.items():
            found, changed = (session.run(None, {"x": rows})[0] for rows in (x, other))
            error = np.sqrt(np.square(found - exact).mean()) / exact.std()
            moved = np.abs(changed[:-1] - found[:-1]).max() / exact.std()
            cells[name] += [f"{np.median(seconds[name]) * 1e6:.0f}", f"{error:.4f}", f"{moved:.4f}"]
    titles = [title for inner, out in SHAPES for title in (f"{inner}x{out} us", "error", "moved")]
    print(f"{args.rows} rows, one thread, {cpu_name()}\n")
    print(table(("form", *titles), ((name, *row) for name, row in cells.items())))


if __name__ == "__main__":
    main()
