"""Exploration: draws, what they change in a ranking and what they leave alone, and the requests that are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

import slatewise
from slatewise.bundle.loader import load_bundle
from slatewise.bundle.manifest import POSTERIOR, ManifestError
from slatewise.bundle.ranker import Ranker, weighted_mean
from slatewise.client.errors import Invalid as ClientInvalid
from slatewise.errors import Invalid
from slatewise.http.capture import capture_line
from slatewise.inference.arrays import Float64
from slatewise.inference.engine import EngineLoadError
from slatewise.inference.exploration import draw
from slatewise.ranking.pipeline import Pipeline, Ranking
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from slatewise_train.config import ExportConfig
from slatewise_train.export import ExportOptions, export
from tests.conftest import Tiny
from tests.ranking.support import BOUND, draw_request, rank, run
from tests.support.application import serve
from tests.support.blocked_engine import BlockedMethod

SCALE = 5.0


@pytest.fixture(scope="module")
def exploring_root(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny ranker, exported once more with a posterior."""
    root = tmp_path_factory.mktemp("exploring")
    config = dataclasses.replace(tiny.config, export=ExportConfig(explore=True))
    export(tiny.trainer, tiny.learner, config, root, 1, ExportOptions(force=True))
    return root


@pytest.fixture(scope="module")
def exploring(exploring_root: Path) -> Ranker:
    return load_bundle(exploring_root / "tiny" / "1")


def probabilities(ranker: Ranker, request: RankRequest) -> Float64:
    ranking = run(ranker, lambda p: rank(p, request))
    assert ranking.scored is not None and not ranking.degraded
    return ranking.scored.probabilities


def test_x(exploring: Ranker, ranker: Ranker) -> None:
    request = draw_request(ranker, 30, 300, 1, exit="set")
    a = probabilities(ranker, request)
    b = probabilities(exploring, request)
    c = probabilities(exploring, request.model_copy(update={"explore": 1.0, "id": "a"}))
    print(a[:4], c[:4], np.abs(a - c).max())
    print(exploring.report.get("exploration"))
    assert (a == b).all()
