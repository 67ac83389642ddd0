"""Decide which rows of the events make history. The others were only shown.

A row that was shown and not taken must not be read as an event of the user: it would turn the ranker around. The TOML
states the actions that make history, unless the table leaves no doubt.

Called by: `data.py`, `validate.py`. Calls: `config_values.py`.
"""

from __future__ import annotations

import polars as pl

from slatewise_train.config import TablesConfig
from slatewise_train.config_values import nearest
from slatewise_train.tables.events import LABEL

SHOWN = {"shown", "show", "impression", "impressed", "exposure", "exposed", "display", "displayed", "served"}
SHOWN |= {"impressions", "exposures"}
EVERY = "*"
BY_LABEL = "label:"


def history_rows(events: pl.DataFrame, tables: TablesConfig) -> pl.Series:
    """Return whether each of the clean events makes history.

    Raises ValueError if the table has rows that may only have been shown and `history_actions` is not stated, if it
    names an action or label that the table lacks, or if no row is left.
    """
    stated = tables.history_actions
    if EVERY in stated or (not stated and not (doubt := reason_to_ask(events))):
        return pl.Series("is_history", [True], pl.Boolean).new_from_index(0, len(events))
    if not stated:
        raise ValueError(f"{tables.events}: {doubt}; {remedy(events)}")
    actions = sorted(events["action"].drop_nulls().unique().cast(pl.String)) if "action" in events.columns else []
    tests = []
    for name in stated:
        if name.startswith(BY_LABEL):
            column = LABEL + name.removeprefix(BY_LABEL)
            if column not in events.columns:
                raise ValueError(f"{tables.events}: history_actions in [data] names {name}: no column {column}")
            tests.append((pl.col(column) == 1).fill_null(False))
        elif name not in actions:
            known = nearest(name, actions) if actions else "the events have no column action"
            raise ValueError(f"{tables.events}: history_actions in [data] names {name}, which no event has; {known}")
        else:
            tests.append((pl.col("action").cast(pl.String) == name).fill_null(False))
    rows = events.select(pl.any_horizontal(tests).alias("is_history")).to_series()
    if len(rows) and not rows.any():
        raise ValueError(f"{tables.events}: history_actions in [data] leaves no event")
    return rows


def reason_to_ask(events: pl.DataFrame) -> str | None:
    """Return the sign that rows of the events may only have been shown, or None."""
    if "action" in events.columns and events["action"].null_count() < len(events):
        shown = [a for a in sorted(events["action"].drop_nulls().unique().cast(pl.String)) if a.lower() in SHOWN]
        if shown:
            return f"the action {shown[0]} says that an item was only shown"
        return None if no_slates(events) else "the events have a slate_id, so some items may only have been shown"
    if not no_slates(events):
        return "the events have a slate_id, so some items may only have been shown"
    for name in events.columns:
        if name.startswith(LABEL) and (events[name] == 0).any():
            return f"rows have {name} = 0 and there is no column action, so these items may only have been shown"
    return None


def no_slates(events: pl.DataFrame) -> bool:
    return "slate_id" not in events.columns or events["slate_id"].null_count() == len(events)


def remedy(events: pl.DataFrame) -> str:
    """Return the lines for the TOML between which the user chooses."""
    labels = [name for name in events.columns if name.startswith(LABEL)]
    if "action" in events.columns and events["action"].null_count() < len(events):
        actions = sorted(events["action"].drop_nulls().unique().cast(pl.String))
        taken = next((a for a in actions if a.lower() not in SHOWN), actions[0])
    else:
        taken = BY_LABEL + labels[0].removeprefix(LABEL) if labels else "label:buy"
    return f'set history_actions in [data], for example ["{taken}"]; ["*"] if every row is an event of the user'
