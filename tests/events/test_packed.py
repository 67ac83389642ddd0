"""The stored form of a history: what is written is read, and the script of Redis does what `merge` does."""

from __future__ import annotations

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slatewise.events.event import Event
from slatewise.events.packed import EXTEND, Unreadable, arguments, merge, tombstone, unpack
from tests.events.support import NOW, event, pairs

KEY = "slatewise:history:{u}"


def extend(client: redis.Redis, events: list[tuple[Event, float]], most: int, ttl: int = 0) -> str:
    given = [part for each in events for part in arguments(*each)]
    answer: bytes = client.eval(EXTEND, 1, KEY, most, ttl, *given)
    return answer.decode()


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4)
TIME = st.sampled_from([0.0, 1.0, 2.0, 2.5, 3.0, NOW, NOW + 1e-6, 1e-5])
EVENT = st.builds(
    Event,
    st.just("u"),
    st.sampled_from(["a", "b"]) | TEXT,
    st.just("") | TEXT,
    TIME,
    st.just("") | st.just("r1"),
    st.just("") | st.sampled_from(["e1", "e2"]),
)
BATCHES = st.lists(st.lists(st.tuples(EVENT, st.sampled_from([5.0, 15.0])), max_size=8), max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(BATCHES, st.integers(1, 6), st.booleans())
def test_script_and_reference_give_the_same_value(
    client: redis.Redis, batches: list[list[tuple[Event, float]]], most: int, deleted: bool
) -> None:
    client.delete(KEY)
    value: bytes | None = None
    if deleted:
        value = tombstone(10.0)
        client.set(KEY, value)
    for batch in batches:
        value, answers = merge(value, batch, most)
        assert extend(client, batch, most) == answers
        assert client.get(KEY) == value
    if value is not None:
        history = unpack(value, most)
        assert history is None or len(history.item_ids) <= most


def test_a_history_reads_back_as_it_was_written() -> None:
    events = [event("a", 1.5, action="view"), event("\u00e9\x00|\n", NOW), event("b" * 256, NOW + 0.123456)]
    value, answers = merge(None, pairs(events), 10)
    assert answers == "NNN" and value is not None
    history = unpack(value, 10)
    assert history is not None
    assert history.item_ids == ["a", "\u00e9\x00|\n", "b" * 256]
    assert history.actions == ["view", None, None]
    assert history.timestamps == [1.5, NOW, NOW + 0.123456]
    assert history.offset == 0


def test_the_newest_events_are_read_with_their_offset() -> None:
    value, _ = merge(None, pairs([event(str(k), NOW + k) for k in range(10)]), 6)
    assert value is not None
    whole, newest = unpack(value, 100), unpack(value, 2)
    assert whole is not None and newest is not None
    assert (whole.item_ids, whole.offset) == (list("456789"), 4)
    assert (newest.item_ids, newest.offset) == (list("89"), 8)


def test_events_are_in_the_order_of_their_times() -> None:
    """Events of equal times stay in the order in which they came."""
    value, _ = merge(None, pairs([event("d", 4), event("b", 2), event("c", 2), event("a", 1), event("e", 4)]), 10)
    assert value is not None
    history = unpack(value, 10)
    assert history is not None and history.item_ids == list("abcde")


def test_an_event_older_than_a_full_history_is_not_stored() -> None:
    value, _ = merge(None, pairs([event("a", 5), event("b", 6)]), 2)
    after, answers = merge(value, pairs([event("old", 1), event("late", 5.5)]), 2)
    assert answers == "ON" and after is not None
    history = unpack(after, 2)
    assert history is not None and (history.item_ids, history.offset) == (["late", "b"], 1)


def test_one_id_counts_once_whatever_the_content() -> None:
    value, first = merge(None, pairs([event("a", 1, event_id="x"), event("a", 1)]), 10)
    again, second = merge(value, pairs([event("b", 2, event_id="x"), event("a", 1), event("a", 2)]), 10)
    assert (first, second) == ("NN", "KKN")
    assert again is not None


def test_a_deletion_refuses_what_was_received_before() -> None:
    value, answers = merge(tombstone(10.0), [(event("a", 1), 9.0), (event("b", 2), 10.0), (event("c", 3), 11.0)], 10)
    assert answers == "GGN" and value is not None
    history = unpack(value, 10)
    assert history is not None and history.item_ids == ["c"]
    assert unpack(tombstone(10.0), 10) is None
    assert merge(value, [(event("d", 4), 9.5)], 10) == (value, "G"), "after a newer event too"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"text",
        b"h1\xff",
        b"h1\xff0\xff1\xff1.0\xff",
        b"h1\xff0\xff1\xff1.0\xffa\xff\xff1.0\xff\xfeid",
        b"h1\xffx\xff0\xff1\xff",
        b"h1\xff0\xff1\xff1.0\xffa\xff\xffyesterday\xff\xfeid\xff",
        b"h1\xff0\xff1\xff1.0\xff\xc3\xff\xff1.0\xff\xfeid\xff",
        b"h2\xff0\xff0\xff1\xff",
        b"h1x\xff0\xff0\xff1\xff",
    ],
)
def test_other_bytes_are_unreadable(value: bytes) -> None:
    with pytest.raises(Unreadable):
        unpack(value, 10)


@pytest.mark.parametrize("value", [b"d1\xffyesterday\xff", b"h1\xff0\xff1\xffyesterday\xffa\xff\xff1.0\xff\xfeid\xff"])
def test_a_value_without_its_number_is_replaced(client: redis.Redis, value: bytes) -> None:
    for items in ("b", "bcdef"):
        client.set(KEY, value)
        assert extend(client, pairs([event(item) for item in items]), 10) == "N" * len(items)
        history = unpack(client.get(KEY), 10)
        assert history is not None and history.item_ids == list(items)


def test_a_key_of_another_type_is_replaced(client: redis.Redis) -> None:
    client.hset(KEY, "a", "b")
    assert extend(client, pairs([event("a")]), 10) == "N"
    history = unpack(client.get(KEY), 10)
    assert history is not None and history.item_ids == ["a"]


def test_the_time_to_live_begins_with_each_new_event(client: redis.Redis) -> None:
    extend(client, pairs([event("a", 1)]), 10, ttl=100)
    client.expire(KEY, 5)
    extend(client, pairs([event("a", 1)]), 10, ttl=100)
    assert client.ttl(KEY) <= 5, "nothing new"
    extend(client, pairs([event("b", 2)]), 10, ttl=100)
    assert client.ttl(KEY) > 90
    extend(client, pairs([event("c", 3)]), 10, ttl=0)
    assert client.ttl(KEY) == -1


def test_many_events_hold_redis_briefly(client: redis.Redis) -> None:
    """A text that is copied for each event took a second here. Both ways end with the same value."""
    full = [(event("i" * 256, NOW + k, action="a" * 256, event_id=f"f{k}"), NOW) for k in range(512)]
    more = [(event("i" * 256, NOW + 1.5 * k, action="a" * 256, event_id=f"m{k}"), NOW) for k in range(1_000)]
    value, expected = merge(merge(None, full, 512)[0], more, 512)
    microseconds = []
    for _ in range(3):  # the machine may be busy
        client.delete(KEY)
        extend(client, full, 512)
        client.config_resetstat()
        assert extend(client, more, 512) == expected
        assert client.get(KEY) == value
        microseconds.append(client.info("commandstats")["cmdstat_eval"]["usec"])
    assert min(microseconds) < 200_000
