"""The tiny ranker as a source of variants, with limits and measurements of its size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from slatewise_train import compress as command
from slatewise_train.compression import source as sources
from slatewise_train.compression.source import Source
from tests.conftest import Tiny

TIMES = {
    "machine": "none",
    "rows": [
        {"history": 200, "candidates": 200, "encode_p50": 1.0, "encode_p99": 1.5, "score_p50": 2.0, "score_p99": 2.5}
    ],
}


@contextmanager
def small_source(tiny: Tiny, integer_side: int) -> Iterator[Source]:
    """Open the tiny ranker with few samples and `TIMES`. integer_side: of the smallest layer that int8 quantizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slatewise_train.compression.quantize.INTEGER_SIDE", integer_side)
        patch.setattr("slatewise_train.evaluation.parity.SLATES", (1, 5))
        patch.setattr(sources, "SAMPLES", 12)
        patch.setattr(command, "measure_latency", lambda engines, _: dict.fromkeys(engines, TIMES))
        yield Source(tiny.folder, tiny.trainer.data, tiny.config.train, most_users=20)
