"""`slatewise init` chooses columns that describe items, and gives the reason for each of the others."""

from __future__ import annotations

from datetime import date
from typing import Any

import polars as pl
import pytest

from slatewise_train.column_kinds import is_code, kind_of

N = 200
IDS = [f"B{k:05}" for k in range(N)]
WORDS = ("soft", "cream", "for", "dry", "skin", "made", "of", "shea", "butter", "and", "oil", "every", "day")


def text(k: int) -> str:
    return " ".join(WORDS[(k * 7 + j * 5) % len(WORDS)] for j in range(15)) + f" {k}"


COLUMNS: dict[str, tuple[list[Any], str | None, str]] = {
    "brand": ([f"Brand {k % 30}" for k in range(N)], "categorical", "text with 30 different values"),
    "categories": ([[f"c{k % 7}", "all"] for k in range(N)], "categorical", "lists with 8 different values"),
    "tags": ([f"t{k % 5} | t{k % 3}" for k in range(N)], "categorical", "5 different values, several of them"),
    "path": (
        [f"Beauty & Personal Care > Skin Care > Face > Creams & Moisturizers {k % 9}" for k in range(N)],
        "categorical",
        "text with 9 different values",
    ),
    "price": ([round(3 + k * 0.37, 2) for k in range(N)], "numeric", "numbers with 200 different values"),
    "reviews": ([k * k % 97 for k in range(N)], "numeric", "numbers with"),
    "year": ([str(2000 + k % 12) for k in range(N)], "categorical", "whole numbers with 12 different values"),
    "stars": ([1 + k % 9 / 2 for k in range(N)], "numeric", "numbers with 9 different values"),
    "weight": (["n/a" if k % 20 == 0 else str(k / 7) for k in range(N)], "numeric", "10 values are no numbers"),
    "organic": ([k % 3 == 0 for k in range(N)], "categorical", "text with 2 different values"),
    "sale": (["yes" if k % 4 == 0 else None for k in range(N)], "categorical", "text with 1 different values"),
    "seller_id": ([9_000 + k % 40 for k in range(N)], "categorical", "text with 40 different values"),
    "ean": ([4_000_000_000_000 + 17 * k for k in range(N)], None, "has 200 different values among 200"),
    "row": (list(range(N)), None, "each item has another whole number"),
    "description": ([text(k) for k in range(N)], None, "long text such as soft made"),
    "name2": ([f"Cream no. {k}" for k in range(N)], None, "200 different values among 200"),
    "image": ([f"https://shop.example/{k % 20}.jpg" for k in range(N)], None, "addresses such as https://shop"),
    "images": ([[f"p{k}.jpg", f"q{k}.jpg"] for k in range(N)], None, "400 different values among 400"),
    "also_bought": ([[IDS[(k + j) % N] for j in (1, 2, 3)] for k in range(N)], None, "names other items"),
    "cost": ([f"${k % 50}.99" for k in range(N)], None, "has numbers such as $0.99; write them without"),
    "released": ([f"20{k % 20:02}-01-05" for k in range(N)], None, "dates such as 2000-01-05; a year"),
    "added": ([date(2026, 1, 1)] * N, None, "has the type Date; a year or an age"),
    "colours": ([f"red{k % 5}, blue{k % 7}, green{k % 11}" for k in range(N)], None, ", separates its values"),
    "lists": ([f"['c{k % 5}']" for k in range(N)], None, "looks like lists, such as ['c0']; separate the values by |"),
    "shop": (["ours"] * N, None, "all items have one value"),
    "nothing": ([None] * N, None, "it is empty"),
    "blank": ([" "] * N, None, "it is empty"),
    "nan": ([float("nan")] * N, None, "it is empty"),
    "boxes": ([[{"a": 1}]] * N, None, "its lists have the type Struct"),
    "box": ([{"a": 1}] * N, None, "has the type Struct"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_column_of_items_has_a_kind_and_a_reason(name: str) -> None:
    values, kind, reason = COLUMNS[name]
    found, why = kind_of(pl.Series(name, values), pl.Series(IDS))
    assert (found, reason in why) == (kind, True), why
    assert why.startswith("left out") == (kind is None)


@pytest.mark.parametrize(
    ("name", "code"),
    [("id", True), ("brand_id", True), ("brandId", True), ("paid", False), ("mean", False), ("Zip Code", True)],
)
def test_code_is_found_by_the_last_word_of_a_name(name: str, code: bool) -> None:
    assert is_code(name) is code


def test_small_numbers_are_not_taken_for_ids_of_items() -> None:
    """As in Amazon's Beauty: items 1 to 12,101 have lists of attributes 1 to 1,221."""
    numbers = pl.Series([str(k + 1) for k in range(N)])
    attributes = pl.Series("attributes", [[1 + k % 30, 1 + k % 7] for k in range(N)])
    assert kind_of(attributes, numbers) == ("categorical", "lists with 30 different values")
    others = pl.Series("also_bought", [[1 + (k + j) % N for j in range(3)] for k in range(N)])
    assert kind_of(others, numbers) == (None, "left out, since it names other items")
