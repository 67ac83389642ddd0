"""The family `dcn`: its equations written out, its graphs, and a bundle of random weights in the server's code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.ranker import Ranker
from slatewise.inference.arrays import CONTEXT_SIZE, FIRST_ITEM, GAP_BUCKETS, Candidates, History
from slatewise.inference.engine import Engine
from slatewise.ranking.pipeline import Pipeline
from slatewise_train.bundle_writer import FP32_BOUND, write_graphs
from slatewise_train.compress import compress
from slatewise_train.compression.bases import Options
from slatewise_train.compression.source import Source
from slatewise_train.demo.reference import publish_uncalibrated, reference_content
from slatewise_train.evaluation import parity
from slatewise_train.evaluation.parity import torch_logits
from slatewise_train.graph_check import read_graph
from slatewise_train.rankers import families
from slatewise_train.rankers.base import uncalibrated
from slatewise_train.rankers.dcn import Cross, Dcn, DcnConfig, GatedLayer, Isotonic
from tests.ranking.support import BOUND, draw_request, rank, reference, run, worst

torch.set_num_threads(1)

ITEMS = 60
CONFIG = DcnConfig(ITEMS, 5, {"genre": 4}, 2, 2, 8, cross_rank=4, units=12, meta_size=3)
FORMS: dict[str, dict[str, Any]] = {
    "residual": {},
    "sharp": {"temperature": 0.5, "cross_layers": 1},
    "dcnv2": {"cross_attention": False, "cross_layers": 3},
    "perceptron": {"cross_layers": 0, "layers": 3},
    "plain logits": {"calibration_buckets": 0},
    "one bucket": {"calibration_buckets": 1, "numeric": 0},
    "features": {"calibration_features": True},
    "features, one bucket": {"calibration_features": True, "calibration_buckets": 1},
}


def make(noise: float = 0.1, **changes: Any) -> Dcn:
    """A ranker whose weights are random, also those that begin at zero."""
    torch.manual_seed(3)
    config = dataclasses.replace(CONFIG, **changes)
    f = config.numeric
    model = Dcn(config, {"genre": torch.randint(0, 4, (ITEMS, 2))}, torch.full((f,), 2.0), torch.full((f,), 1.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model.eval()


def engine_of(model: Dcn, folder: Path) -> Engine:
    write_graphs(folder, families.graphs(model, uncalibrated(model.exits, 2), 130).all())
    return Engine(folder, model.item_table().detach().numpy(), list(model.exits))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Dcn, Engine]]:
    models = {name: make(**form) for name, form in FORMS.items()}
    return {name: (model, engine_of(model, tmp_path_factory.mktemp("graphs"))) for name, model in models.items()}


def draw(model: Dcn, events: int, n: int, seed: int) -> tuple[History, Candidates, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = rng.normal(2, 3, (n, model.config.numeric)).astype(np.float32)
    columns[rng.random(columns.shape) < 0.3] = np.nan
    vectors = model.item_table().detach().numpy()[rng.integers(FIRST_ITEM, ITEMS, n)]
    history = History(
        rng.integers(FIRST_ITEM, ITEMS, events), rng.integers(0, 5, events), rng.integers(0, GAP_BUCKETS, events)
    )
    context = rng.uniform(-1, 1, (1, CONTEXT_SIZE)).astype(np.float32)
    return history, Candidates(vectors, columns, context), rng.normal(0, 1, 3).astype(np.float32)


# The equations


@pytest.mark.parametrize("temperature", [None, 0.5, 2.0])
def test_cross_layer_equals_its_equation(temperature: float | None) -> None:
    torch.manual_seed(0)
    layer = Cross(6, 3, temperature).double()
    first, x = torch.randn(2, 5, 6).double()
    down, up, bias = layer.low.first.weight, layer.low.second.weight, layer.low.second.bias
    for x0, row, found in zip(first, x, layer(first, x), strict=True):
        low = down @ row
        if temperature is not None:
            q, k = layer.query.weight @ row, layer.key.weight @ row
            read = torch.zeros(3).double()
            for i in range(3):
                scores = torch.stack([torch.exp(q[i] * k[j] / temperature) for j in range(3)])
                read[i] = (scores / scores.sum() * low).sum()
            low = low + read
        torch.testing.assert_close(found, x0 * (up @ low + bias) + row)


def test_gated_layer_equals_its_equation() -> None:
    torch.manual_seed(0)
    layer = GatedLayer(4, 3)
    x = torch.randn(7, 4)
    h = torch.nn.functional.gelu(layer.layer(x))
    torch.testing.assert_close(layer(x), h / (1 + torch.exp(-layer.gate(h))))


@pytest.mark.parametrize("features", [0, 3])
def test_isotonic_layer_is_the_identity_at_first(features: int) -> None:
    logits = torch.linspace(-20, 20, 999)[:, None].expand(-1, 2)
    mapped = Isotonic(2, 16, features)(logits, torch.randn(999, features))
    torch.testing.assert_close(mapped, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [0, 3])
@given(seed=st.integers(0, 99), buckets=st.integers(1, 40), spread=st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_isotonic_layer_increases_for_any_weights(features: int, seed: int, buckets: int, spread: float) -> None:
    """For a candidate's own features, the outermost slopes are softpluses, and the bias is the value at 0 in one."""
    torch.manual_seed(seed)
    layer = Isotonic(2, buckets, features).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=spread if not features else spread / 2**0.5)
    logits = torch.linspace(-30, 30, 10_001).double()[:, None].expand(-1, 2)
    own = torch.nn.functional.normalize(torch.randn(features).double(), dim=0)  # the sums have the same spread
    mapped = layer(logits, own)
    assert (mapped.diff(dim=0) > 0).all()
    slopes = mapped.diff(dim=0) / logits.diff(dim=0)
    raw = torch.cat([layer.raw, layer.bias[:, None]], dim=1)
    if layer.features is not None:
        raw = raw + (layer.features.weight @ own).view(2, buckets + 1)
    expected = torch.nn.functional.softplus(raw[:, :-1])
    torch.testing.assert_close(slopes[[0, -1]], expected[:, [0, -1]].T, rtol=1e-6, atol=1e-6)
    if buckets == 1:
        torch.testing.assert_close(mapped, raw[:, 1] + expected[:, 0] * logits)


def test_candidates_of_other_features_have_other_maps() -> None:
    torch.manual_seed(0)
    layer = Isotonic(1, 4, 3)
    torch.nn.init.normal_(layer.features.weight if layer.features is not None else layer.raw)
    mapped = layer(torch.ones(2, 1), torch.randn(2, 3))
    assert (mapped[0] - mapped[1]).abs() > 0.1


def test_calibration_features_without_a_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="calibration_features"):
        make(calibration_features=True, calibration_buckets=0)


def test_config_without_features_is_described_as_before() -> None:
    """So checkpoints that are older than the setting continue."""
    assert "calibration_features" not in repr(CONFIG)
    assert "calibration_features=True" in repr(dataclasses.replace(CONFIG, calibration_features=True))


@pytest.mark.parametrize("by_features", [False, True])
def test_new_ranker_gives_the_logits_of_dot(by_features: bool) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, fields={}, calibration_features=by_features)
    model = Dcn(config, {}, torch.zeros(2), torch.ones(2)).eval()
    history, candidates, meta = draw(model, 9, 20, 0)
    logits = torch_logits(model, model.item_table().detach().numpy(), history, candidates, meta)
    np.testing.assert_allclose(logits["point"], logits["dot"], atol=1e-5)


@pytest.mark.parametrize("form", ["residual", "features"])
def test_training_reaches_every_weight(form: str) -> None:
    model = make(**FORMS[form]).train()
    history, candidates, meta = draw(model, 9, 20, 0)
    logits = parity.logits_of(model, model.item_table().detach().numpy(), history, candidates, meta)
    torch.cat(list(logits.values())).square().sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still <= {"default_meta", "item.weight", "field.genre.weight"}, "these are inputs here"


# The interface


@given(length=st.integers(1, 20), form=st.sampled_from(list(FORMS)))
@settings(max_examples=20, deadline=None)
def test_encoder_is_causal(length: int, form: str) -> None:
    model = make(**FORMS[form])
    x = torch.randn(1, 24, 8)
    state, users = model.encode(x)
    short_state, short_users = model.encode(x[:, :length])
    torch.testing.assert_close(users[:, :length], short_users)
    for whole, short in zip(state[0], short_state[0], strict=True):
        torch.testing.assert_close(whole[:, :, :length], short)


def test_meta_shift_is_the_change_of_the_hidden_states() -> None:
    model = make()
    numeric, context, meta = torch.randn(1, 6, 2), torch.randn(1, 1, CONTEXT_SIZE), torch.randn(1, 1, 3)
    state, _ = model.encode(torch.randn(1, 9, 8))
    vectors = torch.randn(1, 6, 8)

    def hidden(vector: Tensor) -> Tensor:
        return model.hidden(vectors, state, torch.tensor([9]), None, model.fuse(numeric, vector, context))

    change = hidden(meta) - hidden(torch.zeros(1, 1, 3))
    torch.testing.assert_close(change, model.meta_shift(meta).expand(1, 6, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["residual", "features"])
def test_ranker_without_meta_gives_the_logits_of_the_default(form: str) -> None:
    model = make(**FORMS[form])
    history, candidates, _ = draw(model, 9, 20, 0)
    items = model.item_table().detach().numpy()
    with_meta = torch_logits(model, items, history, candidates, model.default_meta.detach().numpy())
    smaller = model.without_meta()
    assert smaller.meta_size == 0 and isinstance(smaller, Dcn)
    without = torch_logits(smaller, items, history, candidates, np.zeros(0, np.float32))
    np.testing.assert_allclose(without["point"], with_meta["point"], atol=1e-5)


# The graphs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("events", "n"), [(0, 1), (1, 1), (130, 600)])
def test_graphs_equal_torch_at_smallest_and_largest_sizes(
    built: dict[str, tuple[Dcn, Engine]], form: str, events: int, n: int
) -> None:
    check(*built[form], events, n, 0)


@given(form=st.sampled_from(list(FORMS)), events=st.integers(0, 130), n=st.integers(1, 600), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_graphs_equal_torch_at_random_sizes(
    built: dict[str, tuple[Dcn, Engine]], form: str, events: int, n: int, seed: int
) -> None:
    check(*built[form], events, n, seed)


def check(model: Dcn, engine: Engine, events: int, n: int, seed: int) -> None:
    history, candidates, meta = draw(model, events, n, seed)
    logits = torch_logits(model, engine.items, history, candidates, meta)
    for exit in ("dot", "point"):
        found = engine.score(history, candidates, meta, exit)
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits[exit].astype(np.float64))), rtol=0, atol=1e-5)
    assert n == 1 or found.std() > 1e-3, "the scores differ"


@pytest.mark.parametrize("form", ["residual", "dcnv2", "perceptron", "features"])
def test_graph_of_the_whole_ranker_equals_the_cascade(built: dict[str, tuple[Dcn, Engine]], form: str) -> None:
    model, engine = built[form]
    graph = families.graphs(model, uncalibrated(model.exits, 2), 130).rank(engine.items, (1.0, -0.4))
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for events, n in ((0, 3), (20, 30)):
        history, candidates, meta = draw(model, events, n, 1)
        rows = np.arange(FIRST_ITEM, FIRST_ITEM + n)
        expected = engine.score(
            history, Candidates(engine.items[rows], candidates.numeric, candidates.context), meta, "point"
        )
        columns = {"history": history.items, "actions": history.actions, "gaps": history.gaps, "candidates": rows}
        feeds = {name: column[None] for name, column in columns.items()}
        feeds |= {"meta": meta[None], "context": candidates.context, "numeric": candidates.numeric[None]}
        (found,) = session.run(["scores"], feeds)
        np.testing.assert_allclose(found[0], expected @ [1.0, -0.4], atol=2e-5)


@pytest.mark.parametrize("form", ["residual", "features"])
def test_graphs_have_known_operators_alone(built: dict[str, tuple[Dcn, Engine]], form: str, tmp_path: Path) -> None:
    model, _ = built[form]
    for name, graph in families.graphs(model, uncalibrated(model.exits, 2), 130).all().items():
        onnx.save(graph, tmp_path / f"{name}.onnx")
        read_graph(tmp_path / f"{name}.onnx")


# A bundle in the code of the server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A published bundle with random weights."""
    whole = reference_content()
    ids = whole.ids[: ITEMS - FIRST_ITEM]
    torch.manual_seed(1)
    sizes = {"items": ITEMS, "actions": whole.model.config.actions, "fields": {}, "numeric": 1, "heads": 2}
    shape = {"width": 16, "units": 24, "meta_size": 64, "calibration_features": True}
    model = families.build("dcn", sizes | shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    example = {"history": {"item_ids": ids[:3]}, "candidates": {"item_ids": ids[:5]}, "request_time": 1.7e9}
    changes = {"ids": ids, "features": ["popularity"], "example": example, "history_used": 128, "warmup": []}
    content = dataclasses.replace(whole, model=model, **changes)
    with pytest.MonkeyPatch.context() as patch:
        rows = {"machine": "none", "rows": []}
        patch.setattr("slatewise_train.bundle_writer.measure_latency", lambda engines, _: dict.fromkeys(engines, rows))
        patch.setattr(parity, "SLATES", (1, 37))
        patch.setattr("slatewise_train.compress.measure_latency", lambda engines, _: dict.fromkeys(engines, rows))
        patch.setattr("slatewise_train.compression.quantize.INTEGER_SIDE", 3)
        patch.setattr("slatewise_train.compression.source.SAMPLES", 12)
        yield publish_uncalibrated(content, tmp_path_factory.mktemp("dcn") / "reference", 1)


@pytest.fixture(scope="module")
def published(folder: Path) -> Ranker:
    return load_bundle(folder)


def test_published_measures_are_within_the_bound(published: Ranker) -> None:
    """They compare torch, one pass and many, extended histories, chunks, permutations and padding."""
    found = published.manifest.variants["fp32"].invariance
    assert len(found) == 7
    assert all(value <= FP32_BOUND for name, value in found.items() if name not in parity.OPTIONS)
    assert published.manifest.model is not None and published.manifest.model.family == "dcn"


@pytest.mark.parametrize("exit", ["dot", "point"])
def test_pipeline_extends_cached_histories_exactly(published: Ranker, exit: str) -> None:
    requests = [draw_request(published, events, n, 3, exit=exit) for events in (0, 1, 60, 60, 100) for n in (3, 700)]

    async def all_of_them(pipeline: Pipeline) -> list[float]:
        return [worst(await rank(pipeline, each), reference(published, each, exit)) for each in requests]

    assert max(run(published, all_of_them)) < BOUND


def test_compression_makes_integers_and_refuses_low_rank(folder: Path, published: Ranker, tmp_path: Path) -> None:
    source = Source(folder, None)
    options = Options(checkpoints=tmp_path / "checkpoints")
    compressed = load_bundle(compress(source, tmp_path / "bundles", ["int8"], options, ["int8"]))
    assert not compressed.refused and set(compressed.engines) == {"fp32", "int8"}
    request = draw_request(published, 60, 40, 3, exit="point")
    history, (candidates, _) = published.history(request), published.candidates(request, request.request_time or 0)
    meta = published.embedded_meta_of(None)
    scores = [engine.score(history, candidates, meta, "point")[:, 0] for engine in compressed.engines.values()]
    assert 1e-6 < np.abs(scores[0] - scores[1]).max() < 0.2
    assert np.corrcoef(scores)[0, 1] > 0.95
    with pytest.raises(ValueError, match="'dcn' have no low-rank form"):
        families.dense_layers(source.model)
    with pytest.raises(ValueError, match="'dcn' have no students"):
        families.shrink(source.model, {})
