"""Vectors of new items in a real Redis: codec, polling, faults, roll-back, and candidates that use them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import redis

from slatewise.bundle.adapted_items import AdaptedItems
from slatewise.bundle.manifest import bundle_folder
from slatewise.bundle.ranker import Ranker
from slatewise.schemas import RankRequest
from slatewise.store import adapted_items, admin
from slatewise.store.adapted_items import (
    items_key,
    pack_items,
    read_items,
    roll_back_items,
    unpack_items,
    write_items,
)
from slatewise.store.codec import Corrupt, Mismatched
from slatewise.store.lookup import EmbeddedStore, RedisStore
from tests.conftest import Tiny
from tests.store.conftest import GENEROUS, until_async, url


def some_items(count: int, width: int, seed: int = 0) -> AdaptedItems:
    rng = np.random.default_rng(seed)
    ids = [f'new "{k}" ü' for k in range(count)]
    return AdaptedItems(ids, rng.normal(size=(count, width)).astype(np.float32), rng.integers(1, 50, count), 1e9 + seed)


def with_store(port: int, ranker: Ranker, then: Callable[[RedisStore], Awaitable[None]]) -> None:
    async def main() -> None:
        async with RedisStore(url(port), GENEROUS, lambda: [ranker]) as store:
            await then(store)

    asyncio.run(main())


def assert_same(found: AdaptedItems | None, sent: AdaptedItems) -> None:
    assert found is not None
    assert (found.ids, found.created_at) == (sent.ids, sent.created_at)
    np.testing.assert_array_equal(found.vectors, sent.vectors)
    np.testing.assert_array_equal(found.events, sent.events)


@pytest.mark.parametrize(("count", "width"), [(0, 3), (1, 1), (700, 64)])
def test_items_are_read_as_they_were_packed(count: int, width: int) -> None:
    sent = some_items(count, width)
    assert_same(unpack_items(pack_items(sent), width), sent)


def test_each_changed_byte_is_noticed() -> None:
    value = pack_items(some_items(2, 3))
    for k in range(len(value)):
        changed = value[:k] + bytes([value[k] ^ 1]) + value[k + 1 :]
        with pytest.raises((Corrupt, Mismatched)):
            unpack_items(changed, 3)
    for k in range(len(value)):
        with pytest.raises(Corrupt):
            unpack_items(value[:k], 3)


def test_another_width_and_wrong_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    items = some_items(2, 3)
    with pytest.raises(Mismatched, match="3 dimensions, expected 4"):
        unpack_items(pack_items(items), 4)
    with pytest.raises(ValueError, match="not finite"):
        pack_items(AdaptedItems(["a"], np.full((1, 3), np.nan, np.float32), np.ones(1, np.int64), 0.0))
    monkeypatch.setattr(adapted_items, "MOST_ITEMS", 1)
    with pytest.raises(ValueError, match="2 new items; at most 1 are kept: train a new version"):
        pack_items(items)


def test_a_store_follows_writes_and_roll_backs(
    client: redis.Redis, redis_port: int, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapted_items, "PIECE", 1_000)  # several replies
    place = ranker.name, ranker.manifest.version
    width = ranker.manifest.width
    first, second = some_items(40, width, 1), some_items(50, width, 2)

    async def follow(store: RedisStore) -> None:
        assert store.new_items(ranker) is None

        def is_now(sent: AdaptedItems | None) -> Callable[[], Awaitable[object]]:
            async def found() -> bool:
                now = store.new_items(ranker)
                return (now and now.created_at) == (sent and sent.created_at)

            return found

        for sent in (first, second):
            write_items(client, *place, sent)
            await until_async(is_now(sent))
            assert_same(store.new_items(ranker), sent)
        assert roll_back_items(client, *place)
        await until_async(is_now(first))
        assert_same(store.new_items(ranker), first)
        assert roll_back_items(client, *place)
        await until_async(is_now(None))
        assert not roll_back_items(client, *place), "there is nothing left"

    with_store(redis_port, ranker, follow)


def test_unreadable_values_leave_the_vectors_before(client: redis.Redis, redis_port: int, ranker: Ranker) -> None:
    place = ranker.name, ranker.manifest.version
    sent = some_items(3, ranker.manifest.width)
    write_items(client, *place, sent)

    async def poll_faults(store: RedisStore) -> None:
        await store.poller.poll()
        for value in (b"x", pack_items(sent)[:-1], pack_items(some_items(3, 1))):
            client.set(items_key(*place), value)
            await store.poller.poll()
            assert_same(store.new_items(ranker), sent)
        client.delete(items_key(*place))
        client.hset(items_key(*place), "no", "string")
        await store.poller.poll()
        assert_same(store.new_items(ranker), sent)
        assert store.nodes.all_closed, "look-ups of users go on"

    with_store(redis_port, ranker, poll_faults)


def test_candidates_have_the_vectors_of_their_items(ranker: Ranker) -> None:
    known = next(iter(ranker.vocabulary.items))
    request = RankRequest.model_validate({"candidates": {"item_ids": ["b", known, "other", "a"]}})
    vectors = np.stack([np.full(ranker.manifest.width, k, np.float32) for k in (7, 8, 9)])
    items = AdaptedItems(["a", "b", known], vectors, np.ones(3, np.int64), 0.0)
    before, _ = ranker.candidates(request, 0.0)
    candidates, unknown = ranker.candidates(request, 0.0, adapted=items)
    assert unknown.positions.tolist() == [0, 2, 3]
    assert unknown.adapted.tolist() == [0, 3]
    assert candidates.vectors[[0, 3], 0].tolist() == [8, 7]
    np.testing.assert_array_equal(candidates.vectors[[1, 2]], before.vectors[[1, 2]], "known items stay")
    assert EmbeddedStore().new_items(ranker) is None


def test_the_command_shows_and_rolls_back(
    client: redis.Redis, redis_port: int, tiny: Tiny, ranker: Ranker, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: str) -> object:
        admin.main([command, str(bundle_folder(tiny.folder)), "--redis-url", url(redis_port)])
        return json.loads(capsys.readouterr().out)

    place = ranker.name, ranker.manifest.version
    assert run("items") == {"items": 0}
    sent = some_items(5, ranker.manifest.width)
    write_items(client, *place, sent)
    assert run("items") == {"items": 5, "events": int(sent.events.sum()), "created_at": sent.created_at}
    assert run("roll-back-items") == {"changed": True}
    assert read_items(client, *place, ranker.manifest.width) is None
    with pytest.raises(SystemExit):
        admin.main(["items", "--redis-url", url(redis_port)])
    assert "give a bundle" in capsys.readouterr().err
