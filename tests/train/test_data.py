"""The data contract: reading tables, unusable rows, and the events that training must not see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slatewise.bundle.features import gap_buckets
from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ACTION, UNKNOWN_ITEM
from slatewise_train.config import DataConfig, Head, TablesConfig
from slatewise_train.data import (
    Data,
    Sequences,
    build_catalogue,
    build_sequences,
    clean_events,
    clean_items,
    count_popularity,
    load_data,
    read_table,
    split_sequences,
    values_of,
)

HEADS = (Head("watch", "next", 1.0), Head("like", "label", 0.5))
CONFIG = DataConfig("shop", HEADS, categorical=("genres",), numeric=("popularity", "price"))


def make_events(rows: list[tuple]) -> pl.DataFrame:
    """Rows of (user, item, time, action, like)."""
    columns = {
        "user_id": pl.String,
        "item_id": pl.String,
        "timestamp": pl.Float64,
        "action": pl.String,
        "label_like": pl.Float64,
    }
    return pl.DataFrame(rows, columns, orient="row")


ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c"],
        "title": ["A", None, "C"],
        "genres": ["Drama|War", None, "War"],
        "price": ["3.5", "cheap", None],
    },
    {"item_id": pl.String, "title": pl.String, "genres": pl.String, "price": pl.String},
)


def same_data(one: Data, other: Data) -> None:
    assert one.sequences.users == other.sequences.users
    assert one.catalogue.vocabulary == other.catalogue.vocabulary
    assert one.bad_rows == other.bad_rows
    for name in ("offsets", "items", "actions", "timestamps", "labels"):
        np.testing.assert_array_equal(getattr(one.sequences, name), getattr(other.sequences, name))
    np.testing.assert_array_equal(one.catalogue.numeric, other.catalogue.numeric)
    for name, values in one.catalogue.field_values.items():
        np.testing.assert_array_equal(values, other.catalogue.field_values[name])


def test_csv_and_parquet_files_give_the_same_data(tmp_path: Path) -> None:
    events = pl.DataFrame(
        {
            "user_id": [7, 7, 8, 7, None],
            "item_id": [1, 2, 9, 3, 1],
            "timestamp": [30.5, 10, 20, 10, 5],
            "action": ["view", None, "buy", "view", "view"],
            "label_like": [1, 0, None, 1, 0],
        }
    )
    items = pl.DataFrame(
        {
            "item_id": [1, 2, 3],
            "title": ["one, two", 'a "quoted" one', None],
            "genres": ["x|y", "", None],
            "price": [1.5, None, 2.0],
        }
    )
    config = DataConfig("shop", HEADS, categorical=("genres",), numeric=("popularity", "price"), max_bad_share=0.5)
    found = []
    for write, suffix in ((pl.DataFrame.write_csv, "csv"), (pl.DataFrame.write_parquet, "parquet")):
        for name, table in (("events", events), ("items", items)):
            write(table, tmp_path / f"{name}.{suffix}")
        found.append(
            load_data(config, TablesConfig(*(str(tmp_path / f"{name}.{suffix}") for name in ("events", "items"))))
        )
    same_data(*found)
    assert found[0].bad_rows == {"missing user_id": 1}
    assert found[0].sequences.users == ["7", "8"]
    assert found[0].catalogue.vocabulary.items == ["1", "2", "3", "9"]


def test_read_table_with_another_suffix_raises(tmp_path: Path) -> None:
    (tmp_path / "events.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"events\.json: not a known kind of file; a table is \.parquet, \.csv or \.tsv"
    ):
        read_table(tmp_path / "events.json")


def test_clean_events_counts_unusable_rows_by_reason() -> None:
    rows = [
        ("u", "a", 1.0, None, 1.0),
        (None, None, None, None, 7.0),  # counted once, by its first fault
        ("", "a", 1.0, None, 1.0),
        ("u", None, 1.0, None, 1.0),
        ("u", "", 1.0, None, None),
        ("u", "a", None, None, 0.0),
        ("u", "a", float("nan"), None, 0.0),
        ("u", "a", float("inf"), None, 0.0),
        ("u", "a", -1.0, None, 0.0),
        ("u", "a", 2.0, None, 0.5),
        ("u", "a", 2.0, None, float("inf")),
        ("u", "b", 0.0, None, None),
    ]
    kept, bad = clean_events(make_events(rows), 1.0)
    assert bad == {"missing user_id": 2, "missing item_id": 2, "bad timestamp": 4, "label not 0 or 1": 2}
    assert kept["item_id"].to_list() == ["b", "a"]
    assert kept["label_like"].to_list() == [None, 1.0]


@pytest.mark.parametrize("time", ["noon", "", "-1", "NaN", "nan", "inf", "-inf", "1e999"])
def test_clean_events_drops_a_row_with_an_invalid_time(tmp_path: Path, time: str) -> None:
    (tmp_path / "events.csv").write_text(f"user_id,item_id,timestamp\nu,a,{time}\nu,b,1.5\n")
    kept, bad = clean_events(read_table(tmp_path / "events.csv"), 1.0)
    assert bad == {"bad timestamp": 1}
    assert kept["item_id"].to_list() == ["b"]


@pytest.mark.parametrize("label", ["2", "-1", "0.5", "inf", "yes"])
def test_clean_events_drops_a_row_with_an_invalid_label(tmp_path: Path, label: str) -> None:
    (tmp_path / "events.csv").write_text(f"user_id,item_id,timestamp,label_like\nu,a,1,{label}\nu,b,2,1\nu,c,3,\n")
    kept, bad = clean_events(read_table(tmp_path / "events.csv"), 1.0)
    assert bad == {"label not 0 or 1": 1}
    assert kept["label_like"].to_list() == [1.0, None]


def test_clean_events_raises_if_too_many_rows_are_unusable() -> None:
    events = make_events([("u", "a", float(t), None, None) for t in range(3)] + [("u", None, 1.0, None, None)])
    with pytest.raises(ValueError, match=r"25\.0% of 4 rows .* limit 24\.0%.*missing item_id"):
        clean_events(events, 0.24)
    assert len(clean_events(events, 0.25)[0]) == 3


@pytest.mark.parametrize("name", ["user_id", "item_id", "timestamp"])
def test_clean_events_names_a_missing_column(name: str) -> None:
    with pytest.raises(ValueError, match=f"no column {name}"):
        clean_events(make_events([("u", "a", 1.0, None, None)]).drop(name), 1.0)


@given(st.lists(st.tuples(st.sampled_from("uv"), st.integers(0, 3)), max_size=40))
@settings(max_examples=40, deadline=None)
def test_sequences_are_in_time_order_ties_in_input_order(drawn: list[tuple[str, int]]) -> None:
    events, _ = clean_events(
        make_events([(user, str(k), float(time), None, None) for k, (user, time) in enumerate(drawn)]), 0.0
    )
    catalogue = build_catalogue(ITEMS.clear(), events, CONFIG)
    sequences = build_sequences(events, catalogue.vocabulary, CONFIG)
    found = {}
    for u, user in enumerate(sequences.users):
        rows = sequences.items[sequences.offsets[u] : sequences.offsets[u + 1]]
        found[user] = [int(catalogue.vocabulary.items[row - FIRST_ITEM]) for row in rows]
    expected = {
        user: sorted((k for k, (u, _) in enumerate(drawn) if u == user), key=lambda k: (drawn[k][1], k))
        for user in {u for u, _ in drawn}
    }
    assert found == expected


def test_catalogue_has_lists_of_values_and_unlisted_items() -> None:
    events = make_events([("u", "z", 1.0, "view", None), ("u", "b", 2.0, "buy", None), ("u", "z", 3.0, None, None)])
    catalogue = build_catalogue(ITEMS, events, CONFIG)
    assert catalogue.vocabulary.items == ["a", "b", "c", "z"]
    assert catalogue.vocabulary.actions == ["buy", "view"]
    assert catalogue.vocabulary.fields == {"genres": ["Drama", "War"]}
    np.testing.assert_array_equal(catalogue.field_values["genres"], [[0, 0], [0, 0], [1, 2], [0, 0], [2, 0], [0, 0]])
    np.testing.assert_array_equal(
        catalogue.numeric[FIRST_ITEM:, 1], np.array([3.5, np.nan, np.nan, np.nan], np.float32)
    )
    assert np.isnan(catalogue.numeric[:FIRST_ITEM]).all()


def test_clean_items_drops_duplicate_and_missing_ids() -> None:
    items = pl.DataFrame(
        {"item_id": ["a", None, "a", ""], "title": ["first", "none", "second", "empty"], "genres": ["x", "y", "z", "y"]}
    )
    config = DataConfig("shop", HEADS, categorical=("genres",))
    clean, bad = clean_items(items, config)
    assert bad == {"items: missing item_id": 2, "items: duplicate item_id": 1}
    vocabulary = build_catalogue(clean, make_events([]), config).vocabulary
    assert vocabulary.items == ["a"] and vocabulary.fields == {"genres": ["x"]}


def test_clean_items_counts_invalid_numbers_as_missing() -> None:
    config = DataConfig("shop", HEADS, numeric=("price", "popularity"))
    items, bad = clean_items(pl.DataFrame({"item_id": ["a", "b", "c"], "price": ["1.5", "cheap", None]}), config)
    assert bad == {"items: price is not a number": 1}
    numeric = build_catalogue(items, make_events([]), config).numeric[FIRST_ITEM:, 0]
    np.testing.assert_array_equal(numeric, np.array([1.5, np.nan, np.nan], np.float32))
    with pytest.raises(ValueError, match="no column price"):
        clean_items(pl.DataFrame({"item_id": ["a"]}), config)


def test_list_column_and_separated_text_have_equal_values() -> None:
    lists = pl.Series("genres", [["x", "y"], None, [], ["y"]], dtype=pl.List(pl.String))
    assert values_of(lists) == values_of(pl.Series("genres", ["x|y", None, "", "y"])) == [["x", "y"], [], [], ["y"]]


def test_catalogue_converts_numeric_actions_to_text() -> None:
    events = pl.DataFrame({"user_id": [1], "item_id": ["a"], "timestamp": [1.0], "action": [7]})
    clean, _ = clean_events(events, 0.0)
    assert build_catalogue(ITEMS, clean, CONFIG).vocabulary.actions == ["7"]


def test_sequences_include_events_of_unknown_items() -> None:
    known = build_catalogue(ITEMS, make_events([("u", "a", 1.0, "view", None)]), CONFIG).vocabulary
    events = make_events([("u", "a", 1.0, "view", 1.0), ("u", "new", 2.0, "stare", 0.0), ("u", "c", 3.0, None, None)])
    sequences = build_sequences(events, known, CONFIG)
    assert sequences.items.tolist() == [FIRST_ITEM, UNKNOWN_ITEM, FIRST_ITEM + 2]
    assert sequences.actions.tolist() == [1, UNKNOWN_ACTION, UNKNOWN_ACTION]
    np.testing.assert_array_equal(sequences.labels, np.array([[1, 1], [1, 0], [1, np.nan]], np.float32))


@given(
    rows=st.lists(
        st.tuples(st.sampled_from("uvw"), st.sampled_from("abc"), st.integers(0, 9)), max_size=30, unique=True
    ),
    first=st.integers(0, 5),
    n=st.integers(0, 5),
)
@settings(max_examples=30, deadline=None)
def test_window_has_the_users_events_and_a_first_gap(rows: list[tuple[str, str, int]], first: int, n: int) -> None:
    events, _ = clean_events(make_events([(u, i, float(t), None, None) for u, i, t in rows]), 0.0)
    sequences = build_sequences(events, build_catalogue(ITEMS, events, CONFIG).vocabulary, CONFIG)
    assert len(sequences) == len({u for u, _, _ in rows})
    for user, name in enumerate(sequences.users):
        mine = sorted((t, k) for k, (u, _, t) in enumerate(rows) if u == name)
        last = min(first + n, len(mine))
        if first > last:
            continue
        items, _, gaps, labels = sequences.of(user, first, last)
        assert items.tolist() == ["abc".index(rows[k][1]) + FIRST_ITEM for _, k in mine[first:last]]
        np.testing.assert_array_equal(gaps, gap_buckets(np.array([float(t) for t, _ in mine[first:last]])))
        assert labels.shape == (last - first, 2)


def make_sequences(lengths: list[int]) -> Sequences:
    """Every event has an item of its own."""
    total = sum(lengths)
    rows = np.arange(total, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Sequences(
        [str(u) for u in range(len(lengths))],
        offsets,
        rows + FIRST_ITEM,
        0 * rows,
        rows.astype(float),
        np.ones((total, 2), np.float32),
    )


@given(
    lengths=st.lists(st.integers(1, 30), max_size=12),
    size=st.integers(1, 8),
    slate_users=st.integers(0, 4),
    validation_users=st.integers(0, 4),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_leave_one_out_split_excludes_held_out_events(
    lengths: list[int], size: int, slate_users: int, validation_users: int, seed: int
) -> None:
    config = DataConfig(
        "shop", HEADS, slate_size=size, slate_users=slate_users, validation_users=validation_users, seed=seed
    )
    split = split_sequences(make_sequences(lengths), config)
    slated = set(split.slate_users.tolist())
    validated = set(split.validation_users.tolist())
    assert not slated & validated
    before = min(size, 5)
    long_enough = sum(n >= size + before + 1 for n in lengths)
    assert len(slated) == min(slate_users, long_enough)
    assert len(validated) == min(validation_users, long_enough - len(slated))
    for user, n in enumerate(lengths):
        held_out = size if user in slated else size + 1 if user in validated else 1 + (user in split.next_users)
        assert split.train_lengths[user] == n - held_out
        if user in slated | validated:
            assert split.train_lengths[user] >= before, "a history is left before a held-out slate"


@given(
    times=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=40), min_size=1, max_size=8),
    split_at=st.integers(0, 41),
    size=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_time_split_trains_before_and_tests_after_a_time(times: list[list[int]], split_at: int, size: int) -> None:
    config = DataConfig(
        "shop", HEADS, kind="time", test_from=split_at, slate_size=size, slate_users=2, validation_users=2
    )
    events = make_events([(f"u{u}", "a", float(t), None, None) for u, column in enumerate(times) for t in column])
    sequences = build_sequences(events, build_catalogue(ITEMS, events, CONFIG).vocabulary, CONFIG)
    split = split_sequences(sequences, config)
    for user in range(len(sequences)):
        mine = sequences.timestamps[sequences.offsets[user] : sequences.offsets[user + 1]]
        before = int((mine < split_at).sum())
        assert split.test_lengths[user] == (before if before < len(mine) else 0)
        single = int(user in split.next_users)
        assert split.train_lengths[user] == before - (size if user in split.validation_users else single) >= 0
        if user in split.slate_users:
            assert len(mine) - before >= size, "a whole slate comes after"


def test_split_held_out_users_depend_on_seed() -> None:
    sequences = make_sequences([30] * 40)
    drawn = [
        split_sequences(sequences, DataConfig("shop", HEADS, slate_users=5, validation_users=5, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0].slate_users.tolist() == drawn[1].slate_users.tolist() != drawn[2].slate_users.tolist()
    assert (
        drawn[0].validation_users.tolist() == drawn[1].validation_users.tolist() != drawn[2].validation_users.tolist()
    )


def test_popularity_counts_training_events_only() -> None:
    rows = [
        ("u", "a", 1.0, None, None),
        ("v", "a", 1.0, None, None),
        ("v", "b", 2.0, None, None),
        ("u", "c", 3.0, None, None),
        ("v", "c", 4.0, None, None),
    ]
    events = make_events(rows)
    catalogue = build_catalogue(ITEMS, events, CONFIG)
    sequences = build_sequences(events, catalogue.vocabulary, CONFIG)
    count_popularity(catalogue, sequences, split_sequences(sequences, CONFIG), CONFIG)
    np.testing.assert_allclose(
        catalogue.numeric[FIRST_ITEM:, 0], np.log10([3, 2, 1]), rtol=1e-6
    )  # c is the last event of every user


def test_popularity_column_of_the_items_is_not_replaced() -> None:
    events = make_events([("u", "a", 1.0, None, None), ("u", "a", 2.0, None, None)])
    catalogue = build_catalogue(ITEMS.with_columns(popularity=pl.Series([7.0, 8.0, None])), events, CONFIG)
    sequences = build_sequences(events, catalogue.vocabulary, CONFIG)
    count_popularity(catalogue, sequences, split_sequences(sequences, CONFIG), CONFIG)
    np.testing.assert_array_equal(catalogue.numeric[FIRST_ITEM:, 0], np.array([7, 8, np.nan], np.float32))
