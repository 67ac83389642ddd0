"""The events of a log, read as the training of a bundle read its own.

Called by: `refresh.py`, `refresh_items.py`. Calls: `data.py`, `tables/`.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from slatewise.bundle.manifest import Manifest
from slatewise_train.config import DataConfig, Head
from slatewise_train.data import Sequences, TrainingVocabulary, build_sequences, clean_events, taken_events
from slatewise_train.tables.items import join_ids


def config_of(manifest: Manifest, kinds: Sequence[str]) -> DataConfig:
    """Return the part of the training's config that reads events. kinds: of the heads."""
    heads = tuple(Head(*row) for row in zip(manifest.heads, kinds, manifest.heads.values(), strict=True))
    return DataConfig(manifest.ranker, heads, history_length=manifest.limits.history_used)


def history_of(
    events: pl.DataFrame,
    known: pl.DataFrame,
    vocabulary: TrainingVocabulary,
    config: DataConfig,
    history_actions: Sequence[str],
) -> Sequences:
    """Return the sequences of the rows of a log, those that were only shown included in the rows.

    known: the column `item_id`, of the ranker's items. Without the column of a label, the label is unknown: a log of
    events as they happen has none yet.
    """
    clean, _ = clean_events(events, max_bad_share=1.0)
    _, clean = join_ids(known, clean)
    taken = taken_events(clean, history_actions, config.heads, "events")
    labels = [f"label_{head.name}" for head in config.heads if head.kind == "label"]
    unlabelled = [name for name in labels if name not in taken.columns]
    taken = taken.with_columns(pl.lit(None, pl.Float32).alias(name) for name in unlabelled)
    return build_sequences(taken, vocabulary, config)
