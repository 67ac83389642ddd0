"""Builds the JSON body of a request from the arguments of a call: frames, columns and rows become plain columns.

Called by: `calls.py` and `local/ranker.py`. Calls: `values.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Required, TypedDict

from slatewise.client.errors import Invalid
from slatewise.client.libraries import is_frame, library_of
from slatewise.client.values import column, ids, normal, numbers, one_id, scalar


class Options(TypedDict, total=False):
    """Members of a request that are not data. `None` is the same as leaving the member out."""

    ranker: str | None
    variant: str | None
    exit: str | None
    request_time: Any  # unix seconds, or a time; default: now
    head_weights: Mapping[str, float] | None
    deadline_ms: float | None
    allow_degraded: bool | None
    priority: int | None
    explain: bool | None
    return_fields: Sequence[str] | None
    prune: Mapping[str, int] | Literal[False] | None
    explore: float | None


class Members(Options, total=False):
    """The members of a ranking call, all given by name. docs/client.md describes the forms that each one takes."""

    candidates: Required[Any]  # ids, a mapping of columns, or a frame
    user: Any
    history: Any  # ids, rows (item, action, time), a mapping of columns, or a frame
    top_n: int | None
    id: str | None


# Names of history columns: the request's own, and those of a table of events.
HISTORY_NAMES = {
    "item_ids": "item_ids",
    "item_id": "item_ids",
    "actions": "actions",
    "action": "actions",
    "timestamps": "timestamps",
    "timestamp": "timestamps",
    "offset": "offset",
}
USER_NAMES = ("user", "user_id")  # a column that selected the rows of a frame


def rank_body(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of /rerank and /score. Raises Invalid. Unknown members are kept: a newer server may know them."""
    body = {name: value for name, value in members.items() if value is not None}
    if "candidates" not in body:
        raise Invalid.at("/candidates", "is missing")
    body["candidates"] = candidate_columns(body["candidates"])
    if "history" in body:
        body["history"] = history_columns(body["history"])
    if "user" in body:
        body["user"] = one_id(body["user"], "/user")
    if "head_weights" in body:
        body["head_weights"] = {str(name): scalar(weight) for name, weight in body["head_weights"].items()}
    if isinstance(body.get("prune"), Mapping):  # and not false
        body["prune"] = {str(exit): scalar(count) for exit, count in body["prune"].items()}
    if "return_fields" in body:
        body["return_fields"] = column(body["return_fields"], "/return_fields")
    return {name: value if isinstance(value, dict) else scalar(value) for name, value in body.items()}


def to_json(body: Any) -> bytes:
    """Return the body as JSON. Raises Invalid for a value that JSON cannot express."""
    try:
        text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError) as error:  # infinity, an object of another type, half of a surrogate pair
        raise Invalid.at("", f"cannot be written as JSON: {error}") from None


# Candidates


def candidate_columns(candidates: Any) -> dict[str, Any]:
    """Return the member `candidates`. In a frame, numeric columns are features, and all others are fields."""
    if isinstance(candidates, Mapping):
        members = dict(candidates)
    elif is_frame(candidates):
        members = split_frame(candidates)
    else:
        members = {"item_ids": candidates}
    if "item_ids" not in members:
        raise Invalid.at("/candidates/item_ids", "is missing")
    members["item_ids"] = ids(members["item_ids"], "/candidates/item_ids")
    for name, convert in (("features", numbers), ("fields", column)):
        if (columns := members.get(name)) is not None:
            if not isinstance(columns, Mapping):
                raise Invalid.at(f"/candidates/{name}", "must be a mapping of columns by name")
            members[name] = {str(key): convert(values, f"/candidates/{name}/{key}") for key, values in columns.items()}
    return {name: value for name, value in members.items() if value is not None}


def split_frame(frame: Any) -> dict[str, Any]:
    """Return `item_ids`, `features` and `fields` of a frame of candidates. Raises Invalid without an id column."""
    columns = {str(name): frame[name] for name in frame.columns}
    found = [name for name in ("item_id", "item_ids") if name in columns]
    if len(found) != 1:
        raise Invalid.at("/candidates", f"the frame needs one column `item_id`; it has {', '.join(columns)}")
    members: dict[str, Any] = {"item_ids": columns.pop(found[0])}
    numeric = {name for name, values in columns.items() if is_numeric(values.dtype)}
    for name, part in (("features", numeric), ("fields", columns.keys() - numeric)):
        if part:
            members[name] = {key: values for key, values in columns.items() if key in part}
    return members


def is_numeric(dtype: Any) -> bool:
    if library_of(dtype) == "polars":
        return bool(dtype.is_numeric()) or str(dtype) == "Boolean"
    return dtype.kind in "iufb"


# History


def history_columns(history: Any) -> dict[str, Any]:
    """Return the member `history` from columns, a frame, rows or ids, oldest first. Raises Invalid."""
    if isinstance(history, Mapping):
        members = dict(history)
    elif is_frame(history):
        members = {str(name): history[name] for name in history.columns if str(name) not in USER_NAMES}
    else:
        members = columns_of_rows(history)
    named: dict[str, Any] = {}
    for name, values in members.items():
        if name not in HISTORY_NAMES:
            known = "item_id, action, timestamp"
            raise Invalid.at(f"/history/{name}", f"unknown column; known: {known}. Select these columns first")
        if HISTORY_NAMES[name] in named:
            raise Invalid.at(f"/history/{name}", "is given twice")
        named[HISTORY_NAMES[name]] = values
    result: dict[str, Any] = {"item_ids": ids(named.get("item_ids", []), "/history/item_ids")}
    for name in ("actions", "timestamps"):
        if named.get(name) is not None:
            result[name] = column(named[name], f"/history/{name}")
    if named.get("offset") is not None:
        result["offset"] = scalar(named["offset"])
    return result


def columns_of_rows(history: Any) -> dict[str, Any]:
    """Return columns of a list of ids, of rows (item, action, time), or of mappings by name. Raises Invalid."""
    if isinstance(history, str) or not hasattr(history, "__iter__"):
        raise Invalid.at("/history", f"must be columns, rows or ids, not {type(history).__name__}")
    if hasattr(history, "dtype"):
        return {"item_ids": history}
    rows = list(history)
    if all(isinstance(row, Mapping) for row in rows):
        names = {name for row in rows for name in row}
        return {name: [row.get(name) for row in rows] for name in names if name not in USER_NAMES}
    if not any(isinstance(row, (tuple, list)) for row in rows):
        return {"item_ids": rows}
    for k, row in enumerate(rows):
        if not isinstance(row, (tuple, list)) or not 1 <= len(row) <= 3:
            raise Invalid.at(
                f"/history/{k}", "must be a row (item, action, time), as the others; action and time are optional"
            )
    width = max(map(len, rows))
    columns = [normal([row[k] if k < len(row) else None for row in rows]) for k in range(width)]
    return dict(zip(("item_ids", "actions", "timestamps"), columns, strict=False))
