"""A version that reads a new space of vectors waits until enough users have one. With a real Redis."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import redis
from pydantic import SecretStr

from slatewise.main import load
from slatewise.settings import Settings
from slatewise.store.generations import Generations
from slatewise.store.push import push
from tests.http.support import ask, assert_problem
from tests.support.bundle_copy import Copy
from tests.support.versions import command, done, example_of, publish, serving, state_of, wait_until

if TYPE_CHECKING:
    from tests.conftest import Tiny

USERS = [f"user-{k}" for k in range(10)]


def vectors(tiny: Tiny, users: int) -> np.ndarray:
    size = np.load(tiny.folder / "default_meta.npy").shape[0]
    return np.random.default_rng(0).normal(0, 0.1, (users, size)).astype(np.float32)


def in_space(space: str) -> Callable[[Copy], None]:
    return lambda copy: copy.change_manifest(lambda m: m.update(space=space))


@pytest.mark.parametrize("reload", ["admin", "poll"])
def test_new_space_is_served_when_it_covers_its_users(
    tiny: Tiny, tmp_path: Path, start_redis: Callable[[int | None], AbstractContextManager[int]], reload: str
) -> None:
    body: dict[str, Any] = example_of(tiny.folder) | {"user": USERS[0]}
    publish(tiny.folder, tmp_path / "root", 1, in_space("old"))
    with start_redis(None) as port, redis.Redis(port=port) as client:
        push(Generations(client, "tiny", "old"), USERS, vectors(tiny, 10))
        url = SecretStr(f"redis://127.0.0.1:{port}/0")
        with serving(tmp_path / "root", redis_url=url, redis_timeout_ms=2000, reload=reload, reload_s=0.1) as server:
            assert ask(server, body, "/rerank")["meta_embedding"]["status"] == "hit"
            publish(tiny.folder, tmp_path / "root", 2, in_space("new"))
            for users in (0, 8):
                if users:
                    push(Generations(client, "tiny", "new"), USERS[:users], vectors(tiny, users))
                reason = f"space new has vectors of {users} users, 0.9 of the 10 of old are needed"
                if reload == "admin":
                    assert reason in assert_problem(command(server, "switch", version=2), 422)["detail"]
                wait_until(lambda reason=reason: reason in str(state_of(server)["last_load"]), reason)
                assert state_of(server)["last_load"]["outcome"] == "waiting"
                assert ask(server, body, "/rerank")["version"] == 1
            push(Generations(client, "tiny", "new"), USERS[:9], vectors(tiny, 9))
            if reload == "admin":
                done(server, "switch", version=2)
            wait_until(lambda: state_of(server)["version"] == 2, "version 2")
            answer = ask(server, body, "/rerank")
            assert (answer["version"], answer["meta_embedding"]["status"]) == (2, "hit"), "from the first request on"


def test_a_restart_does_not_switch_to_a_space_without_users(
    tiny: Tiny, tmp_path: Path, start_redis: Callable[[int | None], AbstractContextManager[int]]
) -> None:
    publish(tiny.folder, tmp_path / "root", 1, in_space("old"))
    publish(tiny.folder, tmp_path / "root", 2, in_space("new"))
    with start_redis(None) as port, redis.Redis(port=port) as client:
        settings = Settings(bundles=tmp_path / "root", redis_url=SecretStr(f"redis://127.0.0.1:{port}/0"))
        push(Generations(client, "tiny", "old"), USERS, vectors(tiny, 10))
        assert load(settings)["tiny"].manifest.version == 1
        push(Generations(client, "tiny", "new"), USERS, vectors(tiny, 10))
        assert load(settings)["tiny"].manifest.version == 2
        client.flushall()
        push(Generations(client, "tiny", "old"), USERS, vectors(tiny, 10))
        (tmp_path / "root/tiny/1/items.npy").unlink()
        assert load(settings)["tiny"].manifest.version == 2, "better than none"
    assert load(Settings(bundles=tmp_path / "root"))["tiny"].manifest.version == 2, "without Redis, vectors are inside"


def test_redis_that_does_not_answer_covers_nothing(
    tiny: Tiny, tmp_path: Path, start_redis: Callable[[int | None], AbstractContextManager[int]]
) -> None:
    publish(tiny.folder, tmp_path / "root", 1, in_space("old"))
    publish(tiny.folder, tmp_path / "root", 2, in_space("new"))
    publish(tiny.folder, tmp_path / "root", 3, in_space("old"))
    (tmp_path / "root/tiny/2").rename(tmp_path / "2")
    (tmp_path / "root/tiny/3").rename(tmp_path / "3")
    with start_redis(None) as port:
        url = SecretStr(f"redis://127.0.0.1:{port}/0")
        with serving(tmp_path / "root", redis_url=url) as server:
            for version in (2, 3):
                (tmp_path / str(version)).rename(tmp_path / f"root/tiny/{version}")
            with redis.Redis(port=port) as client:
                client.execute_command("CLIENT", "PAUSE", 3000)
            problem = assert_problem(command(server, "switch", version=2), 422)
            assert "Redis does not say how many users space new covers" in problem["detail"]
            assert done(server, "switch", version=3)["version"] == 3, "the same space needs no answer of Redis"
