"""Decide which rows of the events make history. The others were only shown.

A row that was shown and not taken must not be read as an event of the user: it would turn the ranker around. The TOML
states the actions that make history, unless the table leaves no doubt.

Called by: `data.py`, `check_data.py`, `new_toml.py`, `meta/changed_users.py`. Calls: `config_values.py`, `events.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    if not stated and (doubt := reason_to_ask(events)):
        raise ValueError(f"{tables.events}: {doubt}; {remedy(events)}")
    rule = history_rule(stated, events.columns, tables.events)
    actions = sorted(events["action"].drop_nulls().unique().cast(pl.String)) if "action" in events.columns else []
    for name in stated:
        if name not in (EVERY, *actions) and not name.startswith(BY_LABEL) and EVERY not in stated:
            known = nearest(name, actions) if actions else "the events have no action"
            raise ValueError(f"{tables.events}: history_actions in [data] names {name}, which no event has; {known}")
    rows = events.with_columns(rule.alias("is_history"))["is_history"]
    if len(rows) and not rows.any():
        raise ValueError(f"{tables.events}: history_actions in [data] leaves no event")
    return rows


def history_rule(stated: Sequence[str], found: Sequence[str], place: str) -> pl.Expr:
    """Return the rule for rows that make history. stated: `history_actions`; found: the columns of the events.

    It holds for any part of the events: an action that no row has is allowed. Raises ValueError for a missing column.
    """
    if EVERY in stated or not stated:
        return pl.lit(True)
    tests = []
    for name in stated:
        column = LABEL + name.removeprefix(BY_LABEL) if name.startswith(BY_LABEL) else "action"
        if column not in found:
            missing = f"no column {column}" if column != "action" else "the events have no column action"
            raise ValueError(f"{place}: history_actions in [data] names {name}: {missing}")
        test = pl.col(column) == 1 if column != "action" else pl.col(column).cast(pl.String) == name
        tests.append(test.fill_null(False))
    return pl.any_horizontal(tests)


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
