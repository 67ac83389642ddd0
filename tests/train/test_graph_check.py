"""A variant is published only when its graphs are of the kind that its name states."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slatewise.bundle.manifest import EXPLORE_GRAPH, POSTERIOR, ManifestError, read_manifest, versions
from slatewise_train.bundle_writer import CALIBRATION, publish, write_exploration
from slatewise_train.compression.quantize import quantize
from slatewise_train.evaluation.calibration import read_calibrations
from slatewise_train.graph_check import KNOWN, check_exploration, check_graph, check_variant, read_graph
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel, uncalibrated
from slatewise_train.rankers.layers import LowRank
from tests.conftest import DEMO, Tiny

GRAPH = "point"


def layer(*shapes: tuple[int, int], operator: str = "Gemm", between: str = "") -> onnx.ModelProto:
    """A chain of dense layers, with an operator between them if one is named."""
    rng = np.random.default_rng(0)
    nodes = []
    weights = []
    x = "x"
    for k, shape in enumerate(shapes):
        nodes.append(helper.make_node(operator, [x, f"w{k}"], [f"y{k}"], name=f"n{k}"))
        weights.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), f"w{k}"))
        x = f"y{k}"
        if between and k + 1 < len(shapes):
            nodes.append(helper.make_node(between, [x], [f"z{k}"], name=f"b{k}"))
            x = f"z{k}"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", shapes[0][0]])]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", shapes[-1][1]])]
    return helper.make_model(
        helper.make_graph(nodes, "layers", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )


def as_int8(graph: onnx.ModelProto) -> onnx.ModelProto:
    return quantize(graph, {node.input[0]: (-1.0, 1.0) for node in graph.graph.node})


def node(graph: onnx.ModelProto, operator: str, inputs: list[str] | None = None, domain: str = "") -> onnx.ModelProto:
    """Append a node with an unused output."""
    graph.graph.node.append(helper.make_node(operator, inputs or ["x"], ["unread"], name="more", domain=domain))
    return graph


def with_function(graph: onnx.ModelProto) -> onnx.ModelProto:
    graph.functions.append(
        helper.make_function(
            "mine", "Gelu", ["a"], ["b"], [helper.make_node("MatMul", ["a", "a"], ["b"])], [helper.make_opsetid("", 24)]
        )
    )
    return graph


def with_external_weight(graph: onnx.ModelProto) -> onnx.ModelProto:
    graph.graph.initializer[0].data_location = TensorProto.EXTERNAL
    return graph


WIDE = ((64, 64),)
THIN = ((64, 8), (8, 64))


@pytest.mark.parametrize(
    ("name", "graph"),
    [
        ("fp32", layer(*WIDE)),
        ("student", layer(*WIDE)),
        ("int8", as_int8(layer(*WIDE))),
        ("int8", as_int8(layer((64, 64), (64, 2), between="Gelu"))),  # small layers stay float32
        ("lowrank", layer(*THIN)),
        ("lowrank-int8", as_int8(layer((64, 32), (32, 64)))),
        ("lowrank-25", layer(*THIN)),
        ("lowrank-50-int8", as_int8(layer((64, 32), (32, 64)))),
    ],
)
def test_check_accepts_graphs_that_match_the_name(tmp_path: Path, name: str, graph: onnx.ModelProto) -> None:
    onnx.save(graph, tmp_path / f"{GRAPH}.onnx")
    check_variant(name, tmp_path, [GRAPH], "items.npy")
    check_variant("tables8" if name == "fp32" else f"{name}-tables8", tmp_path, [GRAPH], "items8.npy")


@pytest.mark.parametrize(
    ("name", "graph", "reason"),
    [
        ("int8", layer(*WIDE), "multiplies by a float weight of 64x64"),
        ("int8", layer(*[(64, 4), (4, 64)]), "has no integer products"),
        (
            "int8",
            as_int8(layer((64, 64), *[(64, 7), (7, 64)] * 3, between="Gelu")),
            "of its weights are multiplied in float, limit 10%",
        ),
        (
            "int8",
            onnx.compose.merge_models(as_int8(layer(*WIDE)), onnx.compose.add_prefix(layer(*WIDE), "more."), io_map=[]),
            "float weight",
        ),
        ("int8", layer(*WIDE, operator="MatMul"), "float weight"),
        ("fp32", as_int8(layer(*WIDE)), "has integer products"),
        ("student", as_int8(layer(*WIDE)), "has integer products"),
        ("lowrank", layer(*WIDE), "has no layers of low rank"),
        ("lowrank", layer((64, 64), (64, 64), between="Gelu"), "has no layers of low rank"),
        ("lowrank", layer((64, 64), (64, 64)), "has no layers of low rank"),
        ("fp32", layer(*THIN), "has layers of low rank"),
        ("fp32", node(layer(*WIDE), "DynamicQuantizeLinear"), "its scale depends on other requests of the batch"),
        ("int8", node(as_int8(layer(*WIDE)), "DequantizeLinear"), "no ranker needs the operator DequantizeLinear"),
        ("fp32", node(layer(*WIDE), "Loop"), "no ranker needs the operator Loop"),
        (
            "int8",
            node(as_int8(layer(*WIDE)), "Attention", domain="com.microsoft"),
            "no ranker needs the operator com.microsoft.Attention",
        ),
        ("int8", node(as_int8(layer(*WIDE)), "Gelu", domain="mine"), "no ranker needs the operator mine.Gelu"),
        ("int8", with_function(as_int8(layer(*WIDE))), "functions and sparse weights are not allowed"),
        (
            "int8",
            node(as_int8(layer(*WIDE)), "MatMul", inputs=["x", "y0"]),
            "neither a weight nor the user's vector",
        ),
        ("int8", node(as_int8(layer(*WIDE)), "Gemm", inputs=["w0.codes", "x"]), "Gemm of a constant"),
        (
            "int8",
            node(as_int8(layer(*WIDE)), "Attention", inputs=["x", "w0.scale", "x"]),
            "Attention of a constant",
        ),
        (
            "int8",
            node(as_int8(layer(*WIDE)), "QuantizeLinear", inputs=["x", "y0"]),
            "could depend on other requests of the batch",
        ),
        ("fp32", with_external_weight(layer(*WIDE)), "kept in another file"),
        ("fp16", layer(*WIDE), "is no variant"),
        ("", layer(*WIDE), "is no variant"),
        ("int8-lowrank", layer(*WIDE), "is no variant"),
        ("fp32-int8", as_int8(layer(*WIDE)), "is no variant"),
        ("lowrank-student", layer(*THIN), "is no variant"),
        ("lowrank-100", layer(*THIN), "is no variant"),
        ("lowrank-05", layer(*THIN), "is no variant"),
        ("lowrank-int8-25", as_int8(layer((64, 32), (32, 64))), "is no variant"),
        ("lowrank-25-50", layer(*THIN), "is no variant"),
        ("student-25", layer(*WIDE), "is no variant"),
        ("25", layer(*WIDE), "is no variant"),
        ("lowrank-25", layer(*WIDE), "has no layers of low rank"),
    ],
)
def test_check_says_why_graphs_do_not_match_the_name(
    tmp_path: Path, name: str, graph: onnx.ModelProto, reason: str
) -> None:
    (tmp_path / f"{GRAPH}.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ManifestError, match=reason):
        check_variant(name, tmp_path, [GRAPH], "items.npy")


@pytest.mark.parametrize(
    ("name", "table"), [("fp32", "items8.npy"), ("tables8", "items.npy"), ("tables4", "items8.npy")]
)
def test_check_refuses_an_item_table_of_another_form(tmp_path: Path, name: str, table: str) -> None:
    onnx.save(layer(*WIDE), tmp_path / f"{GRAPH}.onnx")
    with pytest.raises(ManifestError, match="item table is"):
        check_variant(name, tmp_path, [GRAPH], table)


@pytest.mark.parametrize("content", [b"", b"\x00", b"not a model", b"\xff" * 40])
def test_check_refuses_a_file_that_is_not_a_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{GRAPH}.onnx").write_bytes(content)
    with pytest.raises(ManifestError, match=GRAPH):
        check_variant("int8", tmp_path, [GRAPH], "items.npy")


def test_read_broken_file_raises_only_manifest_error(tmp_path: Path) -> None:
    whole = as_int8(layer((64, 64), (64, 64), between="Gelu")).SerializeToString()
    for size in range(0, len(whole), 97):
        (tmp_path / "cut.onnx").write_bytes(whole[:size])
        try:
            read_graph(tmp_path / "cut.onnx")
        except ManifestError:
            continue
    damaged = bytearray(whole)
    for place in range(0, len(whole), 131):
        damaged[place] ^= 0xFF
        (tmp_path / "cut.onnx").write_bytes(damaged)
        try:
            read_graph(tmp_path / "cut.onnx")
        except ManifestError:
            continue


def test_read_graph_lists_operators_and_products(tmp_path: Path) -> None:
    graph = as_int8(layer((64, 64), (64, 5), between="Gelu"))
    onnx.save(graph, tmp_path / "one.onnx")
    found = read_graph(tmp_path / "one.onnx")
    assert found.operators == {node.op_type for node in graph.graph.node}
    assert [(product.dtype, product.shape) for product in found.products] == [
        (TensorProto.INT8, (64, 64)),
        (TensorProto.FLOAT, (64, 5)),
    ]
    assert [product.source for product in found.products] == ["x", "z0"]


DEMO_FOLDER = DEMO / "movielens" / str(versions(DEMO / "movielens")[-1])


def test_every_known_operator_is_used_by_a_family() -> None:
    graphs = [path for path in DEMO_FOLDER.glob("variants/*/*.onnx") if path.stem not in ("rank", "explore")]
    used = set().union(*(read_graph(path).operators for path in graphs))
    sizes = {"items": 9, "actions": 2, "fields": {}, "numeric": 1, "heads": 1, "calibration_features": True}
    other = families.build("dcn", sizes)
    of_other = families.graphs(other, uncalibrated(other.exits, 1), 130).all().values()
    assert used.union(*(check_graph(graph).operators for graph in of_other)) == KNOWN


@pytest.mark.parametrize("name", read_manifest(DEMO_FOLDER).variants)
def test_demo_variant_matches_its_name(name: str) -> None:
    manifest = read_manifest(DEMO_FOLDER)
    table = manifest.variants[name].items
    check_variant(name, DEMO_FOLDER / "variants" / name, ["encode", *manifest.exits], table)


# The graph `explore`

Change = Callable[[onnx.GraphProto], object]


def exploration(tiny: Tiny, folder: Path, model: RankerModel | None = None) -> None:
    """Write point.onnx of the tiny ranker, and the files of exploration."""
    shutil.copy(tiny.folder / "variants" / "fp32" / "point.onnx", folder)
    calibrations = read_calibrations(tiny.folder / "variants" / "fp32" / CALIBRATION)
    write_exploration(folder, model or tiny.trainer.model.eval(), calibrations, np.zeros((2, 33, 33), np.float32))


@pytest.mark.parametrize("name", ["fp32", "student", "int8", "lowrank-50-int8"])
def test_graph_of_the_draw_fits_point(tiny: Tiny, tmp_path: Path, name: str) -> None:
    check_exploration(name, tmp_path)  # no exploration
    exploration(tiny, tmp_path)
    check_exploration(name, tmp_path)


def resize(values: Any, name: str, axis: int, size: int) -> None:
    next(v for v in values if v.name == name).type.tensor_type.shape.dim[axis].dim_value = size


def rename(values: Any, name: str) -> None:
    next(v for v in values if v.name == name).name = "other"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda g: resize(g.input, "hidden", 2, 17), "does not read the outputs of point.onnx"),
        (lambda g: resize(g.input, "logits", 2, 3), "does not read the outputs of point.onnx"),
        (lambda g: resize(g.input, "drawn", 1, 3), "reads no draw of 2 heads"),
        (lambda g: resize(g.input, "drawn", 0, 1), "reads no draw of 2 heads"),
        (lambda g: resize(g.output, "moved", 2, 3), "does not have the outputs of point.onnx"),
        (lambda g: rename(g.output, "moved"), "does not have the outputs of point.onnx"),
        (lambda g: g.output.pop(), "does not have the outputs of point.onnx"),
        (lambda g: rename(g.input, "drawn"), "neither a weight nor the user's vector"),
        (lambda g: g.node.append(helper.make_node("MatMul", ["hidden", "logits"], ["u"])), "neither a weight nor"),
        (lambda g: g.node.append(helper.make_node("Loop", ["hidden"], ["u"])), "no ranker needs the operator Loop"),
    ],
)
def test_wrong_graph_of_the_draw_is_refused(tiny: Tiny, tmp_path: Path, change: Change, reason: str) -> None:
    exploration(tiny, tmp_path)
    model = onnx.load(tmp_path / EXPLORE_GRAPH)
    change(model.graph)
    onnx.save(model, tmp_path / EXPLORE_GRAPH)
    with pytest.raises(ManifestError, match=reason):
        check_exploration("fp32", tmp_path)


def test_graph_of_the_draw_is_of_the_kind_of_its_name(tiny: Tiny, tmp_path: Path) -> None:
    thin = copy.deepcopy(tiny.trainer.model).eval()
    thin.point_up = LowRank(16, 4, 32)
    exploration(tiny, tmp_path, thin)
    check_exploration("lowrank", tmp_path)
    with pytest.raises(ManifestError, match=r"explore\.onnx has layers of low rank"):
        check_exploration("fp32", tmp_path)
    exploration(tiny, tmp_path)
    onnx.save(as_int8(onnx.load(tmp_path / EXPLORE_GRAPH)), tmp_path / EXPLORE_GRAPH)
    with pytest.raises(ManifestError, match=r"explore\.onnx has integer products"):
        check_exploration("int8", tmp_path)
    (tmp_path / POSTERIOR).unlink()
    with pytest.raises(ManifestError, match=r"has explore\.onnx without explore\.npy"):
        check_exploration("int8", tmp_path)


def test_bundle_with_a_wrong_graph_is_not_published(tiny: Tiny, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(tiny.folder, stage)
    folder = stage / "variants" / "fp32"
    exploration(tiny, folder)
    model = onnx.load(folder / EXPLORE_GRAPH)
    rename(model.graph.output, "moved")
    onnx.save(model, folder / EXPLORE_GRAPH)
    with pytest.raises(ManifestError, match=r"does not have the outputs of point\.onnx"):
        publish(stage, read_manifest(tiny.folder))
