"""Slates of rows that were shown: a slow reference, the history before a slate, refusals, and the split."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.config import DataConfig, Head, TablesConfig
from slatewise_train.data import Data, load_data
from slatewise_train.exposures import (
    CUT,
    LONGEST,
    NO_HISTORY,
    SINGLE,
    build_exposures,
    training_slates,
)

HEADS = (Head("next", "next", 1.0), Head("buy", "label", 1.0))
LABELS = {"label_buy": pl.Float32}
Row = tuple[
    str, str, float, str | None, int | None, float | None, bool
]  # user, item, time, slate, position, buy, taken


def load(folder: Path, rows: dict[str, list], *history: str, heads: tuple[Head, ...] = HEADS, **split: int) -> Data:
    path = folder / "events.parquet"
    pl.DataFrame(rows).write_parquet(path)
    return load_data(DataConfig("shop", heads, **split), TablesConfig(str(path), history_actions=history))


def slates_of(data: Data) -> list[tuple[str, int, str, list[int], list[list[float]]]]:
    """Each slate as user, events before it, items, positions and labels."""
    e = data.exposures
    assert e is not None
    names = data.catalogue.vocabulary.items
    return [
        (
            data.sequences.users[e.slate_users[s]],
            int(e.history[s]),
            "".join(names[row - FIRST_ITEM] for row in e.items[e.offsets[s] : e.offsets[s + 1]]),
            e.positions[e.offsets[s] : e.offsets[s + 1]].tolist(),
            e.labels[e.offsets[s] : e.offsets[s + 1]].tolist(),
        )
        for s in range(len(e))
    ]


def history_of(data: Data) -> str:
    return "".join(data.catalogue.vocabulary.items[row - FIRST_ITEM] for row in data.sequences.items)


def test_rows_of_one_time_are_a_slate_without_a_slate_id(tmp_path: Path) -> None:
    data = load(
        tmp_path,
        {
            "user_id": list("uuuuuuvu"),
            "item_id": list("abcdabaz"),
            "timestamp": [10, 10, 10, 20, 20, 30, 10, 40],
            "label_buy": [0, 1, 0, 1, 0, 1, 1, 1],
        },
        "label:buy",
    )
    assert history_of(data) == "bdbza", "bought items alone, by user"
    assert slates_of(data) == [
        ("u", 0, "abc", [0, 0, 0], [[0, 0], [1, 1], [0, 0]]),
        ("u", 1, "da", [0, 0], [[1, 1], [0, 0]]),
    ], "a row that is alone at its time is an event and no slate; the item of a slate is not in its history"


def test_impressions_and_clicks_of_a_log_become_slates(tmp_path: Path) -> None:
    log = [
        ("u", "c", 99, "click", None, None),
        ("u", "b", 100, "impression", "r1", 2),
        ("u", "a", 100, "impression", "r1", 1),
        ("u", "d", 100, "impression", "r1", 3),
        ("u", "d", 130, "click", "r1", None),
        ("u", "d", 150, "buy", "r1", None),
        ("u", "a", 200, "impression", "r2", 1),
        ("u", "b", 200, "impression", "r2", 2),
        ("u", "e", 210, "click", None, None),
        ("w", "a", 200, "impression", "r3", 1),
        ("w", "b", 200, "impression", "r3", 2),
    ]
    columns = ("user_id", "item_id", "timestamp", "action", "slate_id", "position")
    data = load(
        tmp_path,
        dict(zip(columns, map(list, zip(*log, strict=True)), strict=True)),
        "click",
        "buy",
        heads=(Head("next", "next", 1.0), Head("click", "label", 1.0), Head("buy", "label", 1.0)),
    )
    assert history_of(data) == "cdde"
    assert data.catalogue.vocabulary.actions == ["buy", "click"], "an impression is no action of a history"
    assert data.sequences.users == ["u"], "a user who took nothing has no history"
    assert slates_of(data) == [
        ("u", 1, "abd", [1, 2, 3], [[0, 0, 0], [0, 0, 0], [1, 1, 1]]),
        ("u", 3, "ab", [1, 2], [[0, 0, 0], [0, 0, 0]]),
    ]
    assert data.exposures is not None
    assert data.exposures.ends.tolist() == [3, 3], "the slate r1 ends with its buy"
    assert data.exposures.times.tolist() == [100, 200]


def test_rows_that_are_all_history_have_no_slates_without_a_slate_id(tmp_path: Path) -> None:
    rows = {"user_id": ["u"] * 3, "item_id": list("abc"), "timestamp": [5, 5, 5], "label_buy": [0, 1, 0]}
    assert load(tmp_path, rows, "*").exposures is None
    named = load(tmp_path, rows | {"slate_id": [1, 1, 1]}, "*")
    assert history_of(named) == "abc"
    assert slates_of(named) == [("u", 0, "abc", [0] * 3, [[1, 0], [1, 1], [1, 0]])]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"position": [0, 1, 2, 3]},
            r"1 rows have a position below 1 or no whole number, for example 0; positions count",
        ),
        ({"position": ["1", "", "first", "2.0"]}, r"1 rows have a position .*, such as text or a fraction; positions"),
        ({"position": [1.5, 2.0, None, 3.0]}, r"1 rows have a position .*, such as text or a fraction; positions"),
        ({"slate_id": ["r", "r", "q", None]}, r"no item of a slate was ever taken; .* need the slate_id"),
        ({"timestamp": [1, 1, 2, 3]}, r"no item of a slate was ever taken; .*its timestamp"),
    ],
)
def test_slates_that_cannot_be_meant_are_refused(tmp_path: Path, columns: dict, message: str) -> None:
    rows = {"user_id": ["u"] * 4, "item_id": list("abcd"), "timestamp": [1, 1, 1, 1], "label_buy": [0, 0, 0, 1]}
    with pytest.raises(ValueError, match=message):
        load(tmp_path, rows | columns, "label:buy")


def test_slate_sizes_are_counted_and_long_slates_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = LONGEST + 20
    rows = {
        "user_id": ["u"] * (long + 3) + ["w", "w", "x", "x"],
        "item_id": [f"i{k}" for k in range(long)] + ["i0", "i1", "i2"] + ["i0", "i1"] * 2,
        "timestamp": [10] * long + [5, 20, 20] + [7] * 4,
        "label_buy": [0] * (long - 1) + [1] + [0, 1, 0] + [0] * 4,
    }
    data = load(tmp_path, rows, "label:buy")
    assert data.exposures is not None
    assert np.diff(data.exposures.offsets).tolist() == [LONGEST, 2]
    kept = [data.catalogue.vocabulary.items[row - FIRST_ITEM] for row in data.exposures.items[:LONGEST]]
    assert kept == [*(f"i{k}" for k in range(LONGEST - 1)), f"i{long - 1}"], (
        "the first ones, and the item that was taken"
    )
    printed = capsys.readouterr().out
    assert f"'{SINGLE}': 1" in printed and f"'{CUT}': 1" in printed and f"'{NO_HISTORY}': 2" in printed


def test_slates_of_ordered_rows_need_a_slate_id(tmp_path: Path) -> None:
    rows = {"user_id": ["u"] * 6, "item_id": list("abcabc"), "label_buy": [1, 0, 1, 0, 0, 1]}
    path = tmp_path / "e.parquet"
    tables = TablesConfig(str(path), time_unit="row", history_actions=("label:buy",))
    pl.DataFrame(rows).write_parquet(path)
    with pytest.raises(ValueError, match="shown rows without times need a slate_id"):
        load_data(DataConfig("shop", HEADS), tables)
    pl.DataFrame(rows | {"slate_id": [1, 1, None, 2, 2, 2]}).write_parquet(path)
    data = load_data(DataConfig("shop", HEADS), tables)
    assert slates_of(data) == [
        ("u", 0, "ab", [0, 0], [[1, 1], [0, 0]]),
        ("u", 2, "abc", [0] * 3, [[0, 0], [0, 0], [1, 1]]),
    ]


ROWS = st.lists(
    st.tuples(
        st.sampled_from("uvw"),
        st.sampled_from("abcdef"),
        st.integers(0, 6).map(float),
        st.sampled_from([None, "r", "q"]),
        st.sampled_from([None, 1, 2, 3]),
        st.sampled_from([None, 0.0, 1.0]),
        st.booleans(),
    ),
    max_size=24,
)


@given(ROWS, st.booleans())
@settings(deadline=None, max_examples=150)
def test_slates_equal_a_slow_reference(rows: list[Row], named: bool) -> None:
    rows = sorted(rows, key=lambda row: row[2])
    named &= any(row[3] for row in rows)
    users = sorted({row[0] for row in rows if row[6]})
    index = np.array([users.index(r[0]) if r[0] in users else -1 for r in rows], np.int64)
    items = np.array([ord(row[1]) for row in rows], np.int64)
    schema = {"timestamp": pl.Float64, "slate_id": pl.String, "position": pl.Int64, "label_buy": pl.Float32}
    frame = pl.DataFrame([row[2:6] for row in rows], schema, orient="row")
    taken = pl.Series([row[6] for row in rows], dtype=pl.Boolean)
    expected = reference(rows, named)
    if expected and not any(1.0 in labels for *_, labels in expected):
        with pytest.raises(ValueError, match="no item of a slate was ever taken"):
            build_exposures(frame if named else frame.drop("slate_id"), taken, index, items, HEADS)
        return
    found, _ = build_exposures(frame if named else frame.drop("slate_id"), taken, index, items, HEADS)
    if found is None:
        assert not expected
        return
    slates = [
        (
            users[found.slate_users[s]],
            int(found.history[s]),
            int(found.ends[s]),
            float(found.times[s]),
            [chr(item) for item in found.items[found.offsets[s] : found.offsets[s + 1]]],
            found.positions[found.offsets[s] : found.offsets[s + 1]].tolist(),
            [x for row in found.labels[found.offsets[s] : found.offsets[s + 1]] for x in np.nan_to_num(row, nan=-1)],
        )
        for s in range(len(found))
    ]
    assert sorted(slates) == sorted(expected)
    assert slates == sorted(slates, key=lambda slate: (slate[0], slate[3])), "by user and time"


def reference(rows: list[Row], named: bool) -> list:
    groups = defaultdict(list)
    for place, row in enumerate(rows):
        key = row[3] if named else row[2]
        if key is not None:
            groups[row[0], key].append((place, row))
    slates = []
    for (user, _), members in groups.items():
        if not named and all(row[6] for _, row in members):
            continue
        by_item = defaultdict(list)
        for place, row in members:
            by_item[row[1]].append((place, row))
        times = [row[2] for row in rows if row[0] == user and row[6]]
        if len(by_item) < 2 or not times:
            continue
        merged = []
        for item, same in by_item.items():
            positions = [row[4] for _, row in same if row[4]]
            known = [row[5] for _, row in same if row[5] is not None]
            merged.append(
                (
                    min(positions, default=99),
                    min(place for place, _ in same),
                    item,
                    float(any(row[6] for _, row in same)),
                    max(known, default=-1.0),
                )
            )
        merged.sort()
        first, last = min(row[2] for _, row in members), max(row[2] for _, row in members)
        slates.append(
            (
                user,
                sum(time < first for time in times),
                sum(time <= last for time in times),
                first,
                [item for _, _, item, _, _ in merged],
                [position % 99 for position, *_ in merged],
                [label for *_, taken, buy in merged for label in (taken, buy)],
            )
        )
    return slates


def shop(folder: Path, seed: int, **split: int) -> Data:
    """20 users, each with 12 slates of 3 items at different times, of which one is taken most times."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"i{item}", 100 * slate + user, float(k == choice), f"s{slate}", k + 1)
        for user in range(20)
        for slate in range(12)
        for choice in [rng.integers(4)]
        for k, item in enumerate(rng.permutation(15)[:3])
    ]
    columns = ("user_id", "item_id", "timestamp", "label_buy", "slate_id", "position")
    return load(folder, dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)), "label:buy", **split)


@pytest.mark.parametrize("seed", range(3))
def test_training_slates_hold_nothing_that_is_held_out(tmp_path: Path, seed: int) -> None:
    data = shop(tmp_path, seed, slate_size=3, slate_users=4, validation_users=4, held_out_users=2)
    e, split = data.exposures, data.split
    assert e is not None
    trained = training_slates(e, split.train_lengths)
    assert len(trained) > 80
    assert not np.isin(e.slate_users[trained], split.held_out_users).any()
    for s in trained:
        user = e.slate_users[s]
        begin = data.sequences.offsets[user]
        length = int(split.train_lengths[user])
        last_time = data.sequences.timestamps[begin + length - 1]
        assert e.times[s] <= last_time, "shown before the last training event"
        held_out = set(data.sequences.items[begin + length : data.sequences.offsets[user + 1]])
        times_of_held_out = data.sequences.timestamps[begin + length : data.sequences.offsets[user + 1]]
        assert e.times[s] not in times_of_held_out, f"no slate in which {held_out} was taken"


def test_slate_at_the_time_of_a_held_out_event_is_not_trained(tmp_path: Path) -> None:
    """Dates without hours: the slate of the test event has other rows of the same day."""
    rows = {
        "user_id": ["u"] * 8,
        "item_id": list("abcdefgh"),
        "timestamp": [1, 1, 2, 2, 3, 3, 3, 3],
        "slate_id": list("ppqqrrss"),
        "label_buy": [1, 0, 1, 0, 1, 0, 1, 0],
    }
    data = load(tmp_path, rows, "label:buy")
    assert data.exposures is not None
    assert data.split.train_lengths.tolist() == [2]
    assert training_slates(data.exposures, data.split.train_lengths).tolist() == [0, 1]
