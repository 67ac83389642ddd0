"""A bundle whose candidates pass fewer blocks than the history: graphs, explanations, compression, local loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import slatewise
from slatewise.bundle.loader import load_bundle
from slatewise.bundle.ranker import Ranker
from slatewise.ranking.pipeline import Pipeline
from slatewise_train.bundle_writer import FP32_BOUND
from slatewise_train.compress import compress
from slatewise_train.compression import source as sources
from slatewise_train.compression.bases import Options
from slatewise_train.compression.source import Source
from slatewise_train.demo.reference import publish_uncalibrated, reference_content
from slatewise_train.evaluation import parity
from slatewise_train.evaluation.parity import Requests
from slatewise_train.rankers import families
from tests.ranking.support import BOUND, draw_request, rank, reference, run, worst
from tests.ranking.test_explain import assert_events_equal_reranking

torch.set_num_threads(1)

BLOCKS = 3
ITEMS = 300


@pytest.fixture(scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    """Fewer measurements, and integers for small layers too."""
    with pytest.MonkeyPatch.context() as patch:
        nothing = {"machine": "none", "rows": []}
        for command in ("bundle_writer", "compress"):
            patch.setattr(
                f"slatewise_train.{command}.measure_latency", lambda engines, _: dict.fromkeys(engines, nothing)
            )
        patch.setattr(parity, "SLATES", (1, 37))
        patch.setattr("slatewise_train.compression.quantize.INTEGER_SIDE", 3)
        patch.setattr(sources, "SAMPLES", 12)
        yield patch


@pytest.fixture(scope="module")
def folder(small: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published bundle with random weights, and with one block for candidates."""
    whole = reference_content()
    ids = whole.ids[:ITEMS]
    shape = {"items": ITEMS + 2, "width": 16, "blocks": BLOCKS, "decoder_blocks": 1, "numeric": 1}
    torch.manual_seed(1)
    model = families.build(whole.model.family, dataclasses.replace(whole.model.config, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    example = {"history": {"item_ids": ids[:3]}, "candidates": {"item_ids": ids[:5]}, "request_time": 1.7e9}
    changes = {"ids": ids, "features": ["popularity"], "example": example, "history_used": 128, "warmup": []}
    content = dataclasses.replace(whole, model=model, **changes)
    return publish_uncalibrated(content, tmp_path_factory.mktemp("shallow") / "reference", 1)


@pytest.fixture(scope="module")
def shallow(folder: Path) -> Ranker:
    return load_bundle(folder)


def test_point_reads_the_last_block_and_the_state_keeps_all(shallow: Ranker) -> None:
    read = {name for name in shallow.manifest.graphs["point"].inputs if name.startswith(("key_", "value_"))}
    assert read == {"key_2", "value_2"}
    engine = shallow.engines["fp32"]
    assert (engine.blocks, engine.decoder_blocks) == (BLOCKS, [2])
    state = engine.extend(engine.start, Requests(engine, shallow.manifest).history(20))
    assert {part.shape for part in (*state.keys, *state.values)} == {(1, 21, 16)}
    assert len(state.keys) == len(state.values) == BLOCKS, "to extend a history, all of them are needed"


def test_published_measures_are_within_the_bound(shallow: Ranker) -> None:
    """They compare torch, one pass and many, extended histories, chunks, permutations and padding."""
    found = shallow.manifest.variants["fp32"].invariance
    assert len(found) == 7
    assert all(value <= FP32_BOUND for name, value in found.items() if name not in parity.OPTIONS)


@pytest.mark.parametrize("pack_history", [False, True], ids=["float32", "int8"])
def test_served_scores_of_cached_histories_equal_fresh_ones(shallow: Ranker, pack_history: bool) -> None:
    requests = [draw_request(shallow, events, 40, 3, exit="set") for events in (0, 1, 60, 60, 100)]
    bound = 0.05 if pack_history else BOUND

    async def all_of_them(pipeline: Pipeline) -> list[float]:
        return [worst(await rank(pipeline, each), reference(shallow, each, "set")) for each in requests]

    assert max(run(shallow, all_of_them, pack_history=pack_history)) < bound


@pytest.mark.parametrize("exit", ["point", "set"])
def test_deltas_of_events_equal_reranking(shallow: Ranker, exit: str) -> None:
    assert assert_events_equal_reranking(shallow, draw_request(shallow, 30, 20, 5, exit=exit), BOUND)


def test_compressed_variants_keep_the_blocks_of_candidates(folder: Path, tmp_path: Path) -> None:
    options = Options(shape={"blocks": 2}, checkpoints=tmp_path / "checkpoints")
    names = ["int8", "lowrank", "student", "student-int8"]
    ranker = load_bundle(compress(Source(folder, None), tmp_path / "bundles", names, options, names))
    assert not ranker.refused
    read = {name: (engine.blocks, engine.decoder_blocks) for name, engine in ranker.engines.items()}
    whole, student = (BLOCKS, [BLOCKS - 1]), (2, [1])
    assert read == {"fp32": whole, "int8": whole, "lowrank": whole, "student": student, "student-int8": student}


def test_ranker_in_this_process_gives_the_scores_of_the_engine(folder: Path, shallow: Ranker) -> None:
    request = draw_request(shallow, 20, 30, 7, exit="point")
    with slatewise.load(folder, threads=1) as ranker:
        found = ranker.score(**request.model_dump(exclude_none=True))
    weights = np.array(list(shallow.manifest.heads.values()))
    expected = reference(shallow, request, "point") @ weights / weights.sum()
    np.testing.assert_allclose(found.scores, expected, rtol=0, atol=BOUND)
