"""Every kind of file that people bring: read right, or refused with file, place, example and remedy."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from slatewise.bundle.features import split_values
from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import make_batch
from slatewise_train.config import DataConfig, Head, TablesConfig
from slatewise_train.data import Data, build_catalogue, build_sequences, load_data
from slatewise_train.tables.events import read_events
from slatewise_train.tables.items import clean_items, read_items

NEXT = (Head("next", "next", 1.0),)
CONFIG = DataConfig("shop", NEXT)
START = 1_700_000_000
USERS = ["u", "v", "u", "v", "u"]
ITEMS = ["b", "a", "a", "c", "c"]
TIMES = [START + 60 * k for k in (4, 0, 2, 3, 1)]
ROWS = "\n".join(f"{u},{i},{t}" for u, i, t in zip(USERS, ITEMS, TIMES))
CSV = f"user_id,item_id,timestamp\n{ROWS}\n"


def frame(**columns: Any) -> pl.DataFrame:
    return pl.DataFrame({"user_id": USERS, "item_id": ITEMS, "timestamp": TIMES} | columns)


def load(events: Path | str, config: DataConfig = CONFIG, **tables: Any) -> Data:
    return load_data(config, TablesConfig(str(events), **tables))


def events_of(data: Data) -> list[tuple[str, str, float]]:
    """User, item and time of every event, user by user."""
    s = data.sequences
    users = np.repeat(np.arange(len(s)), np.diff(s.offsets))
    names = data.catalogue.vocabulary.items
    return [(s.users[u], names[i - FIRST_ITEM], t) for u, i, t in zip(users, s.items, s.timestamps.tolist())]


EXPECTED = [(u, i, t) for u in "vu" for t, own, i in sorted(zip(map(float, TIMES), USERS, ITEMS)) if own == u]


def zst(content: bytes) -> bytes:
    """A file of zstd, stored without compression: magic, frame header with the size of the content, one raw block."""
    header = bytes([0xA0]) + len(content).to_bytes(4, "little")
    return b"\x28\xb5\x2f\xfd" + header + (1 | len(content) << 3).to_bytes(3, "little") + content


FILES: dict[str, bytes] = {
    "plain.csv": CSV.encode(),
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "crlf.csv": CSV.replace("\n", "\r\n").encode(),
    "bom_crlf.csv": b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(),
    "no_last_line_end.csv": CSV.rstrip().encode(),
    "blank_lines.csv": CSV.replace("\n", "\n\n").encode(),
    "tabs.tsv": CSV.replace(",", "\t").encode(),
    "tabs.csv": CSV.replace(",", "\t").encode(),
    "semicolons.csv": CSV.replace(",", ";").encode(),
    "bars.txt": CSV.replace(",", "|").encode(),
    "spaces.csv": CSV.replace(",", " , ")
    .replace(" , ", ", ", 2)
    .replace("user_id, item_id, ", "user_id,item_id,")
    .encode(),
    "quoted.csv": "".join(",".join(f'"{field}"' for field in line.split(",")) + "\n" for line in CSV.split()).encode(),
    "gzip.csv.gz": gzip.compress(CSV.encode()),
    "gzip.tsv.gz": gzip.compress(CSV.replace(",", "\t").encode()),
    "zst.csv.zst": zst(CSV.encode()),
    "not_compressed.csv.zst": CSV.encode(),
    "zst_tabs.tsv.zst": zst(b"\xef\xbb\xbf" + CSV.replace(",", "\t").encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_text_file_of_every_kind_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    data = load(tmp_path / name)
    assert events_of(data) == EXPECTED and data.bad_rows == {}


def test_separator_of_the_header_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.csv").write_text(CSV.replace(",", "\t"))
    load(tmp_path / "e.csv")
    assert f"{tmp_path}/e.csv: columns are separated by tabs" in capsys.readouterr().out


def test_separator_of_the_toml_is_used(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(CSV.replace(",", ":"))
    with pytest.raises(ValueError, match=r"e\.csv: no column user_id, item_id, .*if they stand in one, set separator"):
        load(tmp_path / "e.csv")
    assert events_of(load(tmp_path / "e.csv", separator=":")) == EXPECTED


def test_quoted_fields_keep_line_ends_and_separators(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text('user_id,item_id,timestamp\n"u\n1","a, ""x""",1\n"u\n1",b,2\n"u\n1",b,3\n')
    assert events_of(load(tmp_path / "e.csv")) == [("u\n1", 'a, "x"', 1.0), ("u\n1", "b", 2.0), ("u\n1", "b", 3.0)]


def write_spark(folder: Path) -> Path:
    """Three parts of a Spark job with its other files."""
    root = folder / "events.parquet"
    root.mkdir()
    for k, part in enumerate((frame()[:2], frame()[2:2], frame()[2:])):
        part.write_parquet(root / f"part-0000{k}-c000.snappy.parquet")
        (root / f".part-0000{k}-c000.snappy.parquet.crc").write_bytes(b"crc")
    (root / "_SUCCESS").touch()
    return root


def write_partitions(folder: Path) -> Path:
    """Folders that name a column: ids with leading zeros, a value with an escape, and one that is missing."""
    for user in ("u", "v"):
        own = frame().filter(pl.col("user_id") == user)
        place = folder / "events" / "day=2026-01-31" / f"user_id={'%75' if user == 'u' else 'v'}"
        place.mkdir(parents=True)
        own.drop("user_id").write_parquet(place / "0.parquet")
    return folder / "events"


def write_pattern(folder: Path) -> str:
    for k, part in enumerate((frame()[:2], frame()[2:])):
        part.write_csv(folder / f"events-{k}.csv")
    (folder / "other.csv").write_text("a,b\n1,2\n")
    return str(folder / "events-*.csv")


def write_hive(folder: Path) -> Path:
    """A Parquet file without a suffix."""
    (folder / "warehouse").mkdir()
    frame().write_parquet(folder / "warehouse" / "000000_0")
    return folder / "warehouse"


@pytest.mark.parametrize("write", [write_spark, write_partitions, write_pattern, write_hive])
def test_folder_or_pattern_of_files_is_one_table(tmp_path: Path, write: Callable[[Path], Path | str]) -> None:
    data = load(write(tmp_path))
    assert sorted(events_of(data)) == sorted(EXPECTED) and data.bad_rows == {}


def test_partition_values_keep_leading_zeros(tmp_path: Path) -> None:
    place = tmp_path / "events" / "user_id=007"
    place.mkdir(parents=True)
    frame().drop("user_id").write_parquet(place / "0.parquet")
    assert load(tmp_path / "events").sequences.users == ["007"]


def test_files_of_a_folder_may_have_other_types(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    pl.DataFrame({"user_id": [1, 1], "item_id": [7, 8], "timestamp": [1, 2]}).write_parquet(
        tmp_path / "e" / "0.parquet"
    )
    text = {"user_id": ["1"], "item_id": ["x"], "timestamp": [3.0], "action": ["buy"]}
    pl.DataFrame(text).write_parquet(tmp_path / "e" / "1.parquet")
    data = load(tmp_path / "e")
    assert events_of(data) == [("1", "7", 1.0), ("1", "8", 2.0), ("1", "x", 3.0)]
    assert data.sequences.actions.tolist() == [0, 0, 1]


def test_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "e.csv").write_text(CSV)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert events_of(load("~/e.csv")) == EXPECTED


@pytest.mark.parametrize(
    "place", ["s3://bucket/events.parquet", "gs://b/e/*.csv", "https://x.org/e.csv", "abfss://c@a/e"]
)
def test_address_of_another_machine_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="only files of this machine are read; copy the table to it first"):
        load(place)


REFUSED_FILES = {
    "absent.csv": (None, r"no such file or folder"),
    "events.json": (b"{}", r"not a known kind of file; a table is \.parquet, \.csv or \.tsv"),
    "events.csv.zip": (b"PK", r"not a known kind of file"),
    "events.parquet.gz": (b"", r"not a known kind of file"),
    "empty.csv": (b"", r"empty\.csv: the file is empty"),
    "empty.parquet": (b"", r"empty\.parquet: not a readable Parquet file: .*write the file again"),
    "cut.parquet": (b"PAR1....", r"cut\.parquet: not a readable Parquet file"),
    "cut.csv.gz": (gzip.compress(CSV.encode() * 999)[:100], r"cut\.csv\.gz: cannot be "),
    "not.csv.gz": (CSV.encode(), r"not\.csv\.gz: cannot be decompressed"),
    "utf16.csv": (CSV.encode("utf-16"), r"utf16\.csv: the text is UTF-16; save the file as UTF-8"),
    "latin.csv": (CSV.replace("c", "\xe9", 1).encode("latin-1"), r"latin\.csv: line 5: byte 3 is not UTF-8"),
    "latin2.csv": (CSV.encode() + b"u,\xe9,7\n", r"latin2\.csv: line 7: byte 3 is not UTF-8; save the file as UTF-8"),
    "mac.csv": (CSV.replace("\n", "\r").encode(), r"mac\.csv: lines end in CR alone"),
    "more.csv": (CSV.encode() + b"u,a,7,8\n", r"more\.csv: line 7: 4 fields where the header has 3"),
    "open.csv": (CSV.encode() + b'u,"a,7\n', r"open\.csv: line 7: unexpected end of data"),
    "inner.csv": (CSV.encode() + b'u,5" tube,7\n', r"inner\.csv: line 7: a quote inside a field without quotes"),
    "twice.csv": (b"user_id,item_id,user_id,timestamp\nu,a,v,1\n", r"two columns have the name 'user_id'"),
    "headless.csv": (b"1,2,3\n4,5,6\n", r"the first line must have the names of the columns"),
    "other.csv": (
        b"userId,movieId,ts\n4,5,6\n",
        r"found: 'userId', 'movieId', 'ts'; name yours .* user_id = \"userId\"",
    ),
    "timeless.csv": (b"user_id,item_id\nu,a\n", r'no column timestamp; .*set time_unit = "row" in \[data\]'),
    "renamed.csv": (b"user_id,item_id,ts\nu,a,1\n", r'no column timestamp; .*set timestamp = "ts" in \[columns\]'),
    "no_rows.csv": (b"user_id,item_id,timestamp\n", r"no_rows\.csv: the table has no rows"),
    "gz.csv": (gzip.compress(CSV.encode()), r"gz\.csv: the content is compressed by gzip; name it \.csv\.gz"),
    "zstd.csv": (zst(CSV.encode()), r"zstd\.csv: the content is compressed by zstd"),
    "parquet.csv": (b"PAR1...", r"parquet\.csv: the content is Parquet; name it \.parquet"),
    "sheet.csv": (b"PK\x03\x04...", r"sheet\.csv: the content is a zip archive or a spreadsheet"),
    "clock.csv": (
        b"user_id,item_id,timestamp\nu,a,20260131123000\nu,b,20260131235959\n",
        r"clock\.csv: timestamp 20260131123000 looks like a date; write it as",
    ),
    "minutes.csv": (b"user_id,item_id,timestamp\nu,a,202601311230\n", r"timestamp 202601311230 looks like a date"),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_file_that_is_no_table_is_refused_with_its_remedy(tmp_path: Path, name: str) -> None:
    content, message = REFUSED_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(ValueError, match="the folder has no table"):
        load(tmp_path)
    (tmp_path / "a.csv").write_text(CSV)
    frame().write_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="files of several kinds, such as Parquet and CSV"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file has such a name"):
        load(tmp_path / "x*.csv")


def test_each_file_may_write_its_times_differently(tmp_path: Path) -> None:
    """A log changed from seconds to ISO 8601, and later to a type of time."""
    text = [datetime.fromtimestamp(t, UTC).isoformat() for t in TIMES]
    frame()[:2].write_csv(tmp_path / "1.csv")
    frame(timestamp=text)[2:].write_csv(tmp_path / "2.csv")
    assert events_of(load(tmp_path)) == EXPECTED
    (tmp_path / "1.csv").rename(tmp_path / "3.csv")
    assert events_of(load(tmp_path)) == EXPECTED


def test_ids_of_both_tables_join_if_one_has_float_ends(tmp_path: Path) -> None:
    """Other text among the ids keeps the end `.0`; the other table tells what is meant."""
    config = DataConfig("shop", NEXT, categorical=("kind",))
    wrong, right = ["1.0", "2.0", "x"], ["1", "2", "x"]
    for k, (events, items) in enumerate([(right, wrong), (wrong, right), (["1.0", "2.0", "1.0"], wrong)]):
        rows = {"user_id": ["u"] * 4, "item_id": [*events, events[0]], "timestamp": range(4)}
        pl.DataFrame(rows).write_csv(tmp_path / f"e{k}.csv")
        pl.DataFrame({"item_id": items, "kind": ["a", "b", "c"]}).write_csv(tmp_path / f"i{k}.csv")
        data = load(tmp_path / f"e{k}.csv", config, items=str(tmp_path / f"i{k}.csv"))
        assert data.catalogue.vocabulary.items == right, "three items in all"


def test_ids_with_a_true_float_end_stay(tmp_path: Path) -> None:
    rows = {"user_id": ["u"] * 3, "item_id": ["v1.0", "2.0", "x"], "timestamp": range(3)}
    pl.DataFrame(rows).write_csv(tmp_path / "e.csv")
    pl.DataFrame({"item_id": ["2.0", "x"]}).write_csv(tmp_path / "i.csv")
    data = load(tmp_path / "e.csv", items=str(tmp_path / "i.csv"))
    assert sorted(data.catalogue.vocabulary.items) == ["2.0", "v1.0", "x"]


def test_white_space_around_values_is_removed(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(CSV)
    (tmp_path / "i.csv").write_text("item_id,kind\na,Drama | Comedy\nb,Comedy|\nc, Drama\n")
    data = load(tmp_path / "e.csv", DataConfig("shop", NEXT, categorical=("kind",)), items=str(tmp_path / "i.csv"))
    assert data.catalogue.vocabulary.fields["kind"] == ["Comedy", "Drama"]
    assert data.catalogue.field_values["kind"][FIRST_ITEM:].tolist() == [[2, 1], [1, 0], [2, 0]]
    assert split_values(["Drama | Comedy", " Drama"], {"Drama", "Comedy"}) == ["Drama", "Comedy", "Drama"]
    assert split_values(["a| b", "a | b"], {"a| b", " b"}) == ["a| b", "a", " b"], "as the bundle writes them"


MOMENTS = [datetime.fromtimestamp(t, UTC) for t in TIMES]
TYPED_TIMES: dict[str, pl.Series] = {
    **{f"{unit}": pl.Series(MOMENTS).dt.replace_time_zone(None).cast(pl.Datetime(unit)) for unit in ("ns", "us", "ms")},
    **{
        f"{unit} with a zone": pl.Series(MOMENTS).cast(pl.Datetime(unit, "UTC")).dt.convert_time_zone("Asia/Tokyo")
        for unit in ("ns", "us", "ms")
    },
    "iso": pl.Series([m.strftime("%Y-%m-%dT%H:%M:%SZ") for m in MOMENTS]),
    "iso with a space": pl.Series([m.strftime("%Y-%m-%d %H:%M:%S") for m in MOMENTS]),
    "iso with a zone": pl.Series(
        [datetime.fromtimestamp(t + 7200, UTC).strftime("%Y-%m-%dT%H:%M:%S+02:00") for t in TIMES]
    ),
    "iso of BigQuery": pl.Series([m.strftime("%Y-%m-%d %H:%M:%S.000000 UTC") for m in MOMENTS]),
    "float": pl.Series([float(t) for t in TIMES]),
    "decimal": pl.Series([Decimal(t) for t in TIMES]),
    "text": pl.Series([str(t) for t in TIMES]),
    "text of a float": pl.Series([f"{t}.0" for t in TIMES]),
    "int32": pl.Series(TIMES, dtype=pl.Int32),
    "categorical": pl.Series([str(t) for t in TIMES]).cast(pl.Categorical),
}


@pytest.mark.parametrize("name", TYPED_TIMES)
def test_times_of_every_type_are_seconds(tmp_path: Path, name: str) -> None:
    frame(timestamp=TYPED_TIMES[name]).write_parquet(tmp_path / "e.parquet")
    assert events_of(load(tmp_path / "e.parquet")) == EXPECTED


@pytest.mark.parametrize(("unit", "factor"), [("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_other_units_are_refused_or_converted(tmp_path: Path, unit: str, factor: int) -> None:
    frame(timestamp=[t * factor for t in TIMES]).write_csv(tmp_path / "e.csv")
    with pytest.raises(ValueError, match=f'looks like .*seconds, not seconds; set time_unit = "{unit}" in'):
        load(tmp_path / "e.csv")
    assert events_of(load(tmp_path / "e.csv", time_unit=unit)) == EXPECTED
    frame().write_csv(tmp_path / "e.csv")
    with pytest.raises(ValueError, match=r'looks like seconds, not .*; set time_unit = "s"'):
        load(tmp_path / "e.csv", time_unit=unit)


def test_dates_are_midnights_and_keep_their_order(tmp_path: Path) -> None:
    days = [date(2026, 1, 2), date(2026, 1, 1), date(2026, 1, 1), date(2026, 1, 1), date(2026, 1, 1)]
    frame(timestamp=days).write_parquet(tmp_path / "e.parquet")
    frame(timestamp=[str(day) for day in days]).write_csv(tmp_path / "e.csv")
    first = float(datetime(2026, 1, 1, tzinfo=UTC).timestamp())
    found = [events_of(load(tmp_path / name)) for name in ("e.parquet", "e.csv")]
    assert found[0] == found[1]
    assert [(u, i, t - first) for u, i, t in found[0]] == [
        ("v", "a", 0),
        ("v", "c", 0),
        ("u", "a", 0),
        ("u", "c", 0),
        ("u", "b", 86_400),
    ]


def test_equal_times_give_the_same_sequences_twice(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 40, 3000), rng.permutation(3000)
    columns = {"user_id": users, "item_id": items, "timestamp": 86_400 * rng.integers(0, 3, 3000)}
    pl.DataFrame(columns).write_parquet(tmp_path / "e.parquet", row_group_size=100)
    found = [events_of(load(tmp_path / "e.parquet")) for _ in range(2)]
    order = sorted(range(3000), key=lambda k: (columns["timestamp"][k], k))
    first = {u: k for k, u in reversed(list(enumerate(users[order].tolist())))}
    expected = sorted(order, key=lambda k: first[int(users[k])])
    assert found[0] == found[1]
    assert [(u, i) for u, i, _ in found[0]] == [(str(users[k]), str(items[k])) for k in expected]


def test_dates_as_numbers_are_refused(tmp_path: Path) -> None:
    frame(timestamp=[20260131, 20260201, 20251231, 20260110, 20260111]).write_csv(tmp_path / "e.csv")
    with pytest.raises(ValueError, match="timestamp 20260131 looks like a date; write it as 2026-01-31"):
        load(tmp_path / "e.csv")


def test_times_of_another_form_are_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text('user_id,item_id,timestamp\n"u\n1",a,1\nu,b,31/01/2026\n')
    message = (
        r"e\.csv: 50\.0% of 2 rows .*bad timestamp 1; the first is .*e\.csv, line 4, column timestamp: '31/01/2026';"
    )
    with pytest.raises(ValueError, match=message + r" write unix seconds .*ISO 8601"):
        load(tmp_path / "e.csv")


def test_order_of_the_rows_is_enough(tmp_path: Path) -> None:
    frame().drop("timestamp").write_csv(tmp_path / "e.csv")
    data = load(tmp_path / "e.csv", time_unit="row")
    assert [(u, i) for u, i, _ in events_of(data)] == [(u, i) for own in "uv" for u, i in zip(USERS, ITEMS) if u == own]
    assert np.isnan(data.sequences.timestamps).all()
    batch = make_batch(data.sequences, [(0, 0, 3), (1, 0, 2)])
    assert batch.gaps.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]], "a gap with a missing time has the bucket 0"
    assert batch.contexts.isfinite().all()
    with pytest.raises(ValueError, match=r'kind = "time" needs times'):
        load(tmp_path / "e.csv", DataConfig("shop", NEXT, kind="time", test_from=5.0), time_unit="row")


IDS: dict[str, tuple[pl.Series, list[str]]] = {
    "leading zeros": (pl.Series(["007", "7", "07"]), ["007", "7", "07"]),
    "integers": (pl.Series([7, -1, 0]), ["7", "-1", "0"]),
    "large integers": (pl.Series([2**64 - 1, 2**63, 1], dtype=pl.UInt64), [str(2**64 - 1), str(2**63), "1"]),
    "floats": (pl.Series([1.0, 2.0, 2.0**53]), ["1", "2", str(2**53)]),
    "text of floats": (pl.Series(["1.0", "2.0", "10.0"]), ["1", "2", "10"]),
    "integers and floats": (pl.Series(["1", "1.0", "3.0"]), ["1", "1", "3"]),
    "versions": (pl.Series(["1.0", "1.5", "2.0"]), ["1.0", "1.5", "2.0"]),
    "decimals": (pl.Series([Decimal(1), Decimal(2), Decimal(10)]), ["1", "2", "10"]),
    "decimals with places": (pl.Series([Decimal("1.00"), Decimal("2.00"), Decimal("10.00")]), ["1", "2", "10"]),
    "Unicode": (pl.Series(["é", "e\u0301", "日本 🎁"]), ["é", "e\u0301", "日本 🎁"]),
    "categories": (pl.Series(["x", "y", "x"]).cast(pl.Categorical), ["x", "y", "x"]),
    "enum": (pl.Series(["x", "y", "x"]).cast(pl.Enum(["y", "x"])), ["x", "y", "x"]),
    "bytes": (pl.Series([b"x", b"y", b"z"]), ["x", "y", "z"]),
    "booleans": (pl.Series([True, False, True]), ["true", "false", "true"]),
    "longest": (pl.Series(["é" * 256, "b", "c"]), ["é" * 256, "b", "c"]),
    "numbers with an exponent": (pl.Series(["1e5", "x", "2"]), ["1e5", "x", "2"]),
}


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize("name", IDS)
def test_ids_of_every_type_are_text(tmp_path: Path, name: str, column: str) -> None:
    given, expected = IDS[name]
    columns = {"user_id": ["u"] * 3, "item_id": ["i"] * 3, "timestamp": [1, 2, 3]}
    pl.DataFrame(columns | {column: given}).write_parquet(tmp_path / "e.parquet")
    events, bad = read_events(TablesConfig(str(tmp_path / "e.parquet")), 0.0)
    assert events[column].cast(pl.String).to_list() == expected and not bad


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (pl.Series(["1", "1.0", "x"]), r"item_id has both '1' and '1\.0'; write the ids of one item or user alike"),
        (pl.Series([1.0, 1e16, 2.0]), r"item_id '1e\+16' is a number with lost digits"),
        (
            pl.Series(["9007199254740994.0", "1.0", "2.0"]),
            r"item_id '9007199254740994\.0' is a number with lost digits",
        ),
        (pl.Series([["a"], ["b"], ["c"]]), r"column item_id has the type List\(String\); write its values as text"),
        (pl.Series([{"a": 1}] * 3), r"column item_id has the type Struct"),
        (
            pl.Series(["x" * 257, "b", "c"]),
            r"item_id too long 1; .* \(257 characters\); an id has at most 256 characters",
        ),
        (pl.Series([b"\xff", b"b", b"c"]), r"e\.parquet: not a readable Parquet file: invalid utf8|invalid utf8"),
        (pl.Series([None, "b", "c"]), r"missing item_id 1; the first is .*row 1, column item_id: no value; every row"),
    ],
)
def test_ids_that_are_in_doubt_are_refused(tmp_path: Path, given: pl.Series, message: str) -> None:
    columns = {"user_id": ["u"] * 3, "item_id": given, "timestamp": [1, 2, 3]}
    pl.DataFrame(columns).write_parquet(tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "e.parquet")


def test_empty_actions_are_missing_and_duplicates_merge(tmp_path: Path) -> None:
    rows = 'u,a,1,buy\nu,a,1,buy\nu,a,1,view\nu,b,2,\nu,c,3,""\nu,c,4, \n'
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp,action\n" + rows)
    data = load(tmp_path / "e.csv")
    assert data.bad_rows == {"duplicate row": 1}
    assert data.catalogue.vocabulary.actions == ["buy", "view"]
    assert data.sequences.actions.tolist() == [1, 2, 0, 0, 0]


def test_labels_of_every_type_are_zero_one_or_unknown(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(
        "user_id,item_id,timestamp,action,label_buy\nu,a,1,x,1\nu,b,2,x,0.0\nu,c,3,x,\nu,d,4,x,True\nu,e,5,x, false\n"
    )
    config = DataConfig("shop", (Head("buy", "label", 1.0),))
    found = load(tmp_path / "e.csv", config).sequences.labels[:, 0]
    np.testing.assert_array_equal(found, np.array([1, 0, np.nan, 1, 0], np.float32))
    table = pl.DataFrame(
        {"user_id": "u", "item_id": ["a", "b", "c"], "timestamp": [1, 2, 3], "label_buy": [1.0, np.nan, 0.0]}
    )
    table.write_parquet(tmp_path / "e.parquet")
    table.write_csv(tmp_path / "e.csv")
    for name in ("e.parquet", "e.csv"):  # NaN is unknown, as pandas and polars write it
        data = load(tmp_path / name, config, history_actions=("*",))
        np.testing.assert_array_equal(data.sequences.labels[:, 0], np.array([1, np.nan, 0], np.float32))
        assert not data.bad_rows
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp,label_buy\nu,a,1,1\nu,b,2,yes\n")
    with pytest.raises(ValueError, match=r"label not 0 or 1 1; .*line 3, column label_buy: 'yes'; write 0 or 1"):
        load(tmp_path / "e.csv", config)
    with pytest.raises(ValueError, match=r"no column label_like for the head like; the events have no column label_"):
        load_columns(tmp_path, DataConfig("shop", (Head("like", "label", 1.0),)))


def load_columns(folder: Path, config: DataConfig) -> Data:
    frame().write_csv(folder / "plain.csv")
    return load(folder / "plain.csv", config)


def test_names_of_columns_can_be_set(tmp_path: Path) -> None:
    renamed = frame(label_x=[1, 0, 1, 0, 1], verb=["buy"] * 5).rename(
        {"user_id": "customer", "item_id": "sku", "timestamp": "at", "label_x": "bought"}
    )
    renamed.with_columns(user_id=pl.lit("not this one")).write_parquet(tmp_path / "e.parquet")
    pl.DataFrame({"sku": ["c", "z"], "price": [1, 2]}).write_csv(tmp_path / "i.csv")
    columns = {"user_id": "customer", "item_id": "sku", "timestamp": "at", "action": "verb", "label_buy": "bought"}
    config = DataConfig("shop", (Head("buy", "label", 1.0),), numeric=("price",))
    data = load(tmp_path / "e.parquet", config, items=str(tmp_path / "i.csv"), columns=columns)
    assert events_of(data) == EXPECTED
    assert data.catalogue.vocabulary.items == ["c", "z", "a", "b"]
    assert data.sequences.labels[:, 0].tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"no column customers, which \[columns\] gives for user_id; found: "):
        load(tmp_path / "e.parquet", columns={"user_id": "customers"})


def test_items_are_optional(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(CSV)
    assert load(tmp_path / "e.csv").catalogue.vocabulary.items == ["a", "c", "b"]


def read_catalogue(path: Path, **config: Any) -> tuple[Any, dict[str, int]]:
    wanted = DataConfig("shop", NEXT, **config)
    items, bad = clean_items(read_items(TablesConfig("e.csv", str(path))), wanted)
    events = pl.DataFrame(schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Float64})
    return build_catalogue(items, events, wanted), bad


def test_values_of_items_are_lists_or_separated_text(tmp_path: Path) -> None:
    lists = [["x", "y"], None, [], ["y", "", None], ["z" * 257]]
    ids = ["0", "1", "2", "3", "4"]
    pl.DataFrame({"item_id": ids, "genres": pl.Series(lists, dtype=pl.List(pl.String))}).write_parquet(
        tmp_path / "i.parquet"
    )
    pl.DataFrame({"item_id": ids, "genres": ["x|y", None, "", "y|", "z" * 257]}).write_csv(tmp_path / "i.csv")
    codes = pl.Series(lists, dtype=pl.List(pl.Categorical))
    pl.DataFrame({"item_id": ids, "genres": codes}).write_parquet(tmp_path / "codes.parquet")
    for name in ("i.parquet", "i.csv", "codes.parquet"):
        catalogue, bad = read_catalogue(tmp_path / name, categorical=("genres",))
        assert catalogue.vocabulary.fields == {"genres": ["x", "y"]} and not bad
        assert catalogue.field_values["genres"].tolist() == [[0, 0], [0, 0], [1, 2], [0, 0], [0, 0], [2, 0], [0, 0]]


def test_numbers_of_items_are_finite_or_missing(tmp_path: Path) -> None:
    price = ["1.5", "inf", "-inf", "nan", "1e39", "cheap", "", " 2 "]
    pl.DataFrame({"item_id": list("abcdefgh"), "price": price}).write_csv(tmp_path / "i.csv")
    catalogue, bad = read_catalogue(tmp_path / "i.csv", numeric=("price",))
    nan = np.nan
    expected = np.array([1.5, nan, nan, nan, nan, nan, nan, 2], np.float32)
    np.testing.assert_array_equal(catalogue.numeric[FIRST_ITEM:, 0], expected)
    assert bad == {"items: price is not a number": 5}


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"id": ["a"]}, {}, r"no column item_id; found: \'id\'.*"),
        (
            {"item_id": ["a"]},
            {"numeric": ("price",)},
            r"no column price, which numeric in \[items\] names; found: 'item_id'",
        ),
        (
            {"item_id": ["a"], "x": [[1]]},
            {"numeric": ("x",)},
            r"column x has the type List\(Int64\), so it cannot be num",
        ),
        (
            {"item_id": ["a"], "x": [date(2026, 1, 1)]},
            {"numeric": ("x",)},
            r"column x has the type Date; write it as a n",
        ),
        (
            {"item_id": ["a"], "x": [{"y": 1}]},
            {"categorical": ("x",)},
            r"column x has the type Struct.*; write text, or",
        ),
        ({"item_id": [["a"]]}, {}, r"column item_id has the type List"),
        ({"item_id": ["1", "1.0", "x"]}, {}, r"item_id has both '1' and '1\.0'"),
    ],
)
def test_items_in_doubt_are_refused(
    tmp_path: Path, columns: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    pl.DataFrame(columns).write_parquet(tmp_path / "i.parquet")
    with pytest.raises(ValueError, match=message):
        read_catalogue(tmp_path / "i.parquet", **config)


def test_user_with_a_million_events_is_read(tmp_path: Path) -> None:
    n = 1_000_000
    columns = {"user_id": pl.repeat("robot", n, eager=True), "item_id": np.arange(n) % 1000, "timestamp": np.arange(n)}
    pl.DataFrame(columns).write_parquet(tmp_path / "e.parquet")
    sequences = load(tmp_path / "e.parquet").sequences
    assert sequences.users == ["robot"] and sequences.offsets.tolist() == [0, n]
    np.testing.assert_array_equal(sequences.timestamps, np.arange(n))


def slow_sequences(rows: list[tuple[str, str, float]], vocabulary: list[str]) -> dict[str, list[tuple[int, float]]]:
    """The obvious reference of `build_sequences`: dictionaries and one loop."""
    users: dict[str, list[tuple[int, float]]] = {}
    for user, item, time in sorted(rows, key=lambda row: row[2]):
        users.setdefault(user, []).append((vocabulary.index(item) + FIRST_ITEM if item in vocabulary else 0, time))
    return users


@pytest.mark.parametrize("size", [0, 1, 2, 50, 500])
def test_sequences_equal_a_loop_over_the_rows(size: int) -> None:
    rng = np.random.default_rng(size)
    rows = [(f"u{rng.integers(9)}", f"i{rng.integers(30)}", float(rng.integers(50))) for _ in range(size)]
    rows = list(dict.fromkeys(rows))
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Float64}
    events = pl.DataFrame(rows, schema, orient="row").sort("timestamp", maintain_order=True)
    catalogue = build_catalogue(
        pl.DataFrame({"item_id": ["i3", "i1"]}), events.filter(pl.col("item_id") != "i2"), CONFIG
    )
    s = build_sequences(events, catalogue.vocabulary, CONFIG)
    found = {
        user: list(zip(s.items[a:b].tolist(), s.timestamps[a:b].tolist()))
        for user, a, b in zip(s.users, s.offsets, s.offsets[1:])
    }
    expected = slow_sequences(rows, catalogue.vocabulary.items)
    assert found == expected and list(found) == list(expected)


def test_name_of_a_column_with_a_line_end_stays_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(CSV)
    with pytest.raises(ValueError, match=r"e\.csv: no column a b, which \[columns\] gives for user_id"):
        load(tmp_path / "e.csv", columns={"user_id": "a\nb"})
