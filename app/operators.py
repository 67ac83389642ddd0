"""What the graphs of a variant compute with, and whether that is what its name says: `int8` cannot hide float32 work.

Enough of the ONNX format for that, without the package onnx: field numbers are those of onnx.proto, and protobuf, which
onnxruntime brings, reads the wire format. Before: a variant's folder. After: `bundle.py` serves it or refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from app.manifest import ManifestError

MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_OUTPUT, NODE_OPERATOR = 1, 2, 4
TENSOR_DIMENSION, TENSOR_TYPE, TENSOR_NAME = 1, 2, 8
UINT8, INT8 = 2, 3

PARTS = ("fp32", "lowrank", "student", "int8", "tables8")  # of a variant's name, joined by "-"
PRODUCTS = {"Gemm", "MatMul", "MatMulIntegerToFloat"}
KNOWN = {  # what the graphs of a ranker need; nothing else is served: no loops, no products in disguise
    *PRODUCTS, "Add", "Attention", "Cast", "Clip", "Concat", "Div", "Expand", "Gather", "GatherND", "Gelu", "IsNaN", "LayerNormalization", "Mul",
    "QuantizeLinear", "Range", "Relu", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip
DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
LARGE = 32  # rows and columns of a weight from which on `int8` means integers


@dataclass(frozen=True)
class Product:
    """A matrix product with a constant weight."""

    type: int
    shape: tuple[int, ...]
    source: str  # the tensor it reads, before quantization
    target: str

    @property
    def integers(self) -> bool:
        return self.type in (UINT8, INT8)

    @property
    def large(self) -> bool:
        return len(self.shape) > 1 and min(self.shape[-2:]) >= LARGE


@dataclass(frozen=True)
class Graph:
    operators: frozenset[str]
    products: tuple[Product, ...]

    @property
    def chained(self) -> bool:
        """Whether a product reads another's result as it is: two thin layers in place of one."""
        targets = {product.target for product in self.products}
        return any(product.source in targets for product in self.products)


def check_name(name: str, folder: Path, graphs: list[str], int8_items: bool) -> None:
    """Raises ManifestError where a variant is not what its name says, with what it is."""
    parts = name.split("-")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ManifestError(f"a variant's name is made of {', '.join(PARTS)}, not of {', '.join(unknown)}")
    found = {graph: read_graph(folder / f"{graph}.onnx") for graph in graphs}
    for graph, content in found.items():
        if content.operators & DYNAMIC:
            raise ManifestError(f"{graph}.onnx quantizes dynamically: its scale depends on who else is in the request")
        if unknown := sorted(content.operators - KNOWN):
            raise ManifestError(f"{graph}.onnx has operators that no ranker needs: {', '.join(unknown)}")
        if "int8" in parts and (floats := [product for product in content.products if product.large and not product.integers]):
            raise ManifestError(f"named {name}, and {graph}.onnx multiplies by a float weight of {'x'.join(map(str, floats[0].shape))}")
    integers = any(product.integers for content in found.values() for product in content.products)
    if integers != ("int8" in parts):
        raise ManifestError(f"named {name}, and {'has' if integers else 'has no'} integer products")
    chained = any(content.chained for content in found.values())
    if chained != ("lowrank" in parts):
        raise ManifestError(f"named {name}, and {'has' if chained else 'has no'} layers of low rank")
    if int8_items != ("tables8" in parts):
        raise ManifestError(f"named {name}, and its item table is {'int8' if int8_items else 'float32'}")


def read_graph(path: Path) -> Graph:
    """Raises ManifestError where it is no ONNX model."""
    try:
        parts = [part for number, value in fields(path.read_bytes()) if number == MODEL_GRAPH for part in fields(value)]
        weights = dict(weight_of(value) for number, value in parts if number == GRAPH_INITIALIZER)
        operators, products, quantized = set(), [], dict[str, str]()
        for number, value in parts:
            if number != GRAPH_NODE:
                continue
            content = list(fields(value))
            (operator,) = texts(content, NODE_OPERATOR)
            inputs, outputs = texts(content, NODE_INPUT), texts(content, NODE_OUTPUT)
            operators.add(operator)
            if operator == "QuantizeLinear":
                quantized[outputs[0]] = inputs[0]
            if operator in PRODUCTS and inputs[1] in weights:
                products.append(Product(*weights[inputs[1]], quantized.get(inputs[0], inputs[0]), outputs[0]))
    except (DecodeError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise ManifestError(f"{path.name} is no readable ONNX model ({error or type(error).__name__})") from error
    return Graph(frozenset(operators), tuple(products))


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message, in order: bytes where it has a length, else an integer."""
    found = Empty()
    found.MergeFromString(message)
    return ((field.field_number, field.data) for field in UnknownFieldSet(found))


def texts(content: list[tuple[int, Any]], wanted: int) -> list[str]:
    return [value.decode() for number, value in content if number == wanted]


def weight_of(tensor: bytes) -> tuple[str, tuple[int, tuple[int, ...]]]:
    """Name, element type and shape of an initializer."""
    content = list(fields(tensor))
    shape = tuple(int(value) for number, value in content if number == TENSOR_DIMENSION)
    (kind,) = (int(value) for number, value in content if number == TENSOR_TYPE)
    (name,) = texts(content, TENSOR_NAME)
    return name, (kind, shape)
