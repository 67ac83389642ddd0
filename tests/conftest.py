"""Fixtures: a tiny ranker, trained and exported by the real code; a server with it; a real Redis."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest

from slatewise.bundle.loader import load_bundle
from slatewise.bundle.ranker import Ranker
from slatewise.settings import Settings
from tests.support.application import serve
from tests.support.browser import browser as browser  # a fixture
from tests.support.redis_binary import describe_redis
from tests.support.redis_server import run_redis

# No deadline: the time of one example says more about the neighbours on the machine than about the code.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)  # CI draws the same cases in every run
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

HERE = Path(__file__).resolve().parent
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
DEMO = HERE.parent / "models" / "bundles"
# Child processes find both packages from any working folder.
os.environ["PYTHONPATH"] = os.pathsep.join(str(HERE.parent / root) for root in ("app", "models"))


@dataclass(frozen=True)
class Tiny:
    """A trained tiny ranker: its data, trainer and published bundle."""

    root: Path  # holds tiny/1/
    training: Path  # checkpoint.pt, log.csv, log.png
    config: Any  # slatewise_train.config.Config
    trainer: Any  # slatewise_train.train.Trainer
    learner: Any  # slatewise_train.meta.limaml.MetaLearner

    @property
    def folder(self) -> Path:
        return self.root / "tiny" / "1"


def pytest_report_header() -> str:
    return describe_redis()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Trained once a session on a part of MovieLens latest-small (tests/data)."""
    import torch

    from slatewise_train.config import DemoConfig, read_config
    from slatewise_train.data import load_data
    from slatewise_train.demo.movielens import read_movielens
    from slatewise_train.export import ExportOptions, export
    from slatewise_train.meta.limaml import MetaTrainer
    from slatewise_train.train import train

    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("tiny")
    events, items = read_movielens("ml-latest-small", HERE / "data" / "ml-latest-small")
    events.write_parquet(base / "events.parquet")
    items.write_parquet(base / "items.parquet")
    config = read_config(HERE / "tiny.toml")
    tables = replace(config.tables, events=str(base / config.tables.events), items=str(base / config.tables.items))
    demo = DemoConfig(tables.events, tables.items)  # the store's tests need the vectors of many users
    config = replace(config, tables=tables, demo=demo)
    trainer = train(load_data(config.data, tables), config.model, config.train, base / "train")
    learner = MetaTrainer(trainer.model, trainer.data, config.meta).train(base / "meta")
    export(trainer, learner, config, base / "bundles", 1, ExportOptions(force=True))
    return Tiny(base / "bundles", base / "train", config, trainer, learner)


@pytest.fixture(scope="session")
def ranker(tiny: Tiny) -> Ranker:
    return load_bundle(tiny.folder)


@pytest.fixture(scope="session")
def client(tiny: Tiny) -> Iterator[httpx.Client]:
    """A client of a server with the tiny bundle and the embedded store."""
    with serve(Settings(bundles=tiny.root, max_candidates=2000, max_history=1000)) as client:
        yield client


@pytest.fixture(scope="session")
def example(client: httpx.Client) -> dict[str, Any]:
    """The bundle's example request, read through the API."""
    example: dict[str, Any] = client.get("/models/tiny").json()["example"]
    return example


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with run_redis(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture
def start_redis(tmp_path: Path) -> Callable[[int | None], AbstractContextManager[int]]:
    """A Redis that a test may stop: `with start_redis(port) as port`."""
    return lambda port=None: run_redis(tmp_path, port)


@pytest.fixture(scope="session")
def demo_url() -> Iterator[str]:
    """The address of a server with the committed demo."""
    with serve(Settings(bundles=DEMO, variants="fp32")) as client:
        yield str(client.base_url)
