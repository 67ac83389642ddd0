"""What the graphs of a variant compute with, and whether that is what its name says: `int8` cannot hide float32 work.

Enough of the ONNX format for that, without the package onnx: field numbers are those of onnx.proto, and protobuf, which
onnxruntime brings, reads the wire format. Before: a variant's folder. After: `bundle.py` serves it or refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from slatewise.bundle.manifest import ManifestError

MODEL_GRAPH = 7
MODEL_FUNCTIONS = 25
GRAPH_NODE = 1
GRAPH_INITIALIZER = 5
GRAPH_INPUT = 11
GRAPH_SPARSE_INITIALIZER = 15
NODE_INPUT = 1
NODE_OUTPUT = 2
NODE_OPERATOR = 4
NODE_DOMAIN = 7
TENSOR_DIMENSION = 1
TENSOR_TYPE = 2
TENSOR_NAME = 8
TENSOR_EXTERNAL = 13
TENSOR_LOCATION = 14
VALUE_NAME = 1
UINT8 = 2
INT8 = 3

PARTS = ("fp32", "lowrank", "student", "int8", "tables8")  # of a variant's name, in this order, joined by "-"
STANDARD = ("", "ai.onnx")
CONTRIB = "com.microsoft"
PRODUCTS = {"Gemm", "MatMul", "MatMulIntegerToFloat"}
KNOWN = {  # what the graphs of a ranker need; nothing else is served: no loops, no products in disguise
    *PRODUCTS, "Add", "Attention", "Cast", "Clip", "Concat", "Cos", "Div", "Expand", "Gather", "GatherND", "Gelu", "IsNaN", "LayerNormalization", "Mul",
    "QuantizeLinear", "Range", "Relu", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Sin", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip
LARGE = 16  # rows and columns of a weight from which on `int8` means integers
MOST_FLOATS = 0.1  # of all weights' numbers, that may be multiplied in float under the name `int8`


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
    def thin(self) -> bool:
        """Whether two products behind each other have less between them than on either side: low rank."""
        first = {product.target: product.shape for product in self.products if len(product.shape) == 2}
        pairs = ((first[p.source], p.shape) for p in self.products if p.source in first and len(p.shape) == 2)
        return any(one[1] < min(one[0], other[1]) for one, other in pairs)


def parts_of(name: str) -> list[str]:
    """Of a variant's name. Raises ManifestError for what is none."""
    parts = name.split("-")
    if (
        not name
        or parts != [part for part in PARTS if part in parts]
        or {"lowrank", "student"} <= {*parts}
        or ("fp32" in parts and len(parts) > 1)
    ):
        raise ManifestError(
            f"{name!r} is no variant: a name is fp32; or lowrank or student, then int8, then tables8, each or none, joined by '-'"
        )
    return parts


def check_name(name: str, folder: Path, graphs: list[str], int8_items: bool) -> None:
    """Raises ManifestError where a variant is not what its name says, with what it is."""
    parts = parts_of(name)
    products = list[Product]()
    thin = False
    for graph in graphs:
        found = read_graph(folder / f"{graph}.onnx")
        if "int8" in parts and (
            hidden := [product for product in found.products if product.large and not product.integers]
        ):
            raise ManifestError(
                f"named {name}, and {graph}.onnx multiplies by a float weight of {'x'.join(map(str, hidden[0].shape))}"
            )
        products = [*products, *found.products]
        thin = thin or found.thin
    floats = sum(prod(p.shape) for p in products if not p.integers)
    whole = sum(prod(p.shape) for p in products)
    if (floats < whole) != ("int8" in parts):
        raise ManifestError(f"named {name}, and has {'integer products' if floats < whole else 'no integer products'}")
    if "int8" in parts and floats > MOST_FLOATS * whole:
        raise ManifestError(
            f"named {name}, and {floats / whole:.0%} of its weights are multiplied in float, limit {MOST_FLOATS:.0%}"
        )
    if thin != ("lowrank" in parts):
        raise ManifestError(f"named {name}, and has {'layers of low rank' if thin else 'no layers of low rank'}")
    if int8_items != ("tables8" in parts):
        raise ManifestError(f"named {name}, and its item table is {'int8' if int8_items else 'float32'}")


def read_graph(path: Path) -> Graph:
    """Raises ManifestError where it is no ONNX model, or has what no ranker needs."""
    try:
        return graph_of(path.read_bytes())
    except (DecodeError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise ManifestError(f"{path.name}: {error or type(error).__name__}") from error


def graph_of(model: bytes) -> Graph:
    """Raises ValueError, or what reading something else than a model raises."""
    whole = list(fields(model))
    content = [part for number, value in whole if number == MODEL_GRAPH for part in fields(value)]
    if not content:
        raise ValueError("no ONNX model with a graph")
    if any(number == MODEL_FUNCTIONS for number, _ in whole) or any(
        number == GRAPH_SPARSE_INITIALIZER for number, _ in content
    ):
        raise ValueError("functions and sparse weights are for no ranker")
    tensors = [weight_of(value) for number, value in content if number == GRAPH_INITIALIZER]
    weights = dict(tensors)
    given = {texts(list(fields(value)), VALUE_NAME)[0] for number, value in content if number == GRAPH_INPUT}
    if len(weights) < len(tensors) or given & weights.keys():
        raise ValueError("two tensors have one name")
    operators = set[str]()
    products = list[Product]()
    quantized = dict[str, str]()
    columns = set[str]()
    for number, value in content:
        if number != GRAPH_NODE:
            continue
        node = list(fields(value))
        (operator,) = texts(node, NODE_OPERATOR)
        domain = "".join(texts(node, NODE_DOMAIN))
        inputs = texts(node, NODE_INPUT)
        outputs = texts(node, NODE_OUTPUT)
        operators.add(operator)
        if "Dynamic" in operator:
            raise ValueError(f"{operator}: its scale depends on who else is in the request")
        if operator not in KNOWN or (
            domain != CONTRIB if operator == "MatMulIntegerToFloat" else domain not in STANDARD
        ):
            raise ValueError(f"no ranker needs the operator {domain}{'.' if domain else ''}{operator}")
        if operator in ("QuantizeLinear", "MatMulIntegerToFloat") and any(
            name and name not in weights for name in inputs[1:]
        ):
            raise ValueError(
                f"{operator} with a scale that is worked out: it could depend on who else is in the request"
            )
        if operator in (*PRODUCTS, "Attention") and (
            inputs[0] in weights or (operator == "Attention" and (len(outputs) > 1 or weights.keys() & {*inputs[:3]}))
        ):
            raise ValueError(f"{operator} of a constant")
        if operator == "QuantizeLinear":
            quantized[outputs[0]] = inputs[0]
        elif operator == "Unsqueeze" and inputs[0] in given:
            columns.add(outputs[0])  # the exit `dot` multiplies by the user's vector
        elif operator in PRODUCTS and inputs[1] in weights:
            products.append(Product(*weights[inputs[1]], quantized.get(inputs[0], inputs[0]), outputs[0]))
        elif operator in PRODUCTS and inputs[1] not in columns:
            raise ValueError(f"{operator} by what is neither a weight nor the user's vector")
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
    if any(number in (TENSOR_EXTERNAL, TENSOR_LOCATION) for number, _ in content):
        raise ValueError("a weight is kept in another file")
    shape = tuple(value for number, value in content if number == TENSOR_DIMENSION)
    (kind,) = (value for number, value in content if number == TENSOR_TYPE)
    if not all(isinstance(value, int) for value in (kind, *shape)):
        raise ValueError("the shape of a weight is packed")
    (name,) = texts(content, TENSOR_NAME)
    return name, (kind, shape)
