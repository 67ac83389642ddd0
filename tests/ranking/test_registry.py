"""The registry: look-up by name, and the metric of the served variants."""

from __future__ import annotations

import dataclasses

import pytest
from prometheus_client import REGISTRY

from slatewise.bundle.ranker import Ranker
from slatewise.errors import Invalid, NotFound
from slatewise.ranking.registry import Registry


@pytest.fixture
def other(ranker: Ranker) -> Ranker:
    return dataclasses.replace(ranker, manifest=ranker.manifest.model_copy(update={"ranker": "other", "version": 7}))


def test_resolve_by_name_returns_the_ranker(ranker: Ranker, other: Ranker) -> None:
    registry = Registry([ranker, other])
    assert registry.serving() == (ranker, other)
    assert registry.resolve("tiny") is ranker
    assert registry.resolve("other") is other


def test_resolve_without_name_needs_a_single_ranker(ranker: Ranker, other: Ranker) -> None:
    assert Registry([ranker]).resolve(None) is ranker
    with pytest.raises(Invalid, match="must be one of tiny, other") as refused:
        Registry([ranker, other]).resolve(None)
    assert [fault.pointer for fault in refused.value.faults] == ["/ranker"]


def test_resolve_unknown_name_lists_the_served_rankers(ranker: Ranker, other: Ranker) -> None:
    with pytest.raises(NotFound, match="served: tiny, other"):
        Registry([ranker, other]).resolve("none")


def test_model_info_is_1_for_each_served_variant(other: Ranker) -> None:
    Registry([other])
    labels = {"ranker": "other", "version": "7", "variant": "fp32"}
    assert REGISTRY.get_sample_value("slatewise_model_info", labels) == 1
