"""Text columns: words of a table, and of a request that describes an unknown item by its title."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slatewise.bundle.features import field_change, words_of
from slatewise.bundle.loader import load_bundle
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.schemas import RankRequest
from slatewise_train.config import parse_config
from slatewise_train.data import Data, frequent_words, load_data
from slatewise_train.export import ExportOptions, export
from slatewise_train.tables.items import word_lists
from slatewise_train.train import Trainer
from tests.conftest import Tiny


def test_words_are_folded_and_distinct() -> None:
    assert words_of(("Star Wars: Episode IV - A New Hope (1977)",)) == (
        ("star", "wars", "episode", "iv", "a", "new", "hope", "1977")
    )
    assert words_of((None, "Straße straße", "", "ÉTÉ")) == ("strasse", "été")
    assert words_of(("...", None)) == ()


@given(st.lists(st.one_of(st.none(), st.text(max_size=20)), max_size=5))
def test_a_table_and_a_request_have_the_same_words(texts: list[str | None]) -> None:
    column = pl.Series("title", texts, pl.String)
    assert [tuple(cell) for cell in word_lists(column)] == [words_of((text,)) for text in texts]


def test_rare_words_are_left_out() -> None:
    lists = word_lists(pl.Series("title", ["the cat", "the dog", "The bird", None, "cat cat"]))
    assert frequent_words(lists).to_list() == [["the"], ["the"], ["the"], [], []], "cat is in two titles"


def test_the_words_of_a_text_are_its_values() -> None:
    vectors = np.array([[1, 1], [5, 1], [3, 7]], np.float32)  # "none", "star", "wars"
    column = ["Star Wars!", ["unheard", "STAR"], None, "unheard|of"]
    change, unknown = field_change(column, np.arange(4), {"star": 1, "wars": 2}, vectors, 0, True)
    np.testing.assert_array_equal(change, [[3, 3], [4, 0], [0, 0], [0, 0]])
    assert unknown == 0, "a text has words that no ranker knows"


def with_titles(tiny: Tiny) -> Data:
    data_config = replace(tiny.config.data, text=("title",))
    return load_data(data_config, tiny.config.tables)


def test_an_unknown_item_is_read_by_the_words_of_its_title(tiny: Tiny, tmp_path: Path) -> None:
    data = with_titles(tiny)
    words = data.catalogue.vocabulary.fields["title"]
    assert words == sorted(words)
    config = replace(tiny.config, data=data.config)
    trainer = Trainer(data, config.model, config.train)
    folder = export(trainer, None, config, tmp_path, 1, ExportOptions(force=True))
    ranker = load_bundle(folder)
    assert ranker.manifest.fields["title"].text
    assert not ranker.manifest.fields["genres"].text
    assert '"text": true' in (folder / "manifest.json").read_text()
    assert '"text": false' not in (folder / "manifest.json").read_text(), "servers before this member refuse it"

    items = pl.read_parquet(tiny.config.tables.items)
    row = next(k for k, cell in enumerate(data.catalogue.field_values["title"][FIRST_ITEM:]) if cell.any())
    fields = {name: [items[name].to_list()[row]] for name in ("title", "genres", "decade")}
    request = RankRequest.model_validate({"candidates": {"item_ids": ["unheard of"], "fields": fields}})
    candidates, _ = ranker.candidates(request, 0.0)
    cold = trainer.model.cold_item_vectors(trainer.model.item_table()).detach().numpy()
    np.testing.assert_allclose(candidates.vectors[0], cold[FIRST_ITEM + row], atol=1e-5)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ('categorical = ["title"]\ntext = ["title"]', "title is in categorical and in text"),
        ('text = ["title", "title"]', "text names title more than once"),
    ],
)
def test_a_column_is_used_in_one_way(items: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(f'name = "shop"\n[data]\nevents = "e.csv"\n[items]\n{items}\n'.encode(), Path("shop.toml"))


def test_a_text_column_of_lists_is_refused() -> None:
    with pytest.raises(ValueError, match="column title has the type List"):
        word_lists(pl.Series("title", [["a", "b"]]))
