"""Nested ranks: every share of one set of weights is an ordinary model, and one training trains them all."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slatewise.bundle.loader import load_bundle
from slatewise.inference.engine import Engine
from slatewise.settings import Settings
from slatewise_train import compress as command
from slatewise_train.bundle_writer import longest_call, write_graphs
from slatewise_train.compress import check_names, compress, read_shares, variant_names
from slatewise_train.compression import variants as making
from slatewise_train.compression.bases import Options, low_rank_kinds, make_bases
from slatewise_train.compression.distill import DistillConfig, Distiller, distill
from slatewise_train.compression.low_rank import METHODS, Layer, allocate, factor, factors_of
from slatewise_train.compression.nested import NestedLowRank, choose, cut, nest, nested_layers, shares_of
from slatewise_train.compression.source import Source
from slatewise_train.evaluation import parity
from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerModel, uncalibrated
from slatewise_train.rankers.layers import LowRank
from tests.conftest import Tiny
from tests.support.application import serve
from tests.train.small_source import small_source

SHARES = (0.8, 0.5, 0.3)
KINDS = ["lowrank", "lowrank-50", "lowrank-30"]
LEARNING = DistillConfig(epochs=2, batch_events=1024, positions=64, items=128, windows=4, warmup_steps=2)


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Iterator[Source]:
    with small_source(tiny, integer_side=2) as found:
        yield found


def ranks_for(source: Source) -> list[dict[str, int | None]]:
    """Ranks of three shares. Some layers are dense in the first one, and one layer is dense in all of them."""
    layers = families.dense_layers(source.model)
    thin = {name: min(layer.weight.shape) for name, layer in layers.items() if name != "blocks.0.up"}
    first = {name: None if name.endswith(("query", "down")) else most - 2 for name, most in thin.items()}
    rest: list[dict[str, int | None]] = [dict.fromkeys(thin, 4), dict.fromkeys(thin, 1)]
    return [first, *rest]


def logits_of(source: Source, model: RankerModel, sample: int = 0) -> dict[str, Tensor]:
    chosen = source.samples[sample]
    candidates = chosen.candidates(source.items)
    with torch.no_grad():
        return parity.logits_of(model.eval(), source.items, chosen.history, candidates, chosen.meta)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for exit, value in found.items():
        torch.testing.assert_close(value, wanted[exit], atol=bound * (1 + float(wanted[exit].abs().max())), rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_cut_model_equals_the_nested_one(source: Source, method: str) -> None:
    shares = ranks_for(source)
    nested = nest(source.model, source.statistics, method, shares)
    for parameter in nested.parameters():  # as after some training
        parameter.data += 0.02 * torch.randn_like(parameter)
    assert len(shares_of(nested)) == 3 and "blocks.0.up" not in shares_of(nested)[0]
    for share, ranks in enumerate(shares):
        choose(nested, share)
        whole = cut(nested, share)
        assert_close(logits_of(source, whole), logits_of(source, nested))
        assert not nested_layers(whole) and nested_layers(nested)
        for name, rank in ranks.items():
            layer = whole.get_submodule(name)
            if rank is None:
                assert type(layer) is nn.Linear, name
            else:
                assert isinstance(layer, LowRank) and layer.first.out_features == rank and layer.first.bias is None


@pytest.mark.parametrize("method", METHODS)
def test_untrained_share_equals_the_factorization_of_its_rank(source: Source, method: str) -> None:
    """Also its bias, which in AFM depends on the rank."""
    shares = ranks_for(source)
    nested = nest(source.model, source.statistics, method, shares)
    for share, ranks in enumerate(shares):
        found = logits_of(source, cut(nested, share))
        assert_close(found, logits_of(source, factor(source.model, source.statistics, method, ranks)), 2e-5)


def test_smaller_ranks_are_part_of_the_larger_ones(source: Source) -> None:
    nested = nest(source.model, source.statistics, "afm", ranks_for(source))
    larger, smaller = (cut(nested, share).get_submodule("blocks.0.key") for share in (0, 2))
    assert isinstance(larger, LowRank) and isinstance(smaller, LowRank)
    assert torch.equal(larger.first.weight[:1], smaller.first.weight)
    assert torch.equal(larger.second.weight[:, :1], smaller.second.weight)
    assert not torch.equal(larger.second.bias, smaller.second.bias), "the mean that the left out directions have"


def test_dense_share_is_the_product_of_both_layers(source: Source) -> None:
    layer = families.dense_layers(source.model)["blocks.0.down"]
    most = min(layer.weight.shape)
    nested = NestedLowRank(factors_of(layer, source.statistics["blocks.0.down"], "svd", most), (None, 2))
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(nested(x), layer(x), atol=1e-5, rtol=1e-5)
    nested(x).square().sum().backward()
    dense = nested.first.weight.grad
    nested.zero_grad()
    (nested.second(nested.first(x))).square().sum().backward()
    torch.testing.assert_close(dense, nested.first.weight.grad, atol=1e-3, rtol=1e-4)


layers = st.lists(
    st.tuples(
        st.integers(1, 12), st.integers(1, 12), st.lists(st.floats(1e-3, 1), min_size=12, max_size=12), st.booleans()
    ),
    min_size=1,
    max_size=6,
)


@given(drawn=layers, shares=st.lists(st.floats(0.05, 1.2), min_size=2, max_size=4), least=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_ranks_of_a_smaller_share_are_not_larger(drawn: list, shares: list[float], least: int) -> None:
    """By numbers, and by times that jump; a layer that is dense in the smaller share is dense in the larger one."""
    described = {}
    for k, (out, inner, values, jumps) in enumerate(drawn):
        errors = sorted((value / max(values) for value in values[: min(out, inner)]), reverse=True)
        costs = [float(rank * (out + inner)) for rank in range(len(errors))]
        costs = costs if not jumps else [round(cost, -1) for cost in costs]
        described[str(k)] = Layer(errors, costs, float(out * inner), least)
    whole = sum(layer.whole for layer in described.values())
    before: dict[str, int | None] | None = None
    for share in sorted(shares, reverse=True):
        try:
            found = allocate(described, share * whole)
        except ValueError:
            return
        for name, rank in found.items():
            assert rank is None or rank >= least
            if before is not None and before[name] is not None:
                assert rank is not None and rank <= before[name]
        before = found


def nested_of(source: Source) -> RankerModel:
    return nest(source.model, source.statistics, "afm", ranks_for(source))


@pytest.mark.parametrize("loss", ["teacher", "task"])
def test_one_training_trains_every_rank(source: Source, loss: str) -> None:
    """All weights that the ranks share change, and each step uses one of the shares."""
    nested = nested_of(source)
    before = copy.deepcopy(nested.state_dict())
    config = DistillConfig(**(vars(LEARNING) | {"loss": loss, "batch_events": 256}))
    distiller = Distiller(nested, source.trainer(), np.zeros((1, len(source.meta)), np.float32), config)
    used = []
    original = distiller.loss

    def recorded(windows: np.ndarray) -> Tensor:
        found = original(windows)
        used.append({layer.active for layer in nested_layers(nested).values()})
        return found

    distiller.loss = recorded  # type: ignore[method-assign]
    distiller.run_epoch()
    assert all(len(active) == 1 for active in used) and set().union(*used) == {0, 1, 2}
    changed = {name for name, value in nested.state_dict().items() if not torch.equal(value, before[name])}
    layer = "blocks.0.key"
    assert {f"{layer}.{part}" for part in ("first.weight", "first.bias", "second.weight", "second.bias")} <= changed
    assert {"blocks.0.up.weight", "blocks.0.attention_norm.weight", "point_up.weight"} <= changed
    rows = (nested.state_dict()[f"{layer}.first.weight"] != before[f"{layer}.first.weight"]).any(1)
    assert rows.all(), "the directions of the largest rank too"


def test_resumed_training_gives_the_same_ranks(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.zeros((1, len(source.meta)), np.float32)
    whole, again = nested_of(source), nested_of(source)
    losses = distill(whole, source.trainer(), vectors, LEARNING, tmp_path / "whole.pt")
    with monkeypatch.context() as patch:
        original = Distiller.run_epoch
        calls: list[int] = []

        def once(distiller: Distiller) -> float:
            if calls.append(0) or len(calls) > 1:
                raise KeyboardInterrupt
            return original(distiller)

        patch.setattr(Distiller, "run_epoch", once)
        with pytest.raises(KeyboardInterrupt):
            distill(nested_of(source), source.trainer(), vectors, LEARNING, tmp_path / "stopped.pt")
    assert distill(again, source.trainer(), vectors, LEARNING, tmp_path / "stopped.pt") == losses
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_checkpoint_belongs_to_its_ranks(source: Source) -> None:
    """The smaller ranks do not change the shapes of the weights, but they change the training."""
    first, second, third = ranks_for(source)
    other = nest(source.model, source.statistics, "afm", [first, second, dict.fromkeys(third, 2)])
    vectors = np.zeros((1, len(source.meta)), np.float32)
    same, changed = (Distiller(one, source.trainer(), vectors, LEARNING) for one in (nested_of(source), other))
    assert same.identity == Distiller(nested_of(source), source.trainer(), vectors, LEARNING).identity
    assert same.identity != changed.identity


def test_graphs_of_each_share_equal_its_model(source: Source, tmp_path: Path) -> None:
    nested = nested_of(source)
    manifest = source.manifest
    exact = uncalibrated(manifest.exits, len(manifest.heads))
    sample = source.samples[0]
    for share in range(3):
        model = cut(nested, share)
        folder = tmp_path / str(share)
        write_graphs(folder, families.graphs(model, exact, longest_call(manifest.limits.history_used)).all())
        engine = Engine(folder, source.items, manifest.exits)
        for exit, logits in logits_of(source, model).items():
            np.testing.assert_allclose(sample.score(engine, exit), torch.sigmoid(logits)[0].numpy(), atol=1e-5)


def test_each_share_starts_as_that_share_alone(source: Source, tmp_path: Path) -> None:
    several = make_bases(source, KINDS, Options(shares=SHARES, checkpoints=tmp_path))
    assert list(several) == KINDS
    for kind, share in zip(KINDS, SHARES, strict=True):
        alone = make_bases(source, ["lowrank"], Options(shares=(share,), checkpoints=tmp_path))["lowrank"]
        assert several[kind].ranks == alone.ranks
        assert_close(logits_of(source, several[kind].model), logits_of(source, alone.model), 2e-5)
    names = ["lowrank,afm,0.8,0.5,0.3,size.json", *(f"lowrank,afm,{share:g},size.json" for share in SHARES)]
    assert sorted(path.name for path in (tmp_path / "tiny/1").iterdir()) == sorted(names)


def test_compress_publishes_a_variant_of_each_share(source: Source, tmp_path: Path) -> None:
    names = ["lowrank", "lowrank-50", "lowrank-30", "lowrank-30-int8"]
    options = Options(shares=SHARES, distill=LEARNING, checkpoints=tmp_path / "checkpoints")
    folder = compress(source, tmp_path / "bundles", names, options, names)
    ranker = load_bundle(folder)
    assert list(ranker.engines) == ["fp32", *names] and not ranker.refused
    ranks = json.loads((folder / "report.json").read_text())["ranks"]
    assert sorted(ranks) == sorted(KINDS)
    for larger, smaller in (("lowrank", "lowrank-50"), ("lowrank-50", "lowrank-30")):
        assert all(rank >= ranks[smaller][name] for name, rank in ranks[larger].items() if rank is not None)
        assert all(ranks[larger][name] is None for name, rank in ranks[smaller].items() if rank is None)
    sizes = [ranker.manifest.variants[name].bytes for name in KINDS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    checkpoints = [path.name for path in (tmp_path / "checkpoints/tiny/1").glob("*.pt")]
    assert checkpoints == ["lowrank,afm,0.8,0.5,0.3,size.pt"], "one training for all"
    with serve(Settings(bundles=folder.parent.parent)) as client:
        example = client.get("/models/tiny").json()["example"]
        answers = [client.post("/score", json=example | {"variant": name}).json() for name in names]
    assert [answer["variant"] for answer in answers] == names
    assert len({tuple(answer["results"]["scores"]) for answer in answers}) == len(names)


def test_resumed_compress_continues_with_the_next_share(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the training nor a finished variant is repeated, also if fewer variants are named."""
    names = ["lowrank", "lowrank-30"]
    options = Options(shares=SHARES, distill=LEARNING, checkpoints=tmp_path / "checkpoints")
    first = compress(source, tmp_path / "bundles", names, options, names)
    monkeypatch.setattr(Distiller, "run_epoch", None)
    calls = list[str]()
    original = making.measure_variant
    monkeypatch.setattr(making, "measure_variant", lambda *given: calls.append(given[2]) or original(*given))
    again = compress(source, tmp_path / "bundles", ["lowrank-30", "lowrank-50"], options, KINDS)
    assert calls == ["lowrank-50"]
    for graph in (first / "variants/lowrank-30").glob("*.onnx"):
        assert graph.read_bytes() == (again / "variants/lowrank-30" / graph.name).read_bytes()


def test_every_share_must_save_something(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save nothing at a share of 1 \(size\)"):
        make_bases(source, ["lowrank-50"], Options(shares=(1.0, 0.5), checkpoints=tmp_path))
    with pytest.raises(ValueError, match="less than the lowest rank of every layer"):
        make_bases(source, ["lowrank"], Options(shares=(0.5, 0.01), checkpoints=tmp_path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no number"),
        ("0.5,", "no number"),
        ("half", "no number"),
        ("1.5", "above 0 and at most 1"),
        ("0.5,0", "above 0 and at most 1"),
        ("nan", "above 0 and at most 1"),
        ("0.25,0.5", "the largest one first"),
        ("0.5,0.5", "the largest one first"),
        ("0.75,0.375", "0.375 is no whole percentage"),
    ],
)
def test_read_shares_refuses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_shares(text)


def test_names_have_the_smaller_shares() -> None:
    assert read_shares("0.625") == (0.625,) and read_shares("0.75, 0.5,0.07") == (0.75, 0.5, 0.07)
    assert low_rank_kinds((0.625,)) == ["lowrank"] and low_rank_kinds((0.75, 0.58, 0.07))[1:] == [
        "lowrank-58",
        "lowrank-7",
    ]
    assert variant_names((0.75, 0.25))[3:7] == ["lowrank", "lowrank-int8", "lowrank-25", "lowrank-25-int8"]
    check_names(["int8", "lowrank-25-int8-tables8", "student"], (0.75, 0.25))
    with pytest.raises(ValueError, match=r"lowrank-50: --share has no such share; .* are lowrank$"):
        check_names(["lowrank-50"], (0.5,))


def test_command_refuses_a_wrong_share_before_it_reads_data(tmp_path: Path, tiny: Tiny) -> None:
    for arguments, reason in (
        (["--share", "0.5,0.75"], "the largest one first"),
        (["--share", "0.5", "--variants", "lowrank-25"], "no such share"),
        (["--share", "0.5", "--force", "lowrank-25-int8"], "no such share"),
        (["--least-rank", "0"], "a rank is at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            command.main([str(tiny.folder), str(tmp_path / "absent.toml"), *arguments])
