"""1,000 mutated TOMLs and tables: each is read, or refused with one line. A traceback is never an answer."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from slatewise_train.check_data import describe
from slatewise_train.config import read_config
from slatewise_train.data import load_data
from slatewise_train.new_toml import toml_of

MUTANTS = 1_000
PARTS = 8  # tests; each has its own seeds

TOML = """
name = "shop"
[data]
events = "EVENTS"
items = "ITEMS"
history_actions = ["*"]
[columns]
user_id = "user_id"
[items]
title = "title"
categorical = ["genres"]
numeric = ["price", "popularity"]
[heads.next]
kind = "next"
weight = 1.0
[heads.buy]
kind = "label"
weight = 0.5
[split]
kind = "leave-one-out"
history_length = 16
slate_size = 2
slate_users = 2
validation_users = 2
seed = 1
[model]
width = 16
blocks = 2
attention_heads = 2
meta_size = 4
[train]
epochs = 3
learning_rate = 0.01
bfloat16 = false
[meta]
code = 4
[export]
default_exit = "dot"
"""
EVENTS = "user_id,item_id,timestamp,action,label_buy\n" + "".join(
    f"u{k % 4},i{k % 7},{1_700_000_000 + 60 * k},{('view', 'buy')[k % 2]},{k % 2}\n" for k in range(40)
)
ITEMS = "item_id,title,genres,price\n" + "".join(f'i{k},"Item, {k}",a|b{k},{k}.5\n' for k in range(7))
VALUES = (
    "0", "-1", "nan", "inf", "-inf", "true", '""', '"x"', "[]", "[1]", '["a", "a"]', "{}", "{a = 1}", "2024-01-01",
    "1e400", "99999999999999999999999", "10:00:00", '"../x"', "'''a\nb'''", '"\\u0000"', '"\t"', "[[]]", '["*"]',
    '"time"', '"row"', '"ms"', "0.5", "3", '"s3://b/e"', '"/"', '"é"', '"~"', '"*"', '"["', '"label"', '"next"',
)  # fmt: skip
FIELDS = (
    "", " ", "0", "-1", "1.0", "1e16", "nan", "inf", "1e999", "NULL", "null", '"', '""', '"a', 'a"b', "é",
    "\ufeff", "\x00", "\r", "\n", ",", ";", "\t", "2024-01-01", "2024-13-45", "2024-01-01T25:00:00Z",
    "2024-01-01 10:00:00+99:99", "1700000000000", "x" * 300, "1,2", "true", "'", "[1]", "9" * 40, "-", "--", "1_000",
    "0x10", "\u202e", "\U0001d7d9",
)  # fmt: skip


def mutate_toml(text: str, rng: random.Random) -> str:
    """Change one to three lines: another value, another name, a line more, a line less, a character."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        k = rng.randrange(len(lines))
        name, equals, _ = lines[k].partition(" = ")
        change = rng.randrange(7)
        if change <= 2 and equals:
            lines[k] = f"{name} = {rng.choice(VALUES)}"
        elif change == 3:
            lines[k] = lines[k].replace(rng.choice(name or "x"), rng.choice("xyz_[]. \"'="), 1)
        elif change == 4:
            lines.insert(k, rng.choice(lines))
        elif change == 5:
            del lines[k]
            lines = lines or [""]
        else:
            lines.insert(k, f"{rng.choice(('epochs', 'x', 'events', 'name', 'data', 'heads'))} = {rng.choice(VALUES)}")
    return "\n".join(lines)


def mutate_rows(text: str, rng: random.Random) -> str:
    """Change one to four fields, or a whole column, or the header."""
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(rng.randint(1, 4)):
        row = rng.choice(rows[:1] if rng.random() < 0.2 else rows)
        k = rng.randrange(len(row))
        change = rng.randrange(8)
        if change <= 3:
            row[k] = rng.choice(FIELDS)
        elif change == 4:
            value = rng.choice(FIELDS)
            for other in rows[1:]:
                if k < len(other):
                    other[k] = value
        elif change == 5:
            del row[k]
            row.append("") if not row else None
        elif change == 6:
            row.insert(k, rng.choice(FIELDS))
        else:
            del rows[rng.randrange(len(rows))]
            rows = rows or [[""]]
    return rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\n\n")).join(map(",".join, rows))


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change some bytes, cut the end off, or compress."""
    change = rng.randrange(6)
    data = bytearray(content)
    if change == 0:
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif change == 1:
        del data[rng.randrange(len(data)) :]
    elif change == 2:
        return gzip.compress(content)[: rng.randrange(40, 400)]
    elif change == 3:
        return content.decode(errors="replace").encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    return bytes(data)


DTYPES: tuple[Any, ...] = (
    pl.Int8, pl.UInt64, pl.Float32, pl.Float64, pl.String, pl.Categorical, pl.Boolean, pl.Date,
    pl.Datetime("ns", "UTC"), pl.Datetime("ms"), pl.Time, pl.Duration("us"), pl.Binary, pl.List(pl.String),
    pl.List(pl.Int64), pl.Decimal(20, 2), pl.Null, pl.Struct({"a": pl.Int64}),
)  # fmt: skip


def parquet_of(text: str, rng: random.Random, path: Path) -> None:
    """Write the rows as Parquet, one or two columns in another type."""
    frame = pl.read_csv(text.encode(), infer_schema=rng.random() < 0.5)
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(frame.columns)
        dtype = rng.choice(DTYPES)
        try:
            frame = frame.with_columns(pl.col(name).cast(dtype, strict=False))
        except pl.exceptions.PolarsError:
            frame = frame.with_columns(pl.lit(None, dtype).alias(name))
    frame.write_parquet(path)


def write_mutant(folder: Path, rng: random.Random) -> Path:
    """Write a TOML and its tables, one of which is not as it should be."""
    events, items, toml = EVENTS, ITEMS, TOML
    event_name, item_name = "events.csv", "items.csv"
    kind = rng.randrange(6)
    if kind <= 1:
        toml = mutate_toml(toml, rng)
    elif kind == 2:
        events = mutate_rows(events, rng)
    elif kind == 3:
        items = mutate_rows(items, rng)
    (folder / event_name).write_bytes(events.encode())
    (folder / item_name).write_bytes(items.encode())
    if kind == 4:
        name = rng.choice((event_name, item_name))
        (folder / name).write_bytes(mutate_bytes((folder / name).read_bytes(), rng))
    elif kind == 5:
        if rng.random() < 0.6:
            event_name = "events.parquet"
            parquet_of(events, rng, folder / event_name)
        else:
            item_name = "items.parquet"
            parquet_of(items, rng, folder / item_name)
    toml = toml.replace("EVENTS", str(folder / event_name)).replace("ITEMS", str(folder / item_name))
    (folder / "my.toml").write_bytes(toml.encode())
    return folder / "my.toml"


def ends_in_one_line(function: Callable[[], object], name: str) -> bool:
    """Whether the function returned. Another error than those that a command explains fails the test."""
    try:
        function()
    except (ValueError, OSError) as error:
        message = str(error)
        assert message and "\n" not in message.strip() and len(message) < 3000, f"{name}: {message!r}"
        return False
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    return True


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_toml_or_table_ends_in_one_line(tmp_path: Path, part: int, capsys: pytest.CaptureFixture[str]) -> None:
    read = 0
    for k in range(part, MUTANTS, PARTS):
        rng = random.Random(k)
        path = write_mutant(tmp_path, rng)

        def run(path: Path = path) -> None:
            config = read_config(path)
            load_data(config.data, config.tables)

        accepted = ends_in_one_line(run, f"mutant {k}")
        read += accepted
        if k % 4 == 0:  # the other commands read the same files
            described = ends_in_one_line(lambda path=path: list(describe(read_config(path))), f"validate, mutant {k}")
            assert described == accepted, f"mutant {k}: validate and training do not agree"
            tables = [str(next(tmp_path.glob(f"{name}.*"))) for name in ("events", "items")]
            ends_in_one_line(lambda tables=tables: toml_of(*tables, "shop"), f"init, mutant {k}")
        capsys.readouterr()
        for file in tmp_path.iterdir():
            file.unlink()
    assert 0.1 * MUTANTS / PARTS < read < 0.9 * MUTANTS / PARTS, "some mutants are read, some are refused"
