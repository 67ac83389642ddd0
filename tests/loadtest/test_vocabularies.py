"""Small id tables of the study: their rows, their bytes, and that they train."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadtest.training.vocabularies.forms import forms
from loadtest.training.vocabularies.study import remainders_within
from loadtest.training.vocabularies.tables import (
    Clusters,
    Factored,
    QuotientRemainder,
    graph_clusters,
    parameter_bytes,
    random_clusters,
    sub_rows,
)
from slatewise.inference.arrays import FIRST_ITEM


@given(st.integers(1, 5_000), st.integers(1, 400))
def test_distinct_ids_never_share_both_sub_rows(rows: int, remainders: int) -> None:
    quotients, places = sub_rows(np.arange(rows), remainders)
    assert len(set(zip(quotients.tolist(), places.tolist(), strict=True))) == rows
    assert places.max() < remainders and quotients.max() == (rows - 1) // remainders


def test_ids_of_a_large_vocabulary_never_share_both_sub_rows() -> None:
    rows = 1_000_000
    quotients, places = sub_rows(np.arange(rows), remainders_within(rows, 2_000))
    assert len(np.unique(quotients * rows + places)) == rows


@given(st.integers(50, 5_000))
def test_both_tables_of_qr_hashing_are_within_the_budget(rows: int) -> None:
    budget = max(rows // 8, int(2 * rows**0.5) + 2)
    remainders = remainders_within(rows, budget)
    table = QuotientRemainder(rows, 4, remainders, 0.1)
    assert parameter_bytes(table) <= 4 * 4 * budget


def test_tables_have_a_row_for_each_item_and_gradients() -> None:
    clusters = np.array([0, 1, 1, 2, 0, 2, 2])
    tables = (QuotientRemainder(7, 4, 3, 0.1), Clusters(clusters, 4, 0.1), Factored(7, 4, 2, 0.1))
    for table in tables:
        assert table.weight.shape == (7, 4)
        table.weight.sum().backward()  # type: ignore[no-untyped-call]
        assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in table.parameters())
    qr, shared, _ = tables
    torch.testing.assert_close(qr.weight[5], qr.quotient[1] * qr.remainder[2])
    torch.testing.assert_close(shared.weight[1], shared.weight[2])


def test_clusters_of_a_graph_follow_its_edges() -> None:
    """Two groups of users, each with items of its own."""
    users = np.repeat(np.arange(6), 4)
    items = np.concatenate([FIRST_ITEM + 4 * (user // 3) + np.arange(4) for user in range(6)])
    clusters = graph_clusters(users, items, FIRST_ITEM + 8, 1.0)
    first, second = clusters[FIRST_ITEM : FIRST_ITEM + 4], clusters[FIRST_ITEM + 4 :]
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    assert len(set(clusters)) == 2 + FIRST_ITEM, "the rows before the items are alone"


def test_random_clusters_are_all_used() -> None:
    clusters = random_clusters(100, 12)
    assert len(clusters) == 100 and set(clusters) == set(range(12))


def test_forms_state_their_bytes_and_keep_the_shape() -> None:
    items = np.random.default_rng(0).normal(size=(4_000, 16)).astype(np.float32)
    found = list(forms(items, items[:20]))
    assert found[0].name == "float32" and found[0].bytes == items.nbytes
    for form in found:
        assert form.table.shape == items.shape and 0 < form.bytes <= items.nbytes, form.name
    error = {form.name: float(np.linalg.norm(form.table - items)) for form in found}
    assert error["int8, a scale a row"] < error["4 bits, a scale a row"] < error["3 bits, a scale a row"]
