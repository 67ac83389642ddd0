"""The serving graphs are the equations of the torch model, over drawn sizes and shapes of rankers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.bundle import Ranker
from app.engine import Candidates, Engine, History
from app.features import CONTEXT_SIZE, FIRST_ITEM, GAP_BUCKETS, GAP_FIRST
from models.graphs import Calibration, LigrGraphs
from models.invariance import torch_logits
from models.ligr import EXITS, Ligr, LigrConfig
from tests.conftest import Tiny

torch.set_num_threads(1)

ITEMS, ACTIONS, WIDTH, META, LONGEST = 1009, 5, 8, 3, 130
SHAPES = [(heads, set_blocks, numeric) for heads in (1, 2) for set_blocks in (0, 1, 2) for numeric in (0, 2)]
Built = dict[tuple[int, int, int], tuple[Ligr, dict[str, onnx.ModelProto], Engine]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Rankers of every shape, with random weights, as torch, graphs and engine."""
    result = {}
    for heads, set_blocks, numeric in SHAPES:
        torch.manual_seed(heads + set_blocks + numeric)
        config = LigrConfig(ITEMS, ACTIONS, {"genre": 4}, numeric, 2, WIDTH, blocks=2, attention_heads=heads, set_blocks=set_blocks, meta_size=META)
        values = torch.randint(0, 4, (ITEMS, 2))
        model = Ligr(config, {"genre": values}, torch.full((numeric,), 2.0), torch.full((numeric,), 1.5)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # the ladder starts at zero: nothing may stay there
                parameter += 0.2 * torch.randn_like(parameter)
        exits = list(EXITS) if set_blocks else list(EXITS[:2])
        graphs = LigrGraphs(model, {exit: [Calibration.identity()] * 2 for exit in exits}, LONGEST).all()
        folder = tmp_path_factory.mktemp("graphs")
        for name, graph in graphs.items():
            onnx.save(graph, folder / f"{name}.onnx")
        result[heads, set_blocks, numeric] = model, graphs, Engine(folder, model.item_table().detach().numpy(), exits, 1)
    return result


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
def test_graphs_equal_torch_at_the_smallest_and_largest_sizes(built: Built, shape: tuple[int, int, int], events: int, n: int) -> None:
    model, _, engine = built[shape]
    check(model, engine, events, n, shape[2], 0)


@given(shape=st.sampled_from(SHAPES), events=st.integers(0, LONGEST), n=st.integers(1, 600), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_graphs_equal_torch_over_drawn_sizes(built: Built, shape: tuple[int, int, int], events: int, n: int, seed: int) -> None:
    model, _, engine = built[shape]
    check(model, engine, events, n, shape[2], seed)


@given(events=st.integers(0, 128), n=st.integers(1, 600), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_the_trained_bundle_has_the_order_of_the_torch_model_at_every_exit(tiny: Tiny, ranker: Ranker, events: int, n: int, seed: int) -> None:
    model, engine = tiny.trainer.model, ranker.engines["fp32"]
    history, candidates, rng = draw(engine, events, n, 2, seed)
    meta = rng.normal(0, 1, model.config.meta_size).astype(np.float32)
    logits = torch_logits(model, engine.items, history, candidates, meta)
    for exit in EXITS:
        order = np.argsort(logits[exit], axis=0, kind="stable")
        found = np.take_along_axis(engine.score(history, candidates, meta, exit), order, axis=0)
        assert (np.diff(found, axis=0) >= -1e-5).all(), "calibrated, so only the order is comparable"


@given(shape=st.sampled_from(SHAPES), past=st.integers(0, 60), new=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_encode_gives_keys_and_values_of_the_new_events_alone(built: Built, shape: tuple[int, int, int], past: int, new: int) -> None:
    _, _, engine = built[shape]
    history, _, _ = draw(engine, past, 1, 0, past)
    more, _, _ = draw(engine, new, 1, 0, new)
    state = engine.extend(engine.start, history) if past else engine.start
    feeds = {"items": engine.items[more.items][None], "actions": more.actions[None], "gaps": more.gaps[None], "length": np.array([new])}
    for i in range(engine.blocks):
        feeds[f"past_key_{i}"], feeds[f"past_value_{i}"] = state.keys[i], state.values[i]
    out = engine.run("encode", feeds)
    assert set(out) == {"user", *(f"{name}_{i}" for name in ("key", "value") for i in range(2))}
    for name, array in out.items():
        assert array.shape == ((1, WIDTH) if name == "user" else (1, shape[0], new, WIDTH // shape[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_one_operator_and_never_sees_a_mask(built: Built, shape: tuple[int, int, int]) -> None:
    _, graphs, _ = built[shape]
    blocks = {"encode": 2, "dot": 0, "point": 2, "set": shape[1]}
    for name, graph in graphs.items():
        operators = [node.op_type for node in graph.graph.node]
        assert operators.count("Attention") == blocks[name]
        for node in graph.graph.node:
            if node.op_type == "Attention":
                assert len(node.input) < 4 or not node.input[3], "attn_mask"
        assert not {"Softmax", "Trilu", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Not", "ConstantOfShape"} & set(operators)
        missing_numbers = int(name == "point" and shape[2] > 0)  # all that a Where is for
        assert operators.count("Where") == operators.count("IsNaN") == missing_numbers


@pytest.mark.parametrize("shape", SHAPES)
def test_item_table_is_not_inside_the_graphs(built: Built, shape: tuple[int, int, int]) -> None:
    model, graphs, _ = built[shape]
    rows = model.item.weight.detach().numpy()
    for graph in graphs.values():
        for weight in graph.graph.initializer:
            assert ITEMS not in weight.dims
        assert graph.ByteSize() < rows.nbytes, "the table alone would be larger"


def test_last_block_of_the_history_works_for_the_newest_position_alone(built: Built) -> None:
    _, graphs, _ = built[2, 1, 2]
    inferred = onnx.shape_inference.infer_shapes(graphs["encode"])
    widths = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
    dense = {i: n.output[0] for n in inferred.graph.node if n.op_type == "MatMul" for i in n.input if i.endswith(".up.weight")}
    assert widths[dense["blocks.0.up.weight"]][1] == "T"
    assert widths[dense["blocks.1.up.weight"]][1] == 1
