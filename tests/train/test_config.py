"""The TOML of a ranker: names, types, ranges and encodings, each refused in one line with file, key and remedy."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slatewise_train.config import (
    DataConfig,
    Head,
    ModelConfig,
    TablesConfig,
    TrainConfig,
    read_config,
)

ROOT = Path(__file__).parents[2]
DATA = '[data]\nevents = "e.csv"\n'
SHOP = 'name = "shop"\n' + DATA


def write(folder: Path, text: str) -> Path:
    path = folder / "shop.toml"
    path.write_text(text, encoding="utf-8")
    return path


def fault(path: Path) -> str:
    """The message of a TOML that is refused: one line that begins with the file."""
    with pytest.raises(ValueError) as caught:
        read_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_config_has_the_values_of_the_toml(tmp_path: Path) -> None:
    text = (
        'name = "shop"\n[data]\nevents = "e.csv"\nitems = "i.csv"\n'
        '[heads.buy]\nkind = "label"\nweight = 2\n[split]\nslate_size = 7\n[items]\nnumeric = ["price"]\n'
    )
    config = read_config(write(tmp_path, text))
    assert config.tables == TablesConfig("e.csv", "i.csv")
    assert config.data == DataConfig("shop", (Head("buy", "label", 2.0),), numeric=("price",), slate_size=7)
    assert config.stated == {"data.events", "data.items", "heads.buy", "split.slate_size", "items.numeric"}


def test_smallest_config_has_one_head_of_kind_next(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, SHOP))
    assert config.data.heads == (Head("next", "next", 1.0),)
    assert config.tables == TablesConfig("e.csv", None)
    assert config.train == TrainConfig() and config.stated == {"data.events"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHOP + "[split]\ntitle = 'x'", "[split] has unknown title; known: "),
        (SHOP + "[items]\nnumbers = ['x']", "[items] has unknown numbers; did you mean numeric? known: categorical, "),
        (SHOP + "[train]\nepocs = 3", "[train] has unknown epocs; did you mean epochs? "),
        (SHOP + "[demo]\nitems = 'e.csv'", "[demo] lacks events; known: events, items, user_prefix"),
        (SHOP + "[trian]\nepochs = 3", "unknown table or key trian; did you mean train? known: columns, data, "),
        ("epochs = 3\n" + SHOP, "epochs = 3: the key epochs belongs to [train]"),
        (SHOP + "[model]\nfamily = 'gpt'", "unknown family 'gpt'"),
        (SHOP + "[model]\nfamily = 3", "[model] family = 3: must be text"),
        (SHOP + "[model]\nwidht = 8", "[model] has unknown widht; did you mean width?"),
        ('name = "shop"', 'the table [data] is missing; it names the events: events = "events.parquet"'),
        ('name = "shop"\n[data]\nevent = "e.csv"', "[data] has unknown event; did you mean events? known: events, "),
        ('name = "shop"\n[data]\nitems = "e.csv"', "[data] lacks events; known: events, history_actions, items, "),
        ('name = "shop"\ndata = "e.csv"', 'data = "e.csv": must be a table [data]'),
        (DATA, "the key name is missing: the ranker needs a name of letters, digits"),
        (SHOP + "heads = 3", "[data] has unknown heads"),
        (SHOP + "[heads]\nbuy = 3", "heads.buy = 3: must be a table [heads.buy]"),
        (SHOP + "[[heads]]\nkind = 'next'", 'heads = [{"kind": "next"}]: must be a table [heads]'),
        (SHOP + "[heads.buy]\nweight = 3", "[heads.buy] lacks kind; known: kind, weight"),
        (SHOP + "[heads.buy]\nkind = 'regression'", '[heads.buy] kind = "regression": must be one of "next", "label"'),
        (SHOP + "[columns]\nuser = 'u'", "[columns] has unknown user; did you mean user_id? known: action, item_id, "),
        (SHOP + "[columns]\nuser_id = 3", "[columns] user_id = 3: must be text in quotes"),
        (SHOP + "x = ", "not a TOML file: "),
        (SHOP + "x = " + "[" * 5000, "not a TOML file: "),
    ],
)
def test_wrong_name_or_table_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert fault(write(tmp_path, text)).startswith(message)


@pytest.mark.parametrize(
    ("table", "line", "wanted"),
    [
        ("split", "history_length = 0", "must be a whole number from 1 to 100_000"),
        ("split", "slate_size = 0", "must be a whole number from 1 to 1_000"),
        ("split", "slate_users = -1", "must be a whole number from 0 to 1_000_000_000"),
        ("split", "slate_size = 2.5", "must be a whole number"),
        ("split", "slate_size = true", "must be a whole number"),
        ("split", 'slate_size = "20"', "must be a whole number"),
        ("split", "validation_users = 1000000000000000000000000000000", "must be a whole number"),
        ("split", "max_bad_share = nan", "must be a number from 0 to 1"),
        ("split", 'kind = "random"', 'must be one of "leave-one-out", "time"'),
        ("model", "blocks = 0", "must be a whole number from 1 to 100"),
        ("model", "decoder_blocks = -1", "must be a whole number from 0 to 100"),
        ("model", "meta_size = 0", "must be a whole number from 1 to 8_192"),
        ("model", "width = -8", "must be a whole number from 1 to 8_192"),
        ("model", "dropout = 1.0", "must be a number from 0 to 0.9"),
        ("train", "epochs = 0", "must be a whole number from 1 to 100_000"),
        ("train", "learning_rate = 50", "must be a number from 1e-08 to 1"),
        ("train", "learning_rate = 0", "must be a number from 1e-08 to 1"),
        ("train", "learning_rate = inf", "must be a number from 1e-08 to 1"),
        ("train", "bfloat16 = 1", 'must be one of "auto", true, false'),
        ("heads.buy", 'kind = "label"\nweight = -1', "must be a number from 0 to 1_000_000.0"),
        ("heads.buy", 'kind = "label"\nweight = nan', "must be a number from 0 to 1_000_000.0"),
        ("items", 'numeric = "price"', 'must be a list of text, for example ["a", "b"]'),
        ("items", "numeric = [1]", 'must be a list of text, for example ["a", "b"]'),
        ("export", 'default_exit = "best"', 'must be one of "dot", "point", "set"'),
    ],
)
def test_value_outside_its_range_is_refused(tmp_path: Path, table: str, line: str, wanted: str) -> None:
    shown = line.split("\n")[-1]
    message = fault(write(tmp_path, SHOP + f"[{table}]\n{line}\n"))
    assert message.startswith(f"[{table}] {shown}: {wanted}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nseparator = ';;'", '[data] separator = ";;": must be one character'),
        ("[data]\nseparator = ''", '[data] separator = "": must be one character'),
        ("[data]\ntime_unit = 'milliseconds'", '[data] time_unit = "milliseconds": must be one of "s", "ms", '),
        ("[items]\nnumeric = ['a', 'a']", "[items] numeric names a more than once"),
        ("[items]\ncategorical = ['']", '[items] categorical = [""]: a name has 1 to 256 characters'),
        ("[split]\nkind = 'time'", '[split] kind = "time" needs test_from, for example test_from = 2026-01-31'),
        ("[split]\ntest_from = 5", '[split] test_from is used with kind = "time" alone'),
        ("[split]\nkind = 'time'\ntest_from = 1700000000000", "[split] test_from = 1700000000000: must be a number"),
        ("[split]\nkind = 'time'\ntest_from = 10:00:00", "[split] test_from = 10:00:00: must be a number"),
        ("[heads.a]\nkind = 'next'\nweight = 0", "[heads] all weights are 0"),
        ("[model]\nwidth = 8\nattention_heads = 3", "attention_heads = 3 must divide width = 8"),
        ("[model]\nblocks = 2\ndecoder_blocks = 3", "decoder_blocks = 3 must not be more than blocks = 2"),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    text = text.replace("[data]", '[data]\nevents = "e.csv"') if "[data]" in text else DATA + text
    assert fault(write(tmp_path, 'name = "shop"\n' + text)).startswith(message)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2024-01-01", 1_704_067_200.0),
        ("2024-01-01T12:00:00Z", 1_704_110_400.0),
        ("2024-01-01 14:00:00+02:00", 1_704_110_400.0),
        ("2024-01-01T12:00:00", 1_704_110_400.0),
        ("1704067200", 1_704_067_200.0),
    ],
)
def test_test_from_is_a_number_a_date_or_a_time(tmp_path: Path, value: str, seconds: float) -> None:
    config = read_config(write(tmp_path, SHOP + f"[split]\nkind = 'time'\ntest_from = {value}\n"))
    assert config.data.test_from == seconds


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "-x", "a b", "x" * 101, "a\\b"])
def test_name_that_is_not_a_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    assert "the ranker needs a name of letters, digits" in fault(write(tmp_path, f"name = '{name}'\n" + DATA))


@pytest.mark.parametrize("name", ["shop", "Shop-2.1_b", "лавка", "2026"])
def test_name_of_letters_and_digits_is_accepted(tmp_path: Path, name: str) -> None:
    assert read_config(write(tmp_path, f"name = '{name}'\n" + DATA)).data.name == name


def test_toml_with_bom_and_crlf_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shop.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SHOP.replace("\n", "\r\n").encode())
    assert read_config(path).tables.events == "e.csv"


def test_toml_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shop.toml"
    path.write_bytes(SHOP.encode("utf-16"))
    assert fault(path) == "byte 0 is not UTF-8; save the file as UTF-8"


def test_toml_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = write(tmp_path, SHOP + 'trained_on = "Käufe, заказы"\n')
    code = f"from slatewise_train.config import read_config; import pathlib; read_config(pathlib.Path({str(path)!r}))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("app", "models"))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_model_config_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match=r"\[model\] has unknown widht"):
        ModelConfig("ligr", {"widht": 8}).sized(items=3, actions=1, fields={}, numeric=0, heads=1)


def test_default_of_every_key_lies_in_its_range() -> None:
    for kind in (DataConfig, TrainConfig):
        for declared in dataclasses.fields(kind):
            if "least" in declared.metadata and declared.default not in (dataclasses.MISSING, None):
                assert declared.metadata["least"] <= declared.default <= declared.metadata["most"], declared.name
