"""The refresh job against a real Redis: full and incremental generations, visibility, stop and resume, Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import redis
from pydantic import SecretStr

from slatewise.bundle.manifest import read_manifest
from slatewise.bundle.ranker import Ranker
from slatewise.settings import Settings
from slatewise.store.codec import unpack, user_key
from slatewise_train.config import TablesConfig, read_config
from slatewise_train.data import read_table
from slatewise_train.meta import refresh as job
from slatewise_train.meta.changed_users import Events
from slatewise_train.meta.refresh import Adapter, Options, Worker, chunk_of, refresh
from tests.conftest import Tiny
from tests.support.application import serve

CUT = 4  # newest events of a user, which the first refresh does not have


@pytest.fixture
def url(redis_port: int) -> str:
    return f"redis://127.0.0.1:{redis_port}/0"


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url) as client:
        client.flushall()
        yield client


@pytest.fixture(scope="module")
def events(tiny: Tiny) -> pl.DataFrame:
    return read_table(Path(tiny.config.tables.events))


@pytest.fixture
def files(events: pl.DataFrame, tmp_path: Path) -> tuple[Path, Path]:
    """Two files: the newest events of three users, and before them all other events."""
    late = sorted(events["user_id"].unique().to_list())[:3]
    rank = pl.col("timestamp").rank("ordinal", descending=True).over("user_id")
    newest = pl.col("user_id").is_in(late) & (rank <= CUT)
    events = events.with_columns(pl.col("timestamp").cast(pl.Float64))
    after = float(events.select(pl.col("timestamp").max()).item()) + 60.0
    before = events.filter(~newest)
    new = events.filter(newest).with_columns(timestamp=pl.lit(after) + rank)
    before.write_parquet(tmp_path / "before.parquet")
    new.write_parquet(tmp_path / "new.parquet")
    return tmp_path / "before.parquet", tmp_path / "new.parquet"


def stored(client: redis.Redis, ranker: Ranker, user: str) -> dict[int, np.ndarray]:
    """Generation -> vector."""
    found = client.hgetall(user_key(ranker.name, ranker.manifest.space, user))
    assert isinstance(found, dict)
    for field, value in found.items():
        assert unpack(value, ranker.manifest.meta_size)[1] == int(field)
    return {int(field): unpack(value, ranker.manifest.meta_size)[0] for field, value in found.items()}


def run(tiny: Tiny, url: str, paths: list[Path], **options: Any) -> dict[str, Any]:
    return refresh(tiny.folder, paths, url, Options(**options))


def test_second_refresh_adapts_only_changed_users(
    tiny: Tiny, ranker: Ranker, client: redis.Redis, url: str, files: tuple[Path, Path], events: pl.DataFrame
) -> None:
    before, new = files
    users = sorted(events["user_id"].unique().to_list())
    late = sorted(read_table(new)["user_id"].unique().to_list())
    first = run(tiny, url, [before])
    assert (first["generation"], first["kind"], first["users"], first["live"]) == (1, "full", len(users), [1]), (
        "the first generation is full"
    )
    assert first["bytes"] == len(users) * (28 + 4 * ranker.manifest.meta_size) and first["users_per_second"] > 0
    old = {user: stored(client, ranker, user)[1] for user in users}
    expected, vectors = Adapter(tiny.folder).vectors_of(read_table(before))
    assert sorted(expected) == users
    for user, vector in zip(expected, vectors, strict=True):
        np.testing.assert_allclose(old[user], vector, rtol=0, atol=1e-5)

    assert (
        run(tiny, url, [before])["kind"] == "nothing new"
        and client.get(f"slatewise:tiny:{ranker.manifest.space}:generations") == b"1"
    )
    second = run(tiny, url, [before, new])
    assert (second["generation"], second["kind"], second["users"], second["live"]) == (
        2,
        "incremental",
        len(late),
        [2, 1],
    )
    for user in users:
        now = stored(client, ranker, user)
        assert sorted(now) == ([1, 2] if user in late else [1])
        np.testing.assert_array_equal(now[1], old[user])
        if user in late:
            assert np.abs(now[2] - now[1]).max() > 1e-5, "new events change the vector"
    future = read_table(new).head(1).with_columns(timestamp=pl.lit(4e9))
    future.write_parquet(new.with_name("future.parquet"))
    assert Events([before, new, new.with_name("future.parquet")]).newest() == Events([new]).newest(), (
        "an event of the future does not count"
    )
    third = run(tiny, url, [before, new], full=True)
    assert (third["kind"], third["users"], third["live"]) == ("full", len(users), [3, 2, 1])


def test_vectors_of_depends_on_events_and_labels(tiny: Tiny, events: pl.DataFrame) -> None:
    adapter = Adapter(tiny.folder)
    user = events["user_id"][0]
    mine = events.filter(pl.col("user_id") == user).sort("timestamp", maintain_order=True)
    (_, [whole]) = adapter.vectors_of(mine)
    (_, [again]) = adapter.vectors_of(mine)
    np.testing.assert_array_equal(whole, again)
    (_, [flipped]) = adapter.vectors_of(mine.with_columns(label_like=1 - pl.col("label_like")))
    assert np.abs(flipped - whole).max() > 1e-3, "opposite labels give another vector"
    unknown = mine.with_columns(item_id=pl.lit("an unknown item"))
    assert adapter.vectors_of(unknown)[0] == []


def test_stopped_refresh_is_not_visible_and_resumes(
    tiny: Tiny, ranker: Ranker, client: redis.Redis, url: str, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CHUNK_USERS", 15)
    pointer = f"slatewise:tiny:{ranker.manifest.space}:generations"
    calls = []

    def here(
        work: job.Work, events: Events, users: list[str], chunks: int, done: set[int], processes: int
    ) -> Iterator[dict[str, float]]:
        """Adapts the chunks in this process, and stops before the third one."""
        worker = Worker(work)
        table = events.table.collect()
        for chunk in range(chunks):
            if chunk in done:
                continue
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(chunk)
            mine = [user for user in users if chunk_of(user, chunks) == chunk]
            yield worker(chunk, table.filter(pl.col("user_id").is_in(mine)))

    monkeypatch.setattr(job, "run_here", here)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, url, [files[0]])
    assert client.get(pointer) is None, "an unfinished generation is not visible"
    assert any(stored(client, ranker, user) for user in read_table(files[0])["user_id"].unique())
    calls[:] = [-1, -1, -1]
    done = run(tiny, url, [files[0]])
    assert done["chunks_resumed"] == 2 and done["generation"] == 1 and calls[3:] == list(range(2, done["chunks"]))
    assert client.get(pointer) == b"1"
    users = read_table(files[0])["user_id"].unique().to_list()
    assert all(list(stored(client, ranker, user)) == [1] for user in users)


def test_refresh_in_two_processes_writes_the_same_vectors(
    tiny: Tiny, ranker: Ranker, client: redis.Redis, url: str, files: tuple[Path, Path]
) -> None:
    """Bit for bit: the random numbers of a chunk depend on the chunk alone."""
    run(tiny, url, [files[0]], processes=2, dtype="float16")
    users = read_table(files[0])["user_id"].unique().to_list()
    assert (
        len(client.hget(user_key("tiny", ranker.manifest.space, users[0]), "1") or b"")
        == 28 + 2 * ranker.manifest.meta_size
    )
    first = {user: stored(client, ranker, user)[1] for user in users}
    run(tiny, url, [files[0]], full=True, dtype="float16")
    for user in users:
        np.testing.assert_array_equal(stored(client, ranker, user)[2], first[user])


def test_server_uses_new_vectors_without_restart(
    tiny: Tiny, client: redis.Redis, url: str, files: tuple[Path, Path]
) -> None:
    """The answers use the default vector, then the vector of the first generation, then the one after new events."""
    user = read_table(files[1])["user_id"][0]
    with serve(Settings(bundles=tiny.root, redis_url=SecretStr(url), embedding_cache_s=3600)) as server:
        body = server.get("/models/tiny").json()["example"] | {"user": user}

        def answer() -> tuple[str, str | None, list[float]]:
            found = server.post("/score", json=body).json()
            return found["meta_embedding"]["status"], found["meta_embedding"]["version"], found["results"]["scores"]

        def until(version: str) -> list[float]:
            give_up = time.monotonic() + 20
            while (found := answer())[1] != version:
                assert time.monotonic() < give_up, found
                time.sleep(0.1)
            assert found[0] == "hit"
            return found[2]

        status, version, without = answer()
        assert (status, version) == ("default", None)
        run(tiny, url, [files[0]])
        first = until("1")
        run(tiny, url, list(files))
        second = until("2")
        assert np.abs(np.subtract(first, without)).max() > 1e-6 and np.abs(np.subtract(second, first)).max() > 1e-6


def test_refresh_on_two_ray_workers_writes_the_same_vectors(
    tiny: Tiny, ranker: Ranker, client: redis.Redis, url: str, files: tuple[Path, Path]
) -> None:
    run(tiny, url, [files[0]])
    users = read_table(files[0])["user_id"].unique().to_list()
    expected = {user: stored(client, ranker, user)[1] for user in users}
    line = [
        sys.executable,
        "-m",
        "slatewise",
        "refresh",
        tiny.folder,
        files[0],
        "--full",
        "--ray",
        "--processes",
        "2",
        "--redis-url",
        url,
    ]
    ended = subprocess.run(
        line, capture_output=True, text=True, timeout=200, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    done = json.loads(ended.stdout.splitlines()[-1])
    assert (done["generation"], done["users"], done["live"], done["processes"]) == (2, len(users), [2, 1], 2)
    for user in users:
        np.testing.assert_allclose(stored(client, ranker, user)[2], expected[user], rtol=0, atol=1e-6)


def test_command_prints_summary_or_raises(
    tiny: Tiny,
    client: redis.Redis,
    url: str,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*arguments: str, at: str = url, bundle: Path = tiny.folder) -> Any:
        job.main([str(bundle), *arguments, "--processes", "1", "--redis-url", at])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert command(str(files[0]))["live"] == [1]
    assert command(*map(str, files), bundle=tiny.folder.parent)["live"] == [2, 1]
    with pytest.raises(redis.exceptions.ConnectionError):
        command(str(files[0]), at="redis://127.0.0.1:1/0")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet"):
        command("nowhere.parquet")


def bundle_with(tiny: Tiny, folder: Path, **members: Any) -> Path:
    """A copy of the bundle whose manifest has other members; None removes one."""
    shutil.copytree(tiny.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | members
    kept = {name: value for name, value in manifest.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(kept))
    return folder


def test_refresh_does_not_read_shown_rows_as_history(
    tiny: Tiny, ranker: Ranker, client: redis.Redis, url: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    before = read_table(files[0])
    actions = sorted(before["action"].unique())
    folder = bundle_with(tiny, tmp_path / "1", history_actions=actions)
    unseen = before.head(1).with_columns(user_id=pl.lit("only shown to"))
    shown = pl.concat([before.sample(fraction=0.5, shuffle=True, seed=3), unseen])
    shown = shown.with_columns(action=pl.lit("impression"), timestamp=pl.col("timestamp").max() + 60)
    pl.concat([before, shown]).write_csv(tmp_path / "log.csv")
    done = refresh(folder, [tmp_path / "log.csv"], url, Options())
    users = sorted(before["user_id"].unique())
    assert done["users"] == len(users), "a row that was only shown is no event"
    expected = dict(zip(*Adapter(tiny.folder).vectors_of(before), strict=True))
    for user in users:
        np.testing.assert_allclose(stored(client, ranker, user)[1], expected[user], rtol=0, atol=1e-5)
    assert refresh(folder, [tmp_path / "log.csv"], url, Options())["kind"] == "nothing new"


def test_bundle_without_the_rule_refuses_shown_rows(
    tiny: Tiny, ranker: Ranker, url: str, client: redis.Redis, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """A bundle of an older version has no `history_actions`. It still loads, and reads tables that leave no doubt."""
    folder = bundle_with(tiny, tmp_path / "1", history_actions=None)
    assert read_manifest(folder).history_actions == []
    shown = read_table(files[0]).with_columns(action=pl.lit("shown"))
    shown.write_parquet(tmp_path / "shown.parquet")
    with pytest.raises(ValueError, match=r"the action shown says .* set history_actions in \[data\] of its TOML"):
        refresh(folder, [files[0], tmp_path / "shown.parquet"], url, Options())
    assert refresh(folder, [files[0]], url, Options())["users"] > 0


def test_refresh_reads_the_tables_as_the_toml_says(
    tiny: Tiny, ranker: Ranker, client: redis.Redis, url: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Other names of columns, milliseconds, a separator, and the rule of a bundle that has none."""
    before = read_table(files[0])
    (tmp_path / "my.toml").write_text(
        'name = "tiny"\n[data]\nevents = "log.csv"\nseparator = ":"\ntime_unit = "ms"\n'
        f"history_actions = {sorted(before['action'].unique())}\n"
        '[columns]\nuser_id = "who"\nitem_id = "film"\ntimestamp = "at"\n'
    )
    shown = before.with_columns(action=pl.lit("shown"), timestamp=pl.col("timestamp") + 1)
    log = pl.concat([before, shown]).with_columns(timestamp=(pl.col("timestamp") * 1000).cast(pl.Int64))
    log = log.rename({"user_id": "who", "item_id": "film", "timestamp": "at"})
    log.write_csv(tmp_path / "log.csv", separator=":")
    paths = [str(tiny.folder), str(tmp_path / "log.csv"), "--toml", str(tmp_path / "my.toml")]
    job.main([*paths, "--redis-url", url, "--processes", "1"])
    expected = dict(zip(*Adapter(tiny.folder).vectors_of(before), strict=True))
    for user, vector in expected.items():
        np.testing.assert_allclose(stored(client, ranker, user)[1], vector, rtol=0, atol=1e-5)
    rows = TablesConfig("log.csv", time_unit="row")
    with pytest.raises(ValueError, match="a refresh needs times"):
        refresh(tiny.folder, [files[0]], url, Options(), rows)
    with pytest.raises(ValueError, match="with --ray, the events have the names of columns"):
        Events([files[0]], (), TablesConfig("log.csv", columns={"user_id": "user_id"})).parquet()
    with pytest.raises(ValueError, match=r"log\.csv: with --ray, the events are Parquet files"):
        Events([tmp_path / "log.csv"], (), read_config(tmp_path / "my.toml").tables).parquet()


def test_events_without_labels_have_unknown_labels(tiny: Tiny, events: pl.DataFrame) -> None:
    adapter = Adapter(tiny.folder)
    mine = events.filter(pl.col("user_id") == events["user_id"][0])
    users, found = adapter.vectors_of(mine.drop("label_like"))
    wanted = adapter.vectors_of(mine.with_columns(label_like=pl.lit(None, pl.Float32)))
    assert users == wanted[0] and len(users) == 1
    np.testing.assert_array_equal(found, wanted[1])


def test_head_of_an_action_is_adapted_without_labels(tiny: Tiny, events: pl.DataFrame, tmp_path: Path) -> None:
    """A head `like` learns from the action `like` of a log without label columns, in training as in a refresh."""
    folder = bundle_with(tiny, tmp_path / "1", history_actions=["like", "view"])
    log = events.drop("label_like").with_columns(pl.col("action").replace({"hate": "shown", "dislike": "shown"}))
    users, vectors = Adapter(folder).vectors_of(log)
    assert users and np.isfinite(vectors).all()


@pytest.mark.parametrize("rows", [None, 0])
def test_refresh_reads_rows_without_the_action_of_a_head(
    tiny: Tiny, events: pl.DataFrame, tmp_path: Path, rows: int | None
) -> None:
    folder = bundle_with(tiny, tmp_path / "1", history_actions=["like", "hate", "dislike"])
    log = events.drop("label_like").filter(pl.col("action") != "like")
    users, vectors = Adapter(folder).vectors_of(log.head(rows) if rows is not None else log)
    assert bool(users) is (rows is None) and np.isfinite(vectors).all()


def test_ids_that_are_floats_are_refreshed_as_integers(tiny: Tiny, events: pl.DataFrame, tmp_path: Path) -> None:
    adapter = Adapter(tiny.folder)
    expected, vectors = adapter.vectors_of(events)
    users, found = adapter.vectors_of(events.with_columns(pl.col("user_id", "item_id").cast(pl.Float64)))
    assert users == expected
    np.testing.assert_array_equal(found, vectors)


@pytest.mark.parametrize("dtype", [pl.Float64(), pl.Int64(), pl.Datetime("ns", "UTC"), pl.Datetime("ms"), pl.Date()])
def test_times_of_a_refresh_may_have_a_type(tmp_path: Path, dtype: pl.DataType) -> None:
    seconds = 86_400 * 365
    time = pl.Series([seconds]).cast(dtype) if dtype.is_numeric() else pl.from_epoch(pl.Series([seconds])).cast(dtype)
    table = {"user_id": [1], "item_id": ["a"], "timestamp": time}
    pl.DataFrame(table).write_parquet(tmp_path / "e.parquet")
    assert Events([tmp_path / "e.parquet"]).newest() == seconds
