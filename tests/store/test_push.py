"""`slatewise push`: archives and bundles become one full generation; failures are one line and exit code 1."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from slatewise import cli
from slatewise.store.codec import HEADER, unpack, user_key
from slatewise.store.generations import Generations
from slatewise.store.push import push
from tests.conftest import Tiny
from tests.store.conftest import url

DIM = 8


@pytest.fixture
def store(client: redis.Redis) -> Generations:
    return Generations(client, "r", "s")


def rows(users: list[str], value: float = 0.0) -> np.ndarray:
    return np.full((len(users), DIM), value, np.float32)


def read(store: Generations, user: str) -> tuple[float, int, float] | None:
    """(value, generation, created_at) that a replica would serve."""
    live = store.live()
    for value in store.client.hmget(user_key("r", "s", user), live) if live else ():
        if value is not None:
            vector, generation, created_at = unpack(value, DIM)
            return float(vector[0]), generation, created_at
    return None


def run_push(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "slatewise", "push", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_an_archive_of_vectors_becomes_a_live_generation(store: Generations, redis_port: int, tmp_path: Path) -> None:
    users = ["a", "b", "\N{SNOWMAN}"]
    np.savez(
        tmp_path / "v.npz",
        users=np.array(users),
        vectors=np.arange(3 * DIM, dtype=np.float64).reshape(3, DIM),
        ranker="r",
        space="s",
    )
    result = run_push(
        str(tmp_path / "v.npz"),
        "--redis-url",
        f"redis://127.0.0.1:{redis_port}/0",
        "--dtype",
        "float16",
        "--ttl-days",
        "1",
    )
    assert {"ranker": "r", "space": "s", "generation": 1, "users": 3, "live": [1]}.items() <= result.items()
    assert result["bytes"] == 3 * (HEADER.size + 2 * DIM) and result["seconds"] > 0 and result["users_per_second"] > 0
    assert [read(store, user)[0] for user in users] == [0.0, DIM, 2 * DIM]
    assert store.client.ttl(user_key("r", "s", "a")) > 80_000


def test_an_archive_with_pickles_is_refused(tmp_path: Path, redis_port: int) -> None:
    np.savez(
        tmp_path / "v.npz",
        users=np.array(["a", object()], dtype=object),
        vectors=np.zeros((2, DIM)),
        ranker="r",
        space="s",
    )
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run_push(str(tmp_path / "v.npz"), "--redis-url", f"redis://127.0.0.1:{redis_port}/0")
    assert "allow_pickle" in refused.value.stderr


def test_an_interrupted_push_resumes_at_the_missing_chunk(store: Generations) -> None:
    users = [f"u{k}" for k in range(2_500)]
    vectors = rows(users, 1.0)

    def interrupt(done: int) -> None:
        if done == 2_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(store, users, vectors, progress=interrupt)
    assert store.live() == []
    result = push(store, users, vectors)
    assert result["generation"] == 1 and result["bytes"] == 500 * (HEADER.size + 4 * DIM), (
        "only what was missing was written"
    )
    assert read(store, "u0") is not None and read(store, "u2499") is not None
    assert push(store, users, vectors)["generation"] == 2


def test_a_bundle_becomes_a_live_generation(
    tiny: Tiny, client: redis.Redis, redis_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((tiny.folder / "manifest.json").read_text())
    users = json.loads((tiny.folder / "users.json").read_text())
    for k, folder in enumerate((tiny.folder, tiny.folder.parent), 1):
        assert cli.main(["push", str(folder), "--redis-url", url(redis_port)]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["ranker"], result["space"]) == (manifest["ranker"], manifest["space"])
        assert (result["generation"], result["users"]) == (k, len(users))
        assert client.hexists(user_key(manifest["ranker"], manifest["space"], users[0]), str(k))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "vectors.npz"
    np.savez(path, users=np.array(["a"]), vectors=np.zeros((1, DIM)), ranker="r", space="s")
    return path


def test_an_unreachable_redis_is_one_line_and_exit_code_1(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(archive), "--redis-url", "redis://127.0.0.1:1/0"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("slatewise push: error: ") and printed.err.count("\n") == 1


def test_a_second_writer_is_one_line_and_exit_code_1(
    store: Generations, archive: Path, redis_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with store.begin("plan", full=True):
        assert cli.main(["push", str(archive), "--redis-url", url(redis_port)]) == 1
    error = capsys.readouterr().err
    assert "is being written by process" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"vectors": np.zeros((1, DIM)), "ranker": "r", "space": "s"},
        {"users": np.array(["a", "a"]), "vectors": np.zeros((2, DIM)), "ranker": "r", "space": "s"},
        {"users": np.array(["a"]), "vectors": np.zeros((2, DIM)), "ranker": "r", "space": "s"},
        {"users": np.array(["a"]), "vectors": np.zeros(1), "ranker": "r", "space": "s"},
        {"users": np.array(["a"]), "vectors": np.full((1, DIM), np.nan), "ranker": "r", "space": "s"},
    ],
    ids=["empty", "no users", "users twice", "more vectors", "one dimension", "not a number"],
)
def test_an_unusable_archive_is_one_line_and_exit_code_1(
    arrays: dict[str, Any], tmp_path: Path, redis_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "vectors.npz", **arrays)
    assert cli.main(["push", str(tmp_path / "vectors.npz"), "--redis-url", url(redis_port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("slatewise push: error: ") and error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_archive_is_one_line_and_exit_code_1(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vectors.npz"
    path.write_bytes(content)
    for wrong in (path, tmp_path / "missing.npz", tmp_path):
        assert cli.main(["push", str(wrong)]) == 1
        error = capsys.readouterr().err
        assert str(wrong) in error and error.count("\n") == 1
    np.save(tmp_path / "vectors.npy", np.zeros((1, DIM)))
    assert cli.main(["push", str(tmp_path / "vectors.npy")]) == 1
    assert "not an .npz archive" in capsys.readouterr().err


def test_a_bundle_without_meta_embeddings_is_one_line(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((tiny.folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"meta_size": 0}))
    assert cli.main(["push", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"slatewise push: error: {tmp_path}: the bundle has no meta-embeddings\n"


def test_push_if_empty_keeps_what_is_live(store: Generations, redis_port: int, tmp_path: Path) -> None:
    """For example the vectors of a refresh, when `docker compose up` pushes those of the bundle again."""
    archive = {"users": np.array(["a"]), "vectors": rows(["a"], 1.0), "ranker": "r", "space": "s"}
    np.savez(tmp_path / "v.npz", **archive)  # type: ignore[arg-type]
    arguments = (str(tmp_path / "v.npz"), "--redis-url", url(redis_port), "--if-empty")
    assert run_push(*arguments)["live"] == [1]
    push(store, ["a"], rows(["a"], 2.0))
    assert run_push(*arguments) == {"ranker": "r", "space": "s", "kept": [2, 1]}
    value = read(store, "a")
    assert value is not None and value[:2] == (2.0, 2)
