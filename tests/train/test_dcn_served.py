"""A ranker of the family `dcn`, trained on the tiny tables, exported, and ranked with by the real server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.ranker import Ranker
from slatewise.settings import Settings
from slatewise_train.bundle_writer import FP32_BOUND
from slatewise_train.config import ModelConfig
from slatewise_train.evaluation.parity import OPTIONS
from slatewise_train.rankers.dcn import Dcn
from slatewise_train.train import train
from tests.conftest import Tiny
from tests.http.support import BOUND, ask, by_item, shaped
from tests.ranking.support import draw_request, reference
from tests.support.application import serve
from tests.train.dcn_bundle import SHAPE, export_dcn


@dataclass(frozen=True)
class Served:
    model: Dcn
    ranker: Ranker
    client: httpx.Client


@pytest.fixture(scope="module")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The pipeline of training and a server, with another `[model]` alone."""
    folder = tmp_path_factory.mktemp("dcn")
    model, bundle = export_dcn(tiny, folder, SHAPE | {"calibration_features": True}, epochs=6)
    with serve(Settings(bundles=folder / "bundles", max_candidates=2000, max_history=1000)) as client:
        assert isinstance(model, Dcn)
        yield Served(model, load_bundle(bundle), client)


@pytest.fixture(scope="module")
def example(served: Served) -> dict[str, Any]:
    example: dict[str, Any] = served.client.get("/models/tiny").json()["example"]
    return example


def test_export_names_the_family_and_every_measure_is_within_the_bound(served: Served) -> None:
    manifest = served.ranker.manifest
    assert manifest.model is not None and manifest.model.family == "dcn"
    assert (manifest.exits, manifest.limits.set_wise) == (["dot", "point"], 0)
    found = manifest.variants["fp32"].invariance
    assert found["onnx_against_torch"] > 0
    assert all(value <= FP32_BOUND for name, value in found.items() if name not in OPTIONS)


def test_training_changes_the_isotonic_layer_and_the_cross_layers(served: Served) -> None:
    isotonic = served.model.isotonic
    assert isotonic is not None and isotonic.features is not None
    slopes = torch.nn.functional.softplus(isotonic.raw.detach())
    assert (slopes - 1).abs().max() > 1e-3
    assert isotonic.features.weight.abs().max() > 1e-3
    assert served.model.point_out.weight.abs().max() > 1e-2


@pytest.mark.parametrize("exit", ["dot", "point"])
@pytest.mark.parametrize(("events", "n"), [(0, 1), (30, 24), (128, 1500)])
def test_served_scores_equal_the_engine(served: Served, events: int, n: int, exit: str) -> None:
    """1,500 candidates are scored in chunks."""
    request = draw_request(served.ranker, events, n, 1, exit=exit)
    answer = ask(served.client, request.model_dump(mode="json", exclude_unset=True))
    expected = reference(served.ranker, request, exit)
    assert answer["exit"] == exit and answer["degraded"] == []
    for k, head in enumerate(served.ranker.manifest.heads):
        np.testing.assert_allclose(answer["results"]["heads"][head], expected[:, k], atol=BOUND)


def test_kept_history_is_extended_and_gives_the_scores_of_a_fresh_one(served: Served, example: dict[str, Any]) -> None:
    results = []
    for events in (20, 40, 40):
        kept = ask(served.client, shaped(example, events, 24, "kept", "point"))
        fresh = ask(served.client, shaped(example, events, 24, f"fresh {events} {len(results)}", "point"))
        results.append(kept["history"]["cache"])
        assert fresh["history"]["cache"] == "miss"
        assert by_item(kept) == pytest.approx(by_item(fresh), abs=BOUND)
    assert results == ["miss", "extended", "hit"]


def test_rerank_sorts_by_the_scores_and_a_user_of_the_store_changes_them(
    served: Served, example: dict[str, Any]
) -> None:
    example = example | {"exit": "point"}  # `dot` reads no meta-embedding
    ranked = ask(served.client, example, "/rerank")["results"]
    assert ranked["scores"] == sorted(ranked["scores"], reverse=True) and len(set(ranked["scores"])) > 5
    anonymous = ask(served.client, {k: v for k, v in example.items() if k != "user"}, "/rerank")["results"]
    assert ranked["scores"] != anonymous["scores"]


def test_folder_of_training_has_a_checkpoint_that_continues(served: Served, tiny: Tiny, tmp_path: Path) -> None:
    config = replace(tiny.config.train, epochs=2, cascade_epochs=1)
    model = ModelConfig("dcn", SHAPE)
    short = train(tiny.trainer.data, model, config, tmp_path)
    again = train(tiny.trainer.data, model, config, tmp_path)
    for one, other in zip(short.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        np.testing.assert_array_equal(one, other)
