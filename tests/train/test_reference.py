"""The reference bundle: its documented shape, and content that is the same on every call."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch

from slatewise.bundle.features import request_context
from slatewise.inference.arrays import FIRST_ITEM, Candidates, History
from slatewise.inference.engine import CANDIDATE_CHUNK, HISTORY_CHUNK, Engine
from slatewise.schemas import RankRequest
from slatewise_train.bundle_writer import longest_call, write_content, write_graphs
from slatewise_train.demo.reference import reference_content
from slatewise_train.rankers import families
from slatewise_train.rankers.base import EXITS, uncalibrated


def test_reference_ranker_has_the_documented_shape() -> None:
    content = reference_content()
    config = content.model.config
    assert (config.width, config.blocks, config.attention_heads, config.feed_forward, config.set_blocks) == (
        128,
        4,
        4,
        4,
        1,
    )
    assert (config.heads, config.numeric, config.meta_size, config.fields) == (2, 4, 64, {})
    assert (len(content.model.blocks), len(content.model.set_blocks)) == (4, 1)
    assert content.model.blocks[0].up.weight.shape == (512, 128) and content.model.set_out.weight.shape == (2, 128)
    assert content.ids == [str(k) for k in range(5_000)]
    assert content.model.item_table().shape == (5_000 + FIRST_ITEM, 128)
    assert len(content.actions) == config.actions - 1 and len(content.features) == 4 and len(content.heads) == 2
    assert content.vectors.shape == (len(content.users), 64) and content.vectors.dtype == np.float32
    assert content.exits == list(EXITS) and content.history_used == 2_048
    assert not content.model.training


def test_reference_content_is_the_same_on_every_call() -> None:
    """Weights, vectors and requests do not depend on the state of the random generators."""
    one = reference_content()
    torch.manual_seed(123)
    np.random.default_rng().normal()
    other = reference_content()
    first, second = (content.model.state_dict() for content in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)
    np.testing.assert_array_equal(one.vectors, other.vectors)
    for name in ("ids", "actions", "features", "fields", "heads", "users", "titles", "example", "warmup"):
        assert getattr(one, name) == getattr(other, name), name


def test_reference_weights_are_not_zero() -> None:
    """With zeros some exits or heads would be equal, and a speed test would not notice skipped work."""
    model = reference_content().model
    for name in ("point_down.weight", "set_out.weight", "default_meta", "fusion.weight"):
        assert (model.state_dict()[name].abs() > 0).float().mean() > 0.99, name


def test_reference_requests_have_only_ids_of_the_bundle() -> None:
    content = reference_content()
    request = RankRequest.model_validate(content.example)
    assert request.user in content.users and request.request_time is not None
    assert len(request.candidates.item_ids) >= 20 and len(request.history.item_ids) >= 10
    assert set(request.candidates.item_ids) | set(request.history.item_ids) <= set(content.ids)
    assert request.history.actions is not None and set(request.history.actions) <= set(content.actions)
    assert request.history.timestamps is not None and None not in request.history.timestamps
    assert len(request.history.actions) == len(request.history.timestamps) == len(request.history.item_ids)
    assert request.history.timestamps == sorted(t for t in request.history.timestamps if t is not None)
    assert set(request.candidates.features) == set(content.features)
    assert all(len(column) == len(request.candidates.item_ids) for column in request.candidates.features.values())
    shapes = [
        (len(r.history.item_ids), len(r.candidates.item_ids)) for r in map(RankRequest.model_validate, content.warmup)
    ]
    assert shapes == [(0, 1), (1, 20), (2_048, CANDIDATE_CHUNK), (HISTORY_CHUNK, 1_024)]
    json.dumps([content.example, content.warmup])


def test_reference_graphs_rank_the_example(tmp_path: Path) -> None:
    """Written as it is published, without measurements."""
    content = reference_content()
    write_content(tmp_path, content, 1)
    items = np.load(tmp_path / "items.npy")
    identity = uncalibrated(content.exits, 2)
    write_graphs(tmp_path, families.graphs(content.model, identity, longest_call(content.history_used)).all())
    engine = Engine(tmp_path, items, content.exits)
    request = RankRequest.model_validate(content.example)
    rows = [content.ids.index(i) + FIRST_ITEM for i in request.history.item_ids]
    slate = items[[content.ids.index(i) + FIRST_ITEM for i in request.candidates.item_ids]]
    numeric = np.array([request.candidates.features[name] for name in content.features], np.float32).T
    candidates = Candidates(slate, np.ascontiguousarray(numeric), request_context(request.request_time or 0.0)[None])
    history = History(np.array(rows), np.ones(len(rows), np.int64), np.full(len(rows), 5))
    found = [engine.score(history, candidates, content.vectors[0], exit) for exit in content.exits]
    assert all(
        p.shape == (len(slate), 2) and (p > 0).all() and (p < 1).all() and (np.ptp(p, axis=0) > 1e-4).all()
        for p in found
    )
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(found, 2)), "three exits, not one"
