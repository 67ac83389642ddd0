"""Check, before a bundle is published, that the graphs of each variant agree with the variant's name.

The large layers of a variant named `int8` must multiply integers, and a variant named `lowrank` must have factored
layers. No graph may contain an operator whose result for one request depends on other requests. The graph `explore`
must fit `point` of the same variant. The server does not repeat this check; it compares the digests of the files and
the scores of the manifest's example.

Called by: `bundle_writer.py`; `compression/` for its names and limits. Calls: onnx.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto

from slatewise.bundle.item_tables import FLOAT32, INT8, PACKED
from slatewise.bundle.manifest import EXPLORE_GRAPH, POSTERIOR, ManifestError

TABLES = {"tables8": INT8, "tables4": PACKED}  # item tables, by the part of a name
PARTS = ("fp32", "lowrank", "student", "int8", *TABLES)  # parts of a variant's name, in the order of the name
SHARE = re.compile("[1-9][0-9]?")  # the part behind `lowrank`, in percent, of ranks nested in those of `lowrank`
CONTRIB = "com.microsoft"
PRODUCTS = {"Gemm", "MatMul", "MatMulIntegerToFloat"}
# Every operator that the graphs of a ranker need. All others are refused, control flow included.
KNOWN = {
    *PRODUCTS,
    "Add", "Attention", "Cast", "Clip", "Concat", "Cos", "Div", "Expand", "Gather", "GatherND", "Gelu", "IsNaN",
    "LayerNormalization", "Mul", "QuantizeLinear", "Range", "Relu", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid",
    "Sin", "Slice", "Softplus", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip
DRAW = "drawn"  # the input of the graph `explore` that is multiplied as weights
TURNS = {"Slice", "Transpose"}  # what is made of the draw before
INTEGER_SIDE = 16  # a weight whose sides are all at least this long is multiplied as integers in an `int8` variant
MAX_FLOAT_SHARE = 0.1  # largest share of the weights that an `int8` variant may multiply as floats


@dataclass(frozen=True)
class Product:
    """A matrix product with a constant weight."""

    dtype: int  # TensorProto.DataType of the weight
    shape: tuple[int, ...]
    source: str  # name of its input tensor, before quantization
    target: str  # name of its output tensor

    @property
    def is_integer(self) -> bool:
        return self.dtype in (TensorProto.UINT8, TensorProto.INT8)

    @property
    def is_large(self) -> bool:
        return len(self.shape) > 1 and min(self.shape[-2:]) >= INTEGER_SIDE


@dataclass(frozen=True)
class CheckedGraph:
    operators: frozenset[str]
    products: tuple[Product, ...]

    @property
    def low_rank(self) -> int:
        """Count pairs of consecutive products that pass through fewer columns than either has on its outer side."""
        shape_of = {product.target: product.shape for product in self.products if len(product.shape) == 2}
        pairs = ((shape_of[p.source], p.shape) for p in self.products if p.source in shape_of and len(p.shape) == 2)
        return sum(first[1] < min(first[0], second[1]) for first, second in pairs)


def name_parts(name: str) -> list[str]:
    """Return the parts of a variant's name.

    A name is `fp32`, or `lowrank` or `student`, `int8`, and `tables8` or `tables4`, each optional, in this order.
    `lowrank` may have a share in percent behind it, as a part of its own: `lowrank-25`. The blocks of `tables4` are
    trained for its table, so it has no `lowrank` and no `student`. Raises ManifestError for any other name.
    """
    parts = name.split("-")
    share = parts[1:2] if parts[0] == "lowrank" and SHARE.fullmatch("".join(parts[1:2])) else []
    known = [part for part in PARTS if part in parts]
    if (
        not name
        or parts != known[:1] + share + known[1:]
        or len({"lowrank", "student", "tables4"} & {*parts}) > 1
        or TABLES.keys() <= {*parts}
        or ("fp32" in parts and len(parts) > 1)
    ):
        raise ManifestError(
            f"{name!r} is no variant: a name is fp32, or lowrank (or lowrank-25, a share in percent) or student, int8, "
            "and tables8, each optional, in this order, joined by '-'; or tables4 or int8-tables4"
        )
    return parts


def table_of(parts: list[str]) -> str:
    """Return the file of the item table of a variant whose name has these parts."""
    return next((file for part, file in TABLES.items() if part in parts), FLOAT32)


def check_variant(name: str, folder: Path, graphs: list[str], table: str, own: int = 0) -> None:
    """Check the graphs in `folder`. Raises ManifestError if they are not of the kind that the name states.

    table: the file of the variant's item table; own: layers of low rank of the ranker itself, see
    `layers_of_low_rank`, which all of its variants may have.
    """
    parts = name_parts(name)
    found = {graph: read_graph(folder / f"{graph}.onnx") for graph in graphs}
    products = [product for graph in found.values() for product in graph.products]
    if "int8" in parts:
        check_large_products(name, found)
    floats = sum(prod(product.shape) for product in products if not product.is_integer)
    total = sum(prod(product.shape) for product in products)
    has_integers = floats < total
    if has_integers != ("int8" in parts):
        raise ManifestError(f"named {name}, and has {'integer products' if has_integers else 'no integer products'}")
    if "int8" in parts and floats > MAX_FLOAT_SHARE * total:
        share = f"{floats / total:.0%} of its weights are multiplied in float, limit {MAX_FLOAT_SHARE:.0%}"
        raise ManifestError(f"named {name}, and {share}")
    is_low_rank = sum(graph.low_rank for graph in found.values()) > own
    if is_low_rank != ("lowrank" in parts):
        raise ManifestError(f"named {name}, and has {'layers of low rank' if is_low_rank else 'no layers of low rank'}")
    if table != table_of(parts):
        raise ManifestError(f"named {name}, and its item table is {table}")


def layers_of_low_rank(folder: Path, graphs: list[str]) -> int:
    """Count the layers of low rank of the graphs in `folder`. Raises ManifestError as `read_graph` does."""
    return sum(read_graph(folder / f"{graph}.onnx").low_rank for graph in graphs)


def check_exploration(name: str, folder: Path) -> None:
    """Check the graph `explore` in `folder`, if there is one. Raises ManifestError if it does not fit the variant.

    It adds a draw (heads, D) to the logits of `point`, so it has the shapes of that graph. It is small and float32 in
    every variant. Its layers are of low rank in variants of low rank only, and need not be.
    """
    parts = name_parts(name)
    if not (folder / EXPLORE_GRAPH).exists():
        return
    if not (folder / POSTERIOR).exists():
        raise ManifestError(f"named {name}, and has {EXPLORE_GRAPH} without {POSTERIOR}")
    found = read_graph(folder / EXPLORE_GRAPH, DRAW)
    if any(product.is_integer for product in found.products):
        raise ManifestError(f"named {name}, and {EXPLORE_GRAPH} has integer products")
    if found.low_rank and "lowrank" not in parts:
        raise ManifestError(f"named {name}, and {EXPLORE_GRAPH} has layers of low rank")
    explore, point = (onnx.load(folder / file).graph for file in (EXPLORE_GRAPH, "point.onnx"))
    scored = described(point.output)
    inputs, outputs = described(explore.input), described(explore.output)
    heads = scored["logits"][1][-1]
    drawn = inputs.pop(DRAW, None)
    if drawn is None or drawn[0] != TensorProto.FLOAT or drawn[1][:-1] != ["B", heads]:
        raise ManifestError(f"named {name}, and {EXPLORE_GRAPH} reads no draw of {heads} heads")
    if inputs != {member: scored[member] for member in ("hidden", "logits")}:
        raise ManifestError(f"named {name}, and {EXPLORE_GRAPH} does not read the outputs of point.onnx")
    if outputs != {"moved": scored["logits"], "probabilities": scored["probabilities"]}:
        raise ManifestError(f"named {name}, and {EXPLORE_GRAPH} does not have the outputs of point.onnx")


def described(values: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[int, list[int | str]]]:
    """Return dtype and shape by name. A dimension without a fixed size is given as its symbol."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def check_large_products(name: str, graphs: dict[str, CheckedGraph]) -> None:
    """Raises ManifestError when a graph multiplies by a large float weight."""
    for graph, content in graphs.items():
        for product in content.products:
            if product.is_large and not product.is_integer:
                shape = "x".join(map(str, product.shape))
                raise ManifestError(f"named {name}, and {graph}.onnx multiplies by a float weight of {shape}")


def read_graph(path: Path, draw: str | None = None) -> CheckedGraph:
    """Read and check a graph. Raises ManifestError if it is not an ONNX model, or breaks a rule of `check_graph`."""
    try:
        return check_graph(onnx.load(path, load_external_data=False), draw)
    except (DecodeError, ValueError, IndexError) as error:
        raise ManifestError(f"{path.name}: {error or type(error).__name__}") from error


def check_graph(model: onnx.ModelProto, draw: str | None = None) -> CheckedGraph:
    """Return the operators and the products of a model. Raises ValueError with the rule that a node breaks.

    draw: an input that the graph may multiply by, as by weights. Each request of a batch has its own.
    """
    graph = model.graph
    if not graph.node:
        raise ValueError("no ONNX model with a graph")
    if model.functions or graph.sparse_initializer:
        raise ValueError("functions and sparse weights are not allowed")
    weights = {weight.name: weight for weight in graph.initializer}
    inputs = {value.name for value in graph.input}
    if any(weight.external_data or weight.data_location == TensorProto.EXTERNAL for weight in graph.initializer):
        raise ValueError("a weight is kept in another file")
    if len(weights) < len(graph.initializer) or inputs & weights.keys():
        raise ValueError("two tensors have one name")
    products = []
    quantized = dict[str, str]()  # output of QuantizeLinear -> its input
    user_columns = set[str]()  # the user's vector as a column, which the exit `dot` multiplies by
    drawn = inputs & {draw}
    known = KNOWN if draw is None else KNOWN | TURNS
    for node in graph.node:
        check_operator(node, known)
        check_constants(node, weights.keys())
        if node.op_type == "QuantizeLinear":
            quantized[node.output[0]] = node.input[0]
        elif node.op_type == "Unsqueeze" and node.input[0] in inputs:
            user_columns.add(node.output[0])
        elif node.op_type in TURNS and node.input[0] in drawn:
            drawn.add(node.output[0])
        elif node.op_type in PRODUCTS:
            weight = weights.get(node.input[1])
            if weight is not None:
                source = quantized.get(node.input[0], node.input[0])
                products.append(Product(weight.data_type, tuple(weight.dims), source, node.output[0]))
            elif node.input[1] not in user_columns | drawn:
                raise ValueError(f"the second factor of a {node.op_type} is neither a weight nor the user's vector")
    return CheckedGraph(frozenset(node.op_type for node in graph.node), tuple(products))


def check_operator(node: NodeProto, known: Set[str]) -> None:
    """Raises ValueError for an operator that rankers do not need, or that makes one request depend on another."""
    operator = node.op_type
    if "Dynamic" in operator:
        raise ValueError(f"{operator}: its scale depends on other requests of the batch")
    domains = (CONTRIB,) if operator == "MatMulIntegerToFloat" else ("", "ai.onnx")
    if operator not in known or node.domain not in domains:
        raise ValueError(f"no ranker needs the operator {node.domain}{'.' if node.domain else ''}{operator}")


def check_constants(node: NodeProto, weights: Set[str]) -> None:
    """Raises ValueError when a scale is computed, or when a product or an attention has a constant as its input."""
    operator = node.op_type
    if operator in ("QuantizeLinear", "MatMulIntegerToFloat") and any(
        name and name not in weights for name in node.input[1:]
    ):
        raise ValueError(f"{operator} with a computed scale: it could depend on other requests of the batch")
    of_constant = operator in PRODUCTS and node.input[0] in weights
    if operator == "Attention":
        of_constant = len(node.output) > 1 or bool(weights & {*node.input[:3]})
    if of_constant:
        raise ValueError(f"{operator} of a constant")
