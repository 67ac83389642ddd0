"""The serving graphs equal the torch model, for random sizes and shapes of rankers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import CONTEXT_SIZE, FIRST_ITEM, GAP_BUCKETS, GAP_FIRST, Candidates, History
from slatewise.inference.engine import Engine
from slatewise_train.evaluation.parity import torch_logits
from slatewise_train.rankers.base import EXITS, Calibration
from slatewise_train.rankers.ligr import Ligr, LigrConfig
from slatewise_train.rankers.ligr_onnx import LigrGraphs
from tests.conftest import Tiny

torch.set_num_threads(1)

ITEMS = 1009
ACTIONS = 5
WIDTH = 8
META = 3
LONGEST = 130
FORMS = {  # of attention and of the candidates' blocks, by name
    "one": {"attention_heads": 1},
    "two": {"attention_heads": 2},
    "grouped": {
        "attention_heads": 2,
        "key_heads": 1,
        "key_size": 2,
    },  # query heads share keys and values, and are half as wide
    "shallow": {"attention_heads": 2, "decoder_blocks": 1},  # candidates pass the last block alone
}
SHAPES = [(form, set_blocks, numeric) for form in FORMS for set_blocks in (0, 1, 2) for numeric in (0, 2)]
HEAD_WEIGHTS = (1.0, -0.4)
Shape = tuple[str, int, int]
Built = dict[Shape, tuple[Ligr, dict[str, onnx.ModelProto], Engine]]


def graphs_of(model: Ligr) -> LigrGraphs:
    return LigrGraphs(model, {exit: [Calibration.identity()] * 2 for exit in EXITS}, LONGEST)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Rankers of every shape with random weights, as torch models, graphs and engines."""
    result = {}
    for form, set_blocks, numeric in SHAPES:
        torch.manual_seed(set_blocks + numeric)
        config = LigrConfig(
            ITEMS,
            ACTIONS,
            {"genre": 4},
            numeric,
            2,
            WIDTH,
            blocks=2,
            set_blocks=set_blocks,
            meta_size=META,
            **FORMS[form],
        )
        values = torch.randint(0, 4, (ITEMS, 2))
        model = Ligr(config, {"genre": values}, torch.full((numeric,), 2.0), torch.full((numeric,), 1.5)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # no weight may keep its initial zero
                parameter += 0.2 * torch.randn_like(parameter)
        exits = list(EXITS) if set_blocks else list(EXITS[:2])
        graphs = graphs_of(model).all()
        folder = tmp_path_factory.mktemp("graphs")
        for name, graph in graphs.items():
            onnx.save(graph, folder / f"{name}.onnx")
        result[form, set_blocks, numeric] = (
            model,
            graphs,
            Engine(folder, model.item_table().detach().numpy(), exits),
        )
    return result


@pytest.fixture(scope="module")
def ranks(built: Built) -> dict[Shape, tuple[onnx.ModelProto, ort.InferenceSession]]:
    """Each ranker as the single graph `rank`."""
    graphs = {shape: graphs_of(model).rank(engine.items, HEAD_WEIGHTS) for shape, (model, _, engine) in built.items()}
    return {
        shape: (graph, ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]))
        for shape, graph in graphs.items()
    }


def draw(engine: Engine, events: int, n: int, numeric: int, seed: int) -> tuple[History, Candidates, np.ndarray]:
    rng = np.random.default_rng(seed)
    gaps = rng.integers(0, GAP_BUCKETS, events)
    gaps[:1] = GAP_FIRST
    history = History(rng.integers(0, len(engine.items), events), rng.integers(0, 4, events), gaps)
    columns = rng.normal(2, 3, (n, numeric)).astype(np.float32)
    columns[rng.random(columns.shape) < 0.3] = np.nan
    vectors = engine.items[rng.integers(FIRST_ITEM, len(engine.items), n)]
    return history, Candidates(vectors, columns, rng.uniform(-1, 1, (1, CONTEXT_SIZE)).astype(np.float32)), rng


def check(model: Ligr, engine: Engine, events: int, n: int, numeric: int, seed: int) -> None:
    history, candidates, rng = draw(engine, events, n, numeric, seed)
    meta = rng.normal(0, 1, model.config.meta_size).astype(np.float32)
    logits = torch_logits(model, engine.items, history, candidates, meta)
    for exit in set(engine.sessions) - {"encode"}:
        found = engine.score(history, candidates, meta, exit)
        assert found.shape == (n, 2) and found.dtype == np.float64
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits[exit].astype(np.float64))), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("events", "n"), [(0, 1), (1, 1), (LONGEST, 600)])
def test_graphs_equal_torch_at_smallest_and_largest_sizes(built: Built, shape: Shape, events: int, n: int) -> None:
    model, _, engine = built[shape]
    check(model, engine, events, n, shape[2], 0)


@given(shape=st.sampled_from(SHAPES), events=st.integers(0, LONGEST), n=st.integers(1, 600), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_graphs_equal_torch_at_random_sizes(built: Built, shape: Shape, events: int, n: int, seed: int) -> None:
    model, _, engine = built[shape]
    check(model, engine, events, n, shape[2], seed)


@given(events=st.integers(0, 128), n=st.integers(1, 600), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_trained_bundle_ranks_like_torch_at_every_exit(
    tiny: Tiny, ranker: Ranker, events: int, n: int, seed: int
) -> None:
    model = tiny.trainer.model
    engine = ranker.engines["fp32"]
    history, candidates, rng = draw(engine, events, n, 2, seed)
    meta = rng.normal(0, 1, model.config.meta_size).astype(np.float32)
    logits = torch_logits(model, engine.items, history, candidates, meta)
    for exit in EXITS:
        order = np.argsort(logits[exit], axis=0, kind="stable")
        found = np.take_along_axis(engine.score(history, candidates, meta, exit), order, axis=0)
        assert (np.diff(found, axis=0) >= -1e-5).all(), "probabilities are calibrated, so the order alone is comparable"


@given(shape=st.sampled_from(SHAPES), past=st.integers(0, 60), new=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_encode_appends_new_events_to_an_unchanged_past(built: Built, shape: Shape, past: int, new: int) -> None:
    model, _, engine = built[shape]
    history, _, _ = draw(engine, past, 1, 0, past)
    more, _, _ = draw(engine, new, 1, 0, new)
    state = engine.extend(engine.start, history) if past else engine.start
    feeds = {
        "items": engine.items[more.items][None],
        "actions": more.actions[None],
        "gaps": more.gaps[None],
        "length": np.array([new]),
    }
    for i in range(engine.blocks):
        feeds[f"past_key_{i}"] = state.keys[i]
        feeds[f"past_value_{i}"] = state.values[i]
    out = engine.run("encode", feeds)
    assert set(out) == {"user", *(f"{name}_{i}" for name in ("key", "value") for i in range(2))}
    fresh = engine.extend(
        engine.start,
        History(*(np.concatenate(columns) for columns in zip(columns_of(history), columns_of(more), strict=True))),
    )
    assert out["user"].shape == (1, WIDTH)
    np.testing.assert_allclose(out["user"], fresh.user, rtol=0, atol=1e-5)
    for i in range(2):
        widths = {"key": model.config.key_width, "value": model.config.value_width}
        for name, old, whole in (("key", state.keys[i], fresh.keys[i]), ("value", state.values[i], fresh.values[i])):
            assert out[f"{name}_{i}"].shape == (1, 1 + past + new, widths[name])
            np.testing.assert_array_equal(out[f"{name}_{i}"][:, : 1 + past], old)
            np.testing.assert_allclose(out[f"{name}_{i}"], whole, rtol=0, atol=1e-5)


def columns_of(history: History) -> tuple[np.ndarray, ...]:
    return history.items, history.actions, history.gaps


def rank_feeds(
    engine: Engine, events: int, n: int, numeric: int, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs of `rank` for a request, and the engine's probabilities at the highest exit."""
    history, candidates, rng = draw(engine, events, n, numeric, seed)
    rows = rng.integers(0, len(engine.items), n)
    meta = rng.normal(0, 1, META).astype(np.float32)
    expected = engine.score(
        history, Candidates(engine.items[rows], candidates.numeric, candidates.context), meta, list(engine.sessions)[-1]
    )
    feeds = {
        "history": history.items[None],
        "actions": history.actions[None],
        "gaps": history.gaps[None],
        "candidates": rows[None],
    }
    feeds |= {"meta": meta[None], "context": candidates.context} | (
        {"numeric": candidates.numeric[None]} if numeric else {}
    )
    return feeds, expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("events", "n"), [(0, 1), (0, 30), (1, 1), (LONGEST, 600)])
def test_rank_equals_engine_at_smallest_and_largest_sizes(
    built: Built, ranks: dict[Shape, Any], shape: Shape, events: int, n: int
) -> None:
    check_rank(built, ranks, shape, events, n, 1, 0)


@given(
    shape=st.sampled_from(SHAPES),
    events=st.integers(0, LONGEST),
    n=st.integers(1, 300),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_rank_equals_engine_at_random_sizes_and_batches(
    built: Built, ranks: dict[Shape, Any], shape: Shape, events: int, n: int, batch: int, seed: int
) -> None:
    check_rank(built, ranks, shape, events, n, batch, seed)


def check_rank(built: Built, ranks: dict[Shape, Any], shape: Shape, events: int, n: int, batch: int, seed: int) -> None:
    """A batch of requests of one size."""
    drawn = [rank_feeds(built[shape][2], events, n, shape[2], seed + 1_000 * row) for row in range(batch)]
    feeds = {name: np.concatenate([each[name] for each, _ in drawn]) for name in drawn[0][0]}
    probabilities, scores = ranks[shape][1].run(["probabilities", "scores"], feeds)
    assert probabilities.shape == (batch, n, 2) and scores.shape == (batch, n) and scores.dtype == np.float64
    for row, (_, expected) in enumerate(drawn):
        np.testing.assert_allclose(probabilities[row], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            scores[row], expected @ np.array(HEAD_WEIGHTS), rtol=0, atol=1e-5 * sum(map(abs, HEAD_WEIGHTS))
        )


def test_rank_declares_inputs_outputs_and_one_item_table(built: Built, ranks: dict[Shape, Any]) -> None:
    for shape, (graph, _) in ranks.items():
        names = [v.name for v in graph.graph.input], [v.name for v in graph.graph.output]
        assert set(names[0]) == {"history", "actions", "gaps", "candidates", "meta", "context"} | (
            {"numeric"} if shape[2] else set()
        )
        assert names[1] == ["probabilities", "scores"]
        tables = [weight for weight in graph.graph.initializer if ITEMS in weight.dims]
        assert [weight.name for weight in tables] == ["items"], "one table for events and candidates"
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tables[0]), built[shape][2].items)


# Nodes of the graphs


def every_graph(built: Built, ranks: dict[Shape, Any], shape: Shape) -> dict[str, onnx.ModelProto]:
    return built[shape][1] | {"rank": ranks[shape][0]}


def dense_layers(model: Ligr) -> set[str]:
    """Names of the dense layers in the state dict; late fusion counts as two, for request and candidates."""
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return names - {"fusion"} | {"fusion.request"} | ({"fusion.numeric"} if model.config.numeric else set())


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_layer_is_one_gemm_with_its_bias(built: Built, ranks: dict[Shape, Any], shape: Shape) -> None:
    """One node in each graph. In `rank`, events and candidates share the weights of a block and have a node each."""
    model = built[shape][0]
    layers = dense_layers(model)
    own = {name for name in layers if name.startswith("blocks.")}
    first = model.config.first_decoder_block
    read = {name for name in own if int(name.split(".")[1]) >= first and not name.endswith((".key", ".value"))}
    of_set = {name for name in layers if name.startswith("set_")} if shape[1] else set()
    of_point = {name for name in layers if name.startswith(("point_", "fusion."))}
    expected = {
        "encode": Counter(own),
        "dot": Counter(),
        "point": Counter(read | of_point),
        "set": Counter(of_set),
        "rank": Counter(own) + Counter(read) + Counter(of_point | of_set),
    }
    assert own | of_set | of_point == layers - ({"set_out"} if not shape[1] else set()), "no layer is left out"
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    columns = 2 * shape[2]
    for name, graph in every_graph(built, ranks, shape).items():
        weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.graph.initializer}
        assert len(weights) == len(graph.graph.initializer)
        gemms = [node for node in graph.graph.node if node.op_type == "Gemm"]
        assert Counter(node.input[1].removesuffix(".weight") for node in gemms) == expected[name], name
        assert all(
            node.input[2] == node.input[1].removesuffix(".weight") + ".bias" and not node.attribute for node in gemms
        )
        assert not [
            i for node in graph.graph.node if node.op_type == "MatMul" for i in node.input if i.endswith(".weight")
        ], "no dense layer is a MatMul"
        for layer in expected[name]:
            if layer.startswith("fusion."):
                part = slice(columns, None) if layer == "fusion.request" else slice(columns)
                weight = state["fusion.weight"][:, part]
                bias = state["fusion.bias"] * (layer == "fusion.request")
            else:
                weight = state[f"{layer}.weight"]
                bias = state[f"{layer}.bias"]
            np.testing.assert_array_equal(weights[f"{layer}.weight"], weight.T)
            np.testing.assert_array_equal(weights[f"{layer}.bias"], bias)


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_have_no_transpose_identity_or_unused_node(built: Built, ranks: dict[Shape, Any], shape: Shape) -> None:
    for name, graph in every_graph(built, ranks, shape).items():
        operators = {node.op_type for node in graph.graph.node}
        assert not operators & {"Transpose", "Identity"}, name
        produced = {output for node in graph.graph.node for output in node.output}
        assert {v.name for v in graph.graph.output} <= produced, "every output is the result of a node"
        used = {i for node in graph.graph.node for i in node.input} | {v.name for v in graph.graph.output}
        assert {weight.name for weight in graph.graph.initializer} <= used, "every weight is read"
        assert produced <= used, "every result is read"


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_one_operator_without_mask(built: Built, ranks: dict[Shape, Any], shape: Shape) -> None:
    read = 2 - built[shape][0].config.first_decoder_block
    blocks = {"encode": 2, "dot": 0, "point": read, "set": shape[1], "rank": 2 + read + shape[1]}
    for name, graph in every_graph(built, ranks, shape).items():
        operators = [node.op_type for node in graph.graph.node]
        assert operators.count("Attention") == blocks[name]
        for node in graph.graph.node:
            if node.op_type == "Attention":
                query, key, value, mask, past_key, past_value, length = node.input
                assert query and key and value and length
                assert not mask and not past_key and not past_value
        assert not {
            "Softmax",
            "Trilu",
            "Less",
            "LessOrEqual",
            "Greater",
            "GreaterOrEqual",
            "Equal",
            "Not",
            "ConstantOfShape",
        } & set(operators)
        missing_numbers = int(name in ("point", "rank") and shape[2] > 0)  # all that a Where is for
        assert operators.count("Where") == operators.count("IsNaN") == missing_numbers


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_do_not_contain_the_item_table(built: Built, shape: Shape) -> None:
    model, graphs, _ = built[shape]
    rows = model.item.weight.detach().numpy()
    for graph in graphs.values():
        for weight in graph.graph.initializer:
            assert ITEMS not in weight.dims
        assert graph.ByteSize() < rows.nbytes, "the table alone would be larger"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "past", "new"), [(1, 1, 9), (1, 4, 1), (3, 2, 5)])
def test_last_block_computes_only_the_newest_position(
    built: Built, shape: Shape, batch: int, past: int, new: int
) -> None:
    """Counts the rows of each dense layer: keys and values of the last block have all events, its other layers one."""
    model, graphs, engine = built[shape]
    watched = onnx.ModelProto()
    watched.CopyFrom(graphs["encode"])
    dense = {
        node.input[1].removesuffix(".weight"): node.output[0] for node in watched.graph.node if node.op_type == "Gemm"
    }
    for value in dense.values():
        watched.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {"items": rng.normal(size=(batch, new, WIDTH)).astype(np.float32), "length": np.full(batch, new)}
    feeds |= {name: np.zeros((batch, new), np.int64) for name in ("actions", "gaps")}
    for name, width in (("key", model.config.key_width), ("value", model.config.value_width)):
        feeds |= {
            f"past_{name}_{i}": rng.normal(size=(batch, past, width)).astype(np.float32) for i in range(engine.blocks)
        }
    rows = dict(zip(dense, (len(array) for array in session.run(list(dense.values()), feeds)), strict=True))
    assert len(rows) == 16
    for layer, n in rows.items():
        assert n == (
            batch if layer.startswith("blocks.1.") and not layer.endswith((".key", ".value")) else batch * new
        ), layer
